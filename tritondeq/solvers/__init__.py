"""Solvers: one file each."""

from .anderson import Anderson as Anderson
from .base import Solver as Solver
from .broyden import Broyden as Broyden
from .forward_backward import ForwardBackward as ForwardBackward
from .peaceman_rachford import PeacemanRachford as PeacemanRachford
from .picard import Picard as Picard
