"""What the fused steps of every solver hold on the device: iterates, statistics and flags of each sample."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import devices, launch
from ..dispatch import interpreting
from ..rules import FLOOR, FLOOR_FP64, Rules
from ..tails import Tail
from .tl_steps import ACTIVE, BAR, BEST, MARK, PHASE, REL, STEPS, finish_kernel


class Samples:
    """The statistics and flags of B samples on the device, which kernels write and the loop reads.

    Attributes:
        period: Evaluations after which all buffers are in the same places again.
        stats, flags: As tl_steps.py numbers their rows, [8, B] and [5, B] int32.
        count: How many samples go on, int32 scalar.
        rules: The rules' fields, which are rows of `stats`.
        rel: Residual of the last evaluation, [B].
    """

    period = 1

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, tol: float):
        self.tol = tol
        self.stats = torch.empty(8, batch, dtype=dtype, device=device)
        self.flags = torch.empty(5, batch, dtype=torch.int32, device=device)
        self.count = torch.empty((), dtype=torch.int32, device=device)
        self.rules = rules = Rules(batch, dtype, device, tol)
        rules.best, rules.bar, rules.first, rules.peak, rules.mark, rules.r, rules.s, rules.rel = self.stats
        self.rel = self.stats[int(REL)]

    def forget(self) -> None:
        """Makes all samples active, as before the first evaluation."""
        self.stats.zero_()
        self.stats[int(BEST)].fill_(math.inf)
        self.stats[int(MARK)].fill_(math.inf)
        self.stats[int(BAR)].fill_(self.tol)
        self.flags.zero_()
        self.flags[int(PHASE)].fill_(int(ACTIVE))
        self.count.fill_(self.flags.shape[1])

    def left(self) -> Tensor:
        """Returns how many samples go on, a scalar tensor that no launch changes."""
        return self.count.clone()

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (status, steps, residual), each [B]."""
        return self.rules.status(), self.flags[int(STEPS)], self.stats[int(BEST)]

    def launch_kernel(self, kernel, grid: tuple[int, ...], **known: Any) -> None:
        """Launches a kernel whose arguments are constants among `known`, or attributes: `z_ptr` is `self.z`."""
        given = {name: known[name] if name in known else getattr(self, name[:-4]) for name in kernel.arg_names}
        options = {name: known[name] for name in ("num_warps", "num_stages") if name in known}
        with devices.on(self.count.device):
            kernel[grid](**given, **options, enable_fp_fusion=True)

    def estimate(self) -> tuple[Tensor, Tensor] | None:
        """Returns the estimate of the inverse Jacobian as the solver has it, or None."""
        return None

    def resume(self, estimate: tuple[Tensor, Tensor]) -> None:
        """Begins with the transpose of an estimate that `estimate` returned."""
        raise NotImplementedError(f"{type(self).__name__} make no estimate")


class Steps(Samples):
    """The steps of one solve.

    `take` launches what follows an evaluation and `onward` hands out the next iterate. As many iterates rotate as the
    `period` has evaluations, 2 or 3: what `onward` returned is overwritten by the last `take` of such a turn.

    A subclass has the `kernel`, whose launch may do all of a step or, if `apart`, MEASURE or MIX.

    Args:
        op: Name of the op, by which launch parameters are found.
        z: Start, [B, N] in float32 or float64; only read.
        mask: Elements that count in norms and inner products, [B, N] bool, or None.
        tol, limit: Residual at which a sample has converged, and evaluations of one at most.
        tail: What f leaves to these kernels; it `fits`.
        numbers: The solver's options that kernels read.
        parts: Sums that the programs of a sample hand over.
        memory: Differences or updates that the solver stores, M of its kernels; 0 if none.
        flags: More constants of the kernel.
    """

    kernel: triton.JITFunction
    apart = False

    def __init__(
        self, op: str, z: Tensor, mask: Tensor | None, tol: float, limit: int, tail: Tail,
        numbers: tuple[float, ...], parts: int, memory: int = 0, **flags,
    ):  # fmt: skip
        batch, width = z.shape
        super().__init__(batch, z.dtype, z.device, tol)
        self.z, self.next, self.best = (z.new_empty(z.shape) for _ in range(3))
        self.prev = z.new_empty(z.shape) if self.period == 3 else self.best
        self.mask = self.z if mask is None else mask.to(torch.uint8)
        self.numbers = z.new_empty(len(numbers))
        for i, number in enumerate(numbers):
            self.numbers[i].fill_(number)
        shape = {"width": width, "itemsize": z.element_size(), "features": tail.features}
        config = launch.parameters(op, z.device, **shape)
        self.grid = (batch * config["SPLITS"],)
        self.part = z.new_empty(batch, parts, config["SPLITS"])
        self.stages = [{"MEASURE": True, "MIX": True}]
        if self.apart and not launch.one_launch(op, config, itemsize=z.element_size(), memory=memory):
            self.stages = [{"MEASURE": True, "MIX": False}, {"MEASURE": False, "MIX": True}]
        row = launch.power_of_two(tail.features) if tail.features else 0
        self.known = flags | config | {"B": batch, "N": width, "M": memory, "limit": limit, "INTERP": interpreting()}
        self.known |= {"D": tail.features, "eps": tail.eps, "mix": tail.mix, "HAS_MASK": mask is not None}
        self.known |= {"TAIL": (tail.act, tail.scaled, tail.mix != 1, row)}
        # z stands for a vector that no kernel reads
        self.known["v_ptrs"] = tuple(z if v is None else v.detach() for v in (*tail.gains, tail.weight))
        self.known["BLOCK_S"] = triton.next_power_of_2(config["SPLITS"])
        self.known["FLOOR"] = FLOOR_FP64 if z.dtype == torch.float64 else FLOOR
        self.reset(z)

    def reset(self, z: Tensor) -> None:
        """Begins a solve at `z`, in the same memory."""
        self.z.copy_(z)
        self.best.copy_(z)
        self.forget()

    def take(self, *parts: Tensor) -> None:
        """Launches the step after y = f(z), which the tail makes of these, each [B, N]."""
        y = tuple(part.contiguous() for part in parts)
        for stage in self.stages:
            self.launch_kernel(self.kernel, self.grid, **self.known, **stage, y_ptrs=y)

    def onward(self, left: int | None = None) -> Tensor:
        """Returns the next iterate, [B, N]."""
        if self.period == 3:
            self.z, self.prev, self.next = self.next, self.z, self.prev
        else:
            self.z, self.next = self.next, self.z
        return self.z

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (best iterate [B, N], status, steps, residual, each [B]) after the last `take`."""
        self.launch_kernel(finish_kernel, self.grid, **self.known)
        return self.best, *self.outcome()


def refuses(*, width: int, dtype: torch.dtype, memory: int = 0) -> str | None:
    """Returns why torch must take these steps, or None."""
    return None if width else "an empty state"
