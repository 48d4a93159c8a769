"""Plain and damped fixed-point iteration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number
from ..kernels.rules import Rules
from .base import Solver


@dataclass(frozen=True)
class Picard(Solver):
    """z+ = z + damping (f(z) - z): no memory beside the state, one evaluation and one pass a step.

    The right choice for contractive cells. Below 1, `damping` calms a cell whose iterates oscillate; on a cell that
    contracts anyway it only costs steps.

    Args:
        damping: In (0, 2).
    """

    damping: float = 1.0

    fused_steps = "steps.picard"

    def __post_init__(self) -> None:
        number("damping", self.damping, 0, 2)

    def init(self, z: Tensor, mask: Tensor | None) -> None:
        return None

    def step(self, history: None, z: Tensor, y: Tensor, g: Tensor, counted: Tensor, rules: Rules) -> Tensor:
        return y if self.damping == 1 else torch.add(z, g, alpha=self.damping)

    def fused(self) -> dict[str, float]:
        return {"memory": 0, "damping": float(self.damping)}
