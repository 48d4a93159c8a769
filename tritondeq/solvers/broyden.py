"""Broyden's method with a bounded number of updates, per sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import integer
from ..kernels.rules import Rules
from .base import Solver


@dataclass
class _History:
    """The inverse Jacobian of g as -I + sum_j u_j v_j', and the evaluation before."""

    u: Tensor  # [B, m, N]
    v: Tensor  # [B, m, N]
    mask: Tensor | None
    z: Tensor | None = None
    g: Tensor | None = None
    taken: int = 0


@dataclass(frozen=True)
class Broyden(Solver):
    """z+ = z - H g,  H+ = H + (dz - H dg) (dz' H) / (dz' H dg),  H_0 = -I,  g = f(z) - z.

    Good Broyden (Broyden 1965, eq. 4.5; as in Bai et al. 2019, but bounded): only the last `memory` updates are used,
    so it costs 2 memory + 4 states of memory, 2 memory + 12 in torch, however long the solve is. Reaches fixed points
    that repel plain iteration; there is no other reason to prefer it to Anderson. A sample whose residual is above a
    hundred times its best takes a plain step.

    Args:
        memory: Number of updates, at least 1.
    """

    memory: int = 10

    fused_steps = "steps.broyden"

    def __post_init__(self) -> None:
        integer("memory", self.memory)

    def init(self, z: Tensor, mask: Tensor | None) -> _History:
        ring = (z.shape[0], self.memory, z.shape[1])
        return _History(z.new_zeros(ring), z.new_zeros(ring), mask)

    def step(self, history: _History, z: Tensor, y: Tensor, g: Tensor, counted: Tensor, rules: Rules) -> Tensor:
        if history.z is not None and history.g is not None:
            self._update(history, z - history.z, counted - history.g, rules.active.unsqueeze(1))
        history.z, history.g = z, counted
        along = _dots(history.v, counted)
        if not rules.all_improved:
            along = torch.where(rules.safe().unsqueeze(1), along, 0.0)
        return y - _mix(along, history.u)

    def estimate(self, history: _History) -> tuple[Tensor, Tensor]:
        return history.u, history.v

    def resume(self, history: _History, estimate: tuple[Tensor, Tensor]) -> None:
        u, v = estimate
        history.u.copy_(v)
        history.v.copy_(u)

    def _update(self, history: _History, dz: Tensor, dg: Tensor, active: Tensor) -> None:
        if history.mask is not None:
            dz = torch.where(history.mask, dz, 0.0)
        u, v = history.u, history.v
        slot = history.taken % self.memory
        history.taken += 1
        old_u, old_v = u[:, slot].clone(), v[:, slot].clone()  # those of samples that have stopped stay
        u[:, slot] = 0  # the oldest update leaves H before the newest is made from it
        along_u, along_v = _dots(u, dz), _dots(v, dg)
        left, right = _mix(along_u, v) - dz, _mix(along_v, u) - dg
        products = along_u * along_v
        den = products.sum(1) - torch.linalg.vecdot(dz, dg)  # <left, dg>
        size = products.abs().sum(1) + torch.linalg.vector_norm(dz, dim=1) * torch.linalg.vector_norm(dg, dim=1)
        fine = ((den.abs() > torch.finfo(dz.dtype).eps * size) & den.isfinite()).unsqueeze(1)
        u[:, slot] = torch.where(active, torch.where(fine, (dz - right) / den.unsqueeze(1), 0.0), old_u)
        v[:, slot] = torch.where(active, torch.where(fine, left, 0.0), old_v)


def _dots(ring: Tensor, x: Tensor) -> Tensor:  # [B, m] of [B, m, N] and [B, N]
    return torch.bmm(ring, x.unsqueeze(2)).squeeze(2)


def _mix(c: Tensor, ring: Tensor) -> Tensor:  # [B, N] of [B, m] and [B, m, N]
    return torch.bmm(c.unsqueeze(1), ring).squeeze(1)
