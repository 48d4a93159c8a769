"""What a solve returns: a value, and the outcome of each sample."""

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import rules


class Status(IntEnum):
    """Outcome of one sample; `sentence` explains it."""

    CONVERGED = rules.CONVERGED
    PLATEAU = rules.PLATEAU
    MAX_STEPS = rules.MAX_STEPS
    GROWING = rules.GROWING
    NONFINITE = rules.NONFINITE

    @property
    def sentence(self) -> str:
        """What happened, and what helps."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The residual reached the tolerance.",
    Status.PLATEAU: "The residual stopped improving above the tolerance, for as many evaluations as came before: "
    "raise tol, compute the cell in a wider dtype, or take another solver.",
    Status.MAX_STEPS: "max_steps evaluations were not enough: raise it or tol, damp the solver, or use Anderson.",
    Status.GROWING: "The norm of the state runs away, so a small relative residual means nothing: the cell has no "
    "fixed point here; give it an outer norm, a decay or a smaller weight.",
    Status.NONFINITE: "The cell returned a value that is not finite; the value returned is the last good one.",
}


class Route(Enum):
    """What solves a problem."""

    KERNEL = "one Triton launch does the whole solve"
    FUSED = "Triton kernels take the steps, and the host runs the loop"
    TORCH = "torch operations take the steps, and the host runs the loop"
    GRAPH = "CUDA graphs are replayed"
    UNROLLED = "an explicit net of a fixed number of steps under autograd"


class Outcome(NamedTuple):
    """What a route returns, in the flat layout of the solve: vectors of B samples."""

    value: Tensor  # [B, N]: the state with the lowest residual
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor | None = None
    route: Route = Route.TORCH
    why: str = ""
    last: Tensor | None = None  # residual of the last evaluation, of samples that had stopped before, too
    base: Tensor | None = None  # the least size that residuals are relative to
    states: tuple[Tensor, ...] = ()  # [B, N] each, along the way; `value` itself where the solve had ended before


@dataclass(frozen=True)
class Solution:
    """Result of one solve. Per-sample tensors have the batch shape and stay on the device: reading them syncs.

    Attributes:
        value: The state with the lowest residual, in the structure, shapes and dtypes of z0.
        status: int32, a `Status` each.
        steps: int32, evaluations of f for that sample.
        residual: ||f(z) - z|| of `value`, before it is cast to z0's dtype, relative to ||f(z)|| (see `fixed_point`);
            float32 (float64 in float64).
        trace: Residual of each evaluation, [steps, *batch], or None unless asked for.
        route: What solved it, a `Route`.
        why: Why that route was taken, or with which kernels, in one sentence.
        aux: What f returned beside the state, where `has_aux`; evaluated at `value`, with gradients.
        states: The states along the way that `at` asked for, each with its own gradient.
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor | None = None
    route: Route = Route.TORCH
    why: str = ""
    aux: Any = None
    states: tuple[Any, ...] = ()
    _backward: list["Solution"] = field(default_factory=list, repr=False)

    @property
    def converged(self) -> Tensor:
        """Whether each sample reached the tolerance, bool."""
        return self.status == Status.CONVERGED

    @property
    def adjoint(self) -> "Solution | None":
        """The last backward solve's Solution (without value), once a backward through `value` has solved one."""
        return self._backward[-1] if self._backward else None

    def raise_if_failed(self, what: str = "the fixed point") -> None:
        """Raises RuntimeError, with numbers and advice, where a sample is MAX_STEPS, GROWING or NONFINITE. Syncs."""
        if reasons := failures(self.status):
            raise RuntimeError(f"{what} was not reached. {reasons}")


def failures(status: Tensor, advice: bool = True) -> str:
    """Returns how many samples failed and what helps, or "" where none is MAX_STEPS, GROWING or NONFINITE. Syncs."""
    counts = torch.bincount(status.flatten(), minlength=len(Status)).tolist()
    failed = [s for s in (Status.NONFINITE, Status.GROWING, Status.MAX_STEPS) if counts[s]]
    texts = [f"{counts[s]} of {sum(counts)} samples {s.name}" for s in failed]
    return (
        " ".join(f"{text}: {s.sentence}" for s, text in zip(failed, texts, strict=True)) if advice else ", ".join(texts)
    )
