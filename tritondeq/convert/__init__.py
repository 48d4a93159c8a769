"""Stacks of residual blocks as equilibrium layers."""

from .stack import EquilibriumStack as EquilibriumStack
from .stack import to_equilibrium as to_equilibrium
