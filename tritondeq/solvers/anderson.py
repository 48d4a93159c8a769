"""Anderson acceleration, per sample, in differences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import boolean, integer, number
from ..kernels.rules import Rules
from .base import Solver


@dataclass
class _History:
    """The last m differences of residuals and of plain steps, and what the next difference is taken from."""

    residuals: Tensor  # [B, 1 + m, N]: the newest residual itself, then m differences
    steps: Tensor  # [B, m, N]
    ridge: Tensor  # [1 + m, 1 + m]: 1, and 1 + ridge on the diagonal
    tiny: Tensor  # [1 + m, 1 + m]: on the diagonal: a difference of zero, or none yet, gets a weight of zero
    rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of residuals and steps, views [B, N]: taken once
    z: Tensor | None = None  # the iterate before, and not f(z): f may write its next output over it
    taken: int = 0


@dataclass(frozen=True)
class Anderson(Solver):
    """z+ = h - sum_j gamma_j dh_j,  gamma = argmin |g - sum_j gamma_j dg_j|^2,  h = z + damping g,  g = f(z) - z.

    dh_j and dg_j are the last `memory` differences between successive h and g of the same sample (type II; Walker and
    Ni 2011, eq. 2.4; Anderson 1965). Worth its 2 memory + 4 states of memory, 2 memory + 7 in torch, where plain
    iteration needs more than about 15 steps (spectral radius above 0.9), or where the cell is expensive.

    The ridge is relative to each diagonal element of the normal equations, so that the path does not change when the
    problem is scaled, and small recent differences count as much as old large ones. A sample whose small system has
    no finite solution, or whose residual is above a hundred times its best, takes a plain step.

    Args:
        memory: Number of differences, at least 1; the whole-solve kernels take up to 4.
        damping: In (0, 2).
        ridge: Relative to the squared norm of each difference; at least a few ulps, its rounding error.
        half: Whether differences of residuals, which only make the weights, are stored in bfloat16. On a GPU that saves
            memory / 2 - 1 states of memory, and memory / 2 of traffic; elsewhere it only rounds.
    """

    memory: int = 4
    damping: float = 1.0
    ridge: float = 1e-8
    half: bool = False

    fused_steps = "steps.anderson"

    def __post_init__(self) -> None:
        integer("memory", self.memory)
        number("damping", self.damping, 0, 2)
        number("ridge", self.ridge, 0, closed=True)
        boolean("half", self.half)

    def init(self, z: Tensor, mask: Tensor | None) -> _History:
        (batch, width), m = z.shape, self.memory
        residuals, steps = z.new_zeros(batch, m + 1, width), z.new_zeros(batch, m, width)
        eye = torch.eye(m + 1, dtype=z.dtype, device=z.device)
        return _History(
            residuals=residuals,
            steps=steps,
            ridge=1 + max(self.ridge, 4 * torch.finfo(z.dtype).eps) * eye,
            tiny=torch.finfo(z.dtype).tiny * eye,
            rows=(residuals.unbind(1), steps.unbind(1)),
        )

    def step(self, history: _History, z: Tensor, y: Tensor, g: Tensor, counted: Tensor, rules: Rules) -> Tensor:
        h = y if self.damping == 1 else torch.add(z, g, alpha=self.damping)
        (newest, *residuals), steps = history.rows
        before, history.z = history.z, z
        if before is None:
            newest.copy_(counted)
            return h
        slot = history.taken % self.memory
        history.taken += 1
        change = torch.sub(counted, newest, out=residuals[slot])
        torch.sub(z, before, out=steps[slot]).add_(change, alpha=self.damping)
        if self.half:
            change.copy_(change.bfloat16())
        newest.copy_(counted)
        gamma = self._mixing(history, rules)
        return torch.baddbmm(h.unsqueeze(1), gamma.unsqueeze(1), history.steps, alpha=-1).squeeze(1)

    def _mixing(self, history: _History, rules: Rules) -> Tensor:
        """Returns gamma [B, m]: zero in slots not filled yet, and in samples that are unsafe or have no finite one."""
        gram = torch.bmm(history.residuals, history.residuals.mT)
        system = torch.addcmul(history.tiny, gram, history.ridge)
        gamma, _ = torch.linalg.solve_ex(system[:, 1:, 1:], system[:, 1:, :1])  # of a vector it would return columns
        gamma = gamma.squeeze(2)
        if not rules.all_improved:
            gamma.mul_(rules.safe().unsqueeze(1))
        return gamma.nan_to_num_(0.0, 0.0, 0.0)

    def fused(self) -> dict[str, float]:
        return {"memory": self.memory, "damping": float(self.damping), "ridge": float(self.ridge)}
