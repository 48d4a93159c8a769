"""Deep Equilibrium layers for PyTorch: solved, differentiated and fused with Triton."""

from . import cells as cells
from .adjoints import Implicit as Implicit
from .adjoints import Neumann as Neumann
from .adjoints import OneStep as OneStep
from .adjoints import Phantom as Phantom
from .adjoints import Unrolled as Unrolled
from .convert import fix_dropout as fix_dropout
from .convert import to_equilibrium as to_equilibrium
from .deq import DEQ as DEQ
from .fixed_point import fixed_point as fixed_point
from .held import FixedDropout as FixedDropout
from .inspect import plot as plot
from .inspect.diagnose import diagnose as diagnose
from .inspect.jacobian import jacobian_penalty as jacobian_penalty
from .inspect.jacobian import spectral_radius as spectral_radius
from .inspect.watch import Watch as Watch
from .kernels.dispatch import backend as backend
from .kernels.dispatch import set_backend as set_backend
from .solution import Route as Route
from .solution import Solution as Solution
from .solution import Status as Status
from .solvers import Anderson as Anderson
from .solvers import Broyden as Broyden
from .solvers import ForwardBackward as ForwardBackward
from .solvers import PeacemanRachford as PeacemanRachford
from .solvers import Picard as Picard

__version__ = "0.1.0"
__all__ = [
    "DEQ",
    "Anderson",
    "Broyden",
    "FixedDropout",
    "ForwardBackward",
    "Implicit",
    "Neumann",
    "OneStep",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Route",
    "Solution",
    "Status",
    "Unrolled",
    "Watch",
    "backend",
    "cells",
    "diagnose",
    "fix_dropout",
    "fixed_point",
    "jacobian_penalty",
    "plot",
    "set_backend",
    "spectral_radius",
    "to_equilibrium",
]
