"""Forward-backward splitting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number
from .splitting import Splitting, SplittingSolver


@dataclass(frozen=True)
class ForwardBackward(SplittingSolver):
    """z+ = prox_alpha((1 - alpha) z + alpha (W z + u)).

    Needs no inverse, but more steps than `PeacemanRachford` (Winston and Kolter 2020, section 3.3), for cells that
    define `splitting`, such as `cells.Monotone`. Converges for 0 < alpha < 2 m / ||I - W||^2 with m the cell's margin;
    at alpha = 1 it is plain iteration.

    Residual, tol and trace are of this map, whose steps are shorter than f's where alpha is below 1.

    Args:
        alpha: Above 0; None is m / L^2 with L a bound of ||I - W||, read once per solve.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            number("alpha", self.alpha, 0)

    def step_size(self, s: Splitting) -> float:
        return s.margin / s.norm**2 if self.alpha is None else self.alpha

    def affine(self, s: Splitting, u: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
        alpha, w = self.step_size(s), s.w.mT if transpose else s.w
        return torch.lerp(torch.eye(len(w), dtype=w.dtype, device=w.device), w, alpha), alpha * u

    def act(self, image: Tensor, y: Tensor) -> Tensor:
        return image

    def act_name(self, s: Splitting) -> str | None:
        return s.activation if s.activation == "relu" or self.step_size(s) == 1 else None
