"""Solvers: one file each."""

from .anderson import Anderson as Anderson
from .base import Solver as Solver
from .broyden import Broyden as Broyden
from .picard import Picard as Picard
