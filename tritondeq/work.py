"""What a work of `tune` is: a problem with float64 answers, and the call whose time counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import dispatch, jobs

TOL, MOST = 1e-4, 100  # of the solves
NEVER, ENDLESS = 1e-30, 1 << 30  # a tolerance and a limit that nobody reaches
EVALUATIONS = 11  # of the fused steps that are timed: one fewer than after which a sample may stop
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Work:
    """One op at one shape.

    Attributes:
        shape: What the op asks `launch.parameters` with.
    """

    op: str
    rows: int
    features: int
    dtype: str
    device: torch.device
    shape: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op} {self.rows}x{self.features} {self.dtype}"

    def prepare(self) -> "Problem":
        """Makes the tensors."""
        raise NotImplementedError

    def launches(self, chip: int, config: dict) -> list[dict[str, Any]]:
        """What `offline.run` compiles of a candidate."""
        return jobs.of_candidate(self.op, chip, config, self.dtype, self.shape)


@dataclass(frozen=True)
class Problem:
    """A work with its tensors.

    Attributes:
        run: Runs the op as the library does; what it gives, tensors.
        exact: The same by the reference in float64.
        timed: Makes the call that is timed.
    """

    run: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]
    timed: Callable[[], Callable[[], Any]]


def narrow(cell: str, dtype: str) -> None:
    if dtype == "fp64":
        raise ValueError(f"{cell} in fp64 is torch's")


def ask(op: str, **problem: Any) -> None:
    """Raises where the op would not take the problem, if there is a Triton to ask it."""
    why = dispatch.load(op).refuses(**problem) if dispatch.has_triton() else None
    if why:
        raise ValueError(f"{op}: {why}")


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else tuple(map(double, x))
