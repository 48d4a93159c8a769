"""What the fused steps of every solver keep on the device: iterates, statistics and flags of each sample."""

import math

import torch
import triton
from torch import Tensor

from .. import launch
from ..dispatch import interpreting
from ..rules import FLOOR, FLOOR_FP64, Rules
from ..tails import Tail
from .tl_steps import ACTIVE, BAR, BEST, MARK, PHASE, REL, STEPS, finish_kernel


class Samples:
    """What is known of each of B samples, on the device: statistics, flags and how many go on.

    Attributes:
        period: Evaluations after which all buffers are in the same places again.
    """

    period = 1

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, tol: float):
        self.tol = tol
        self.stats = torch.empty(8, batch, dtype=dtype, device=device)
        self.flags = torch.empty(5, batch, dtype=torch.int32, device=device)
        self.count = torch.empty((), dtype=torch.int32, device=device)
        self.rules = Rules(batch, dtype, device, tol)
        names = ("best", "bar", "first", "peak", "mark", "r", "s", "rel")  # as tl_steps.py numbers them
        for name, row in zip(names, self.stats, strict=True):
            setattr(self.rules, name, row)
        self.rel = self.stats[int(REL)]

    def forget(self) -> None:
        """Nothing is known, and all are active."""
        self.stats.zero_()
        self.stats[int(BEST)].fill_(math.inf)
        self.stats[int(MARK)].fill_(math.inf)
        self.stats[int(BAR)].fill_(self.tol)
        self.flags.zero_()
        self.flags[int(PHASE)].fill_(int(ACTIVE))
        self.count.fill_(self.flags.shape[1])

    def left(self) -> Tensor:
        """Samples that go on, a scalar tensor of the caller's own."""
        return self.count.clone()

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """(status, steps, residual), each [B]."""
        return self.rules.status(), self.flags[int(STEPS)], self.stats[int(BEST)]

    def estimate(self) -> tuple[Tensor, Tensor] | None:
        """As the solver's."""
        return None

    def resume(self, estimate: tuple[Tensor, Tensor]) -> None:
        """As the solver's."""
        raise NotImplementedError(f"{type(self).__name__} make no estimate")


class Steps(Samples):
    """The steps of one solve.

    `take` launches what follows an evaluation and `onward` hands out the next iterate. As many iterates rotate as the
    `period` has evaluations, 2 or 3: what `onward` returned is overwritten by the last `take` of such a turn.

    Args:
        z: Start, [B, N] in float32 or float64; only read.
        keep: Elements that count in norms and inner products, [B, N] bool, or None.
        tol: Relative residual at which a sample has converged.
        limit: Evaluations of a sample at most.
        tail: What f leaves to these kernels; it `fits`.
        numbers: What the kernels want of the solver's options, in the dtype of the state.
        parts: Sums that the programs of a sample hand over.
    """

    def __init__(self, op: str, z: Tensor, keep: Tensor | None, tol: float, limit: int, tail: Tail, numbers, parts):
        batch, width = z.shape
        super().__init__(batch, z.dtype, z.device, tol)
        self.limit = limit
        self.z, self.next, self.best = (z.new_empty(z.shape) for _ in range(3))
        self.prev = z.new_empty(z.shape) if self.period == 3 else self.best
        self.keep = self.z if keep is None else keep.to(torch.uint8)
        self.numbers = z.new_empty(len(numbers))
        for i, number in enumerate(numbers):
            self.numbers[i].fill_(number)
        shape = {"width": width, "itemsize": z.element_size(), "features": tail.features}
        config = launch.parameters(op, z.device, **shape)
        self.grid = (batch * config["SPLITS"],)
        self.config = config | {
            "HAS_KEEP": keep is not None,
            "TAIL": (tail.act, tail.scaled, tail.mix != 1, launch.power_of_two(tail.features) if tail.features else 0),
            "INTERP": interpreting(),
            "BLOCK_S": triton.next_power_of_2(config["SPLITS"]),
            "FLOOR": FLOOR_FP64 if z.dtype == torch.float64 else FLOOR,
        }
        self.part = z.new_empty(batch, parts, config["SPLITS"])
        vectors = *tail.gains, tail.weight
        self.vectors = tuple(z if v is None else v.detach() for v in vectors)  # z: a pointer that nobody reads
        self.shape = batch, width, tail.features, tail.eps, tail.mix
        self.reset(z)

    def reset(self, z: Tensor) -> None:
        """Begins a solve at `z`, in the same memory."""
        self.z.copy_(z)
        self.best.copy_(z)
        self.forget()

    def take(self, *parts: Tensor) -> None:
        """Launches the step after y = f(z), which the tail makes of these, each [B, N]."""
        raise NotImplementedError

    def onward(self, left: int | None = None) -> Tensor:
        """The next iterate, [B, N]."""
        if self.period == 3:
            self.z, self.prev, self.next = self.next, self.z, self.prev
        else:
            self.z, self.next = self.next, self.z
        return self.z

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(best iterate [B, N], status, steps, residual, each [B]) after the last `take`."""
        config = {"SPLITS": self.config["SPLITS"], "BLOCK_N": self.config["BLOCK_N"]}
        config["num_warps"] = self.config["num_warps"]
        with launch.on(self.best.device):
            finish_kernel[self.grid](self.z, self.prev, self.best, self.flags, *self.best.shape, **config)
        return self.best, *self.outcome()


def contiguous(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in parts)


def refuses(*, width: int, dtype: torch.dtype, memory: int = 0) -> str | None:
    """Why torch must take these steps, or None."""
    return None if width else "an empty state"
