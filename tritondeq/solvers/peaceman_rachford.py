"""Peaceman-Rachford splitting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number
from .splitting import Reformulation, Splitting, SplittingSolver


@dataclass(frozen=True)
class PeacemanRachford(SplittingSolver):
    """w+ = 2 prox(y) - y,  y = C w + 2 alpha V u,  C = 2 V - I,  V = (I + alpha (I - W))^-1;  z = prox(y).

    What monotone DEQs are solved with (Winston and Kolter 2020, theorem 2 and appendix A), for cells that name a
    `splitting`, such as `cells.Monotone`. Converges for every alpha, also where ||W|| > 1: C contracts, and 2 prox - 1
    does not expand. V is computed once per solve and serves the gradient as well; a step costs what a plain one does.

    Residual, tol and trace are of w. ||f(z) - z|| is at most (1 / alpha + ||I - W||) / 2 times ||w+ - w||.

    Args:
        alpha: Above 0. The bound on the rate is best at 1 / ||I - W||.

    Raises:
        TypeError, ValueError: `alpha` is not a number above 0.
    """

    alpha: float = 1.0

    def __post_init__(self):
        number("alpha", self.alpha, 0)

    def solve(self, s: Splitting) -> Reformulation:
        alpha, v = self.alpha, s.resolvent(self.alpha)
        return Reformulation(
            matrix=_cayley(v),
            shift=2 * alpha * s.u @ v.mT,
            act=lambda y: 2 * s.prox(y, alpha) - y,
            name=self._name(s),
            enter=lambda z: z - alpha * (s.linear(z) - z),
            leave=lambda y: s.prox(y, alpha),
            narrow=s.narrow,
        )

    def pull(self, s: Splitting, pre: Tensor, g: Tensor, transpose: bool) -> Reformulation:
        alpha, v, slope = self.alpha, s.resolvent(self.alpha), s.slope(pre, self.alpha)
        m, v = (s.w.mT, v.mT) if transpose else (s.w, v)
        return Reformulation(
            matrix=_cayley(v),
            shift=2 * alpha * g @ v.mT,
            act=lambda y: (2 * slope - 1) * y,
            name=self._name(s),
            enter=torch.zeros_like,
            leave=lambda y: torch.addmm(g, slope * y, m.mT),
            pre=pre,
            narrow=s.narrow,
        )

    def _name(self, s: Splitting) -> str | None:
        return {"relu": "abs", "tanh": "reflected_tanh" if self.alpha == 1 else None}[s.activation]


def _cayley(v: Tensor) -> Tensor:
    return 2 * v - torch.eye(len(v), dtype=v.dtype, device=v.device)
