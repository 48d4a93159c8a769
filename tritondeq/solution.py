"""What a solve returns: a value, and the outcome of each sample."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

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
    Status.PLATEAU: "The residual stopped improving above the tolerance: this is the floor of the precision; "
    "raise tol, or compute the cell in a wider dtype.",
    Status.MAX_STEPS: "max_steps evaluations were not enough: raise it or tol, damp the solver, or use Anderson.",
    Status.GROWING: "The norm of the state runs away, so a small relative residual means nothing: the cell has no "
    "fixed point here; give it an outer norm, a decay or a smaller weight.",
    Status.NONFINITE: "The cell returned a value that is not finite; the value returned is the last good one.",
}


@dataclass
class Solution:
    """Result of one solve. Per-sample tensors have the batch shape and stay on the device: reading them syncs.

    Attributes:
        value: The state with the lowest residual, in the structure, shapes and dtypes of z0.
        status: int32, a `Status` each.
        steps: int32, evaluations of f for that sample.
        residual: ||f(z) - z|| / ||f(z)|| of `value` before it is cast to z0's dtype; float32 (float64 in float64).
        trace: Residual of each evaluation, [steps, *batch], or None unless asked for.
        path: What solved it: "one Triton launch", "loop, " and the kernels of its steps, or "loop: " and why.
        adjoint: The last backward solve's Solution (without value), once a backward through `value` has solved one.
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    trace: Tensor | None = None
    path: str = "loop"
    _adjoints: list["Solution"] = field(default_factory=list, repr=False)

    @property
    def converged(self) -> Tensor:
        """Whether each sample reached the tolerance, bool."""
        return self.status == Status.CONVERGED

    @property
    def adjoint(self) -> "Solution | None":
        """The last backward solve's Solution, or None before there is one."""
        return self._adjoints[-1] if self._adjoints else None

    def raise_if_failed(self) -> None:
        """Raises RuntimeError, with numbers and advice, where a sample is MAX_STEPS, GROWING or NONFINITE. Syncs."""
        counts = torch.bincount(self.status.flatten(), minlength=len(Status)).tolist()
        failed = [s for s in (Status.NONFINITE, Status.GROWING, Status.MAX_STEPS) if counts[s]]
        if failed:
            reasons = " ".join(f"{counts[s]} of {sum(counts)} samples {s.name}: {s.sentence}" for s in failed)
            raise RuntimeError(f"the fixed point was not reached. {reasons}")
