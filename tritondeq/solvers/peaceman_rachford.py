"""Peaceman-Rachford splitting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number
from .splitting import Splitting, SplittingSolver


@dataclass(frozen=True)
class PeacemanRachford(SplittingSolver):
    """w+ = 2 prox(y) - y,  y = C w + 2 alpha V u,  C = 2 V - I,  V = (I + alpha (I - W))^-1;  z = prox(y).

    The solver of monotone DEQs (Winston and Kolter 2020, theorem 2 and appendix A), for cells that define `splitting`,
    such as `cells.Monotone`. Converges for every alpha, also where ||W|| > 1: C contracts, and 2 prox - 1 does not
    expand. V is computed once per solve and serves the gradient as well; a step costs what a plain one does.

    Residual, tol and trace are of w. ||f(z) - z|| is at most (1 / alpha + ||I - W||) / 2 times ||w+ - w||.

    Args:
        alpha: Above 0. The bound on the rate is best at 1 / ||I - W||.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        number("alpha", self.alpha, 0)

    def step_size(self, s: Splitting) -> float:
        return self.alpha

    def affine(self, s: Splitting, u: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
        v = s.resolvent(self.alpha)
        v = v.mT if transpose else v
        return 2 * v - torch.eye(len(v), dtype=v.dtype, device=v.device), 2 * self.alpha * u @ v.mT

    def act(self, image: Tensor, y: Tensor) -> Tensor:
        return 2 * image - y

    def act_name(self, s: Splitting) -> str | None:
        return {"relu": "abs", "tanh": "reflected_tanh" if self.alpha == 1 else None}[s.activation]

    def enter(self, s: Splitting, z: Tensor) -> Tensor:
        """Returns z - alpha (W z + u - z), which is w where z is the solution."""
        return z - self.alpha * (s.linear(z) - z)
