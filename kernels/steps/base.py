"""What the fused steps of every solver hold on the device: iterates, statistics and flags of each sample."""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import bound, devices, launch
from ..dispatch import interpreting
from ..rules import EPS
from ..tails import Tail
from .tl_ends import begin_kernel, finish_kernel
from .tl_steps import BASE, BEST, REL, STEPS


class Samples:
    """The statistics and flags of B samples on the device, which kernels write and the loop reads.

    Attributes:
        period: Evaluations after which all buffers are in the same places again.
        stats, flags: As tl_steps.py numbers their rows, [10, B] and [5, B] int32.
        count: How many samples go on, int32 scalar.
        status: Outcomes, [B] int32, once the solve is finished.
        rel, last: Residual of the last evaluation, [B], a row of `stats`, as is `base`, the least size.
    """

    period = 1

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, scale: float = 0.0):
        self.scale, self.device = max(scale, EPS), device
        self.stats = torch.empty(10, batch, dtype=dtype, device=device)
        self.flags = torch.empty(5, batch, dtype=torch.int32, device=device)
        self.count = torch.empty((), dtype=torch.int32, device=device)
        self.status = torch.empty(batch, dtype=torch.int32, device=device)
        self.rel, self.base = self.stats[int(REL)], self.stats[int(BASE)]
        self.last = self.rel
        self._compiled: dict[Any, tuple[Any, list[Any], list[tuple[int, str]]]] = {}

    def left(self) -> Tensor:
        """Returns how many samples go on, a scalar tensor that the next launch changes."""
        return self.count

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (status, steps, residual), each [B], of a solve that is finished."""
        return self.status, self.flags[int(STEPS)], self.stats[int(BEST)]

    def launch_kernel(self, kernel, grid: tuple[int, ...], **known: Any) -> tuple[Any, list[Any]]:
        """Launches a kernel whose arguments are constants among `known`, or attributes: `z_ptr` is `self.z`.

        Returns:
            The compiled kernel, or None in the interpreter; and the arguments, in the kernel's order.
        """
        given = {name: known[name] if name in known else getattr(self, name[:-4]) for name in kernel.arg_names}
        options = {name: known[name] for name in ("num_warps", "num_stages") if name in known}
        return bound.launch(kernel, grid, self.device, **given, **options, enable_fp_fusion=True)

    def launch_again(self, kind: Any, kernel, grid: tuple[int, ...], turning: dict[str, Any], **known: Any) -> None:
        """Launches a kernel as `launch_kernel` does, of which only the arguments in `turning` change during a solve.

        What was compiled for the same `kind` of arguments is launched as it is: Triton's look at every argument would
        cost several times what a launch does.
        """
        if kind not in self._compiled:
            compiled, given = self.launch_kernel(kernel, grid, **known, **turning)
            if compiled is not None:
                places = [(kernel.arg_names.index(name), name) for name in turning]
                self._compiled[kind] = compiled[(*grid, 1, 1)], given, places
            return
        launch_compiled, given, places = self._compiled[kind]
        for at, name in places:
            given[at] = turning[name]
        with devices.on(self.device):
            launch_compiled(*given)

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
        relative, scale: What the residual is relative to: see rules.py.
        flags: More constants of the kernel.
    """

    kernel: triton.JITFunction
    apart = False

    def __init__(
        self, op: str, z: Tensor, mask: Tensor | None, tol: float, limit: int, tail: Tail,
        numbers: tuple[float, ...], parts: int, memory: int = 0, relative: float = 1.0, scale: float = 0.0, **flags,
    ):  # fmt: skip
        batch, width = z.shape
        super().__init__(batch, z.dtype, z.device, scale)
        self.z, self.next, self.best = (z.new_empty(z.shape) for _ in range(3))
        self.prev = z.new_empty(z.shape) if self.period == 3 else self.best
        self.mask = self.z if mask is None else mask.to(torch.uint8)
        given = (*map(float, numbers), float(tol), float(self.scale))
        self.numbers, exact = z.new_empty(len(given)), z.dtype == torch.float64
        for i in range(len(given) if exact else 0):  # a launch takes float32
            self.numbers[i].fill_(given[i])
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
        self.known["BLOCK_S"] = launch.power_of_two(config["SPLITS"])
        self.known |= {"relative": float(relative), "numbers": given, "EXACT": exact, "TOL": len(numbers)}
        self._turning = [name for name in ("z_ptr", "next_ptr", "prev_ptr") if name in self.kernel.arg_names]
        self.reset(z)

    def reset(self, z: Tensor) -> None:
        """Begins a solve at `z`, in the same memory."""
        self.launch_kernel(begin_kernel, self.grid, **self.known, start_ptr=z.contiguous())

    def take(self, *parts: Tensor) -> None:
        """Launches the step after y = f(z), which the tail makes of these, each [B, N]."""
        y = tuple(part.contiguous() for part in parts)
        turning = {name: getattr(self, name[:-4]) for name in self._turning} | {"y_ptrs": y}
        kind = bound.kind(y)
        for i, stage in enumerate(self.stages):
            self.launch_again((i, kind), self.kernel, self.grid, turning, **self.known, **stage)

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
