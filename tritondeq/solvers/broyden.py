"""Broyden's method with a bounded number of updates, per sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import integer
from .base import Solver


@dataclass
class _Updates:
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

    Good Broyden (Broyden 1965, eq. 4.5; as in Bai et al. 2019, but bounded): only the last `memory` updates are kept,
    so it costs 2 memory + 3 states of memory, 2 memory + 5 in torch, however long the solve is. Reaches fixed points
    that repel plain iteration; there is no other reason to prefer it to Anderson. A sample whose residual is above a
    hundred times its best takes a plain step.

    Args:
        memory: Updates kept, at least 1.

    Raises:
        TypeError, ValueError: `memory` is not an integer of at least 1.
    """

    memory: int = 10

    fused_steps = "steps.broyden"

    def __post_init__(self):
        integer("memory", self.memory)

    def init(self, z: Tensor, mask) -> _Updates:
        ring = (z.shape[0], self.memory, z.shape[1])
        return _Updates(z.new_zeros(ring), z.new_zeros(ring), mask)

    def step(self, memory: _Updates, z: Tensor, y: Tensor, g: Tensor, seen: Tensor, rules) -> Tensor:
        u, v = memory.u, memory.v
        if memory.g is not None:
            self._update(memory, z - memory.z, seen - memory.g, rules.active.unsqueeze(1))
        memory.z, memory.g = z, seen
        along = _dots(v, seen)
        if not rules.all_improved:
            along = torch.where(rules.safe().unsqueeze(1), along, 0.0)
        return y - _mix(along, u)

    def estimate(self, memory: _Updates) -> tuple[Tensor, Tensor]:
        return memory.u, memory.v

    def resume(self, memory: _Updates, estimate: tuple[Tensor, Tensor]) -> None:
        u, v = estimate
        memory.u.copy_(v)
        memory.v.copy_(u)

    def _update(self, memory: _Updates, dz: Tensor, dg: Tensor, active: Tensor) -> None:
        if memory.mask is not None:
            dz = torch.where(memory.mask, dz, 0.0)
        u, v = memory.u, memory.v
        slot = memory.taken % self.memory
        memory.taken += 1
        old_u, old_v = u[:, slot].clone(), v[:, slot].clone()  # a frozen sample keeps them
        u[:, slot] = 0  # the oldest update leaves H before the newest is made from it
        along_u, along_v = _dots(u, dz), _dots(v, dg)
        left, right = _mix(along_u, v) - dz, _mix(along_v, u) - dg
        products = along_u * along_v
        den = products.sum(1) - torch.linalg.vecdot(dz, dg)  # <left, dg>
        size = products.abs().sum(1) + torch.linalg.vector_norm(dz, dim=1) * torch.linalg.vector_norm(dg, dim=1)
        fine = (den.abs() > torch.finfo(dz.dtype).eps * size) & den.isfinite()
        fine = fine.unsqueeze(1)
        u[:, slot] = torch.where(active, torch.where(fine, (dz - right) / den.unsqueeze(1), 0.0), old_u)
        v[:, slot] = torch.where(active, torch.where(fine, left, 0.0), old_v)


def _dots(ring: Tensor, x: Tensor) -> Tensor:
    """Inner products [B, m] of each row of `ring` [B, m, N] with `x` [B, N]."""
    return torch.bmm(ring, x.unsqueeze(2)).squeeze(2)


def _mix(c: Tensor, ring: Tensor) -> Tensor:
    """Sums [B, N] of the rows of `ring` [B, m, N], weighted by `c` [B, m]."""
    return torch.bmm(c.unsqueeze(1), ring).squeeze(1)
