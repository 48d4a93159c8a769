"""Stacks of residual blocks as equilibrium layers, and dropout that fits into cells."""

from .dropout import fix_dropout as fix_dropout
from .stack import EquilibriumStack as EquilibriumStack
from .stack import to_equilibrium as to_equilibrium
