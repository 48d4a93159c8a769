"""Forward-backward splitting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number
from .splitting import Reformulation, Splitting, SplittingSolver


@dataclass(frozen=True)
class ForwardBackward(SplittingSolver):
    """z+ = prox_alpha((1 - alpha) z + alpha (W z + u)).

    Needs no inverse, but more steps than `PeacemanRachford` (Winston and Kolter 2020, section 3.3), for cells that name
    a `splitting`, such as `cells.Monotone`. Converges for 0 < alpha < 2 m / ||I - W||^2 with m the cell's margin; at
    alpha = 1 it is plain iteration.

    Residual, tol and trace are of this map, whose steps are shorter than f's where alpha is below 1.

    Args:
        alpha: Above 0; None is m / L^2 with L a bound of ||I - W||, read once per solve.

    Raises:
        TypeError, ValueError: `alpha` is not a number above 0.
    """

    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is not None:
            number("alpha", self.alpha, 0)

    def solve(self, s: Splitting) -> Reformulation:
        alpha = self._alpha(s)
        return Reformulation(
            matrix=_relaxed(s.w, alpha),
            shift=alpha * s.u,
            act=lambda y: s.prox(y, alpha),
            name=self._name(s, alpha),
            enter=lambda z: z,
            leave=lambda y: s.prox(y, alpha),
            narrow=s.narrow,
        )

    def pull(self, s: Splitting, pre: Tensor, g: Tensor, transpose: bool) -> Reformulation:
        alpha = self._alpha(s)
        slope, m = s.slope(pre, alpha), s.w.mT if transpose else s.w
        return Reformulation(
            matrix=_relaxed(m, alpha),
            shift=alpha * g,
            act=lambda y: slope * y,
            name=self._name(s, alpha),
            enter=torch.zeros_like,
            leave=lambda y: torch.addmm(g, slope * y, m.mT),
            pre=pre,
            narrow=s.narrow,
        )

    def _alpha(self, s: Splitting) -> float:
        return s.margin / s.norm**2 if self.alpha is None else self.alpha

    def _name(self, s: Splitting, alpha: float) -> str | None:
        return s.activation if s.activation == "relu" or alpha == 1 else None


def _relaxed(m: Tensor, alpha: float) -> Tensor:
    return torch.lerp(torch.eye(len(m), dtype=m.dtype, device=m.device), m, alpha)
