"""The one loop: every solver, every cell, forward and backward."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .kernels.rules import Rules
from .solution import Solution
from .solvers import Solver

READ_EVERY = 4  # steps between two looks, one look late, at whether any sample is still active on a GPU


@dataclass(frozen=True)
class Settings:
    """What one solve is told, beside the map and where to start."""

    solver: Solver
    tol: float
    max_steps: int
    keep: Tensor | None  # mask [B, N]
    group: Any


def iterate(
    f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings, trace: bool = False
) -> tuple[Tensor, Solution]:
    """The loop. Returns the iterate [B, N] with the lowest residual, and a Solution without it."""
    solver, keep = settings.solver, settings.keep
    rules = Rules(z.shape[0], z.dtype, z.device, settings.tol)
    look = _Look(z.device, settings.group)
    residuals, best, batch = [], z, z.shape[0]
    f, outside = _keep_autocast(f, z.device.type)
    with outside:
        memory = solver.init(z, keep)
        for k in range(1, settings.max_steps + 1):
            y = f(z)
            g = y - z
            seen = g if keep is None else torch.where(keep, g, 0.0)
            r = torch.linalg.vector_norm(seen, dim=1)
            s = torch.linalg.vector_norm(y if keep is None else torch.where(keep, y, 0.0), dim=1)
            rel, improved = rules.update(k, r, s)
            best = z if rules.all_improved else torch.where(improved.unsqueeze(1), z, best)
            if trace:
                residuals.append(rel)
            left = look(rules.active)
            if k == settings.max_steps or left == 0:
                break
            onward = solver.step(memory, z, y, g, seen, rules)
            if left == batch:
                z = onward.clone() if onward is y else onward  # f may reuse the memory of y
            else:
                z = torch.where(rules.active.unsqueeze(1), onward, z)
    solution = Solution(None, rules.status(), rules.steps, rules.best)
    solution.trace = torch.stack(residuals) if trace else None
    return best, solution


class _Look:
    """How many samples are active, or None where that is not known. On a GPU the answer is only ever None or 0, and
    READ_EVERY steps old, so that nobody waits for it."""

    def __init__(self, device: torch.device, group: Any):
        self.group, self.cuda, self.steps = group, device.type == "cuda", 0
        if self.cuda:
            self.flag = torch.ones((), dtype=torch.int64, pin_memory=True)
            self.copied: torch.cuda.Event | None = None

    def __call__(self, active: Tensor) -> int | None:
        self.steps += 1
        if self.cuda and self.steps % READ_EVERY:
            return None
        left = active.count_nonzero()
        if self.group is not None:
            torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX, group=self.group)
        if not self.cuda:
            return int(left) if self.group is None or left == 0 else None
        if self.copied is None:
            self.copied = torch.cuda.Event()
        else:
            self.copied.synchronize()
            if not self.flag.item():
                return 0
        self.flag.copy_(left, non_blocking=True)
        self.copied.record()
        return None


def _keep_autocast(f, kind: str):
    """(f under today's autocast, a context without it): autocast rules the cell, never the solver."""
    if not torch.is_autocast_enabled(kind):
        return f, contextlib.nullcontext()
    dtype, caches = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()

    def cell(z: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype, cache_enabled=caches):
            return f(z)

    return cell, _no_autocast(kind)


@contextlib.contextmanager
def _no_autocast(kind: str):
    with torch.autocast(kind, enabled=False):
        yield
    torch.clear_autocast_cache()  # casts made under no_grad would cut the gradient of whoever finds them
