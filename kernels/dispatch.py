"""The one place that picks Triton or torch.

An op is a file of a folder below this one whose last statement registers it. It is imported the first time it is asked
for, so that importing the library needs no Triton. `pick` returns the op, or the reason why torch does the work.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import devices

BACKENDS = ("auto", "triton", "torch")
LEAST = (3, 4)  # Triton's version; older ones lack what the kernels, or their tests, need
_default = "auto"
_scoped: ContextVar[str | None] = ContextVar("tritondeq_backend", default=None)


@dataclass(frozen=True)
class Op:
    """A solve of a cell in one launch.

    `solve` solves z = f(z) for rows, and `adjoint` u = J' u + g; both return what `rows.skeleton.Rows.solve` does.
    `solve_ref` and `adjoint_ref` do the same in torch, for any device and floating dtype.

    Every kind of op has `refuses`, which takes keyword arguments that describe the problem and returns why the op can't
    take it, or None; and `label`, what the op does, for `Solution.why` and `doctor`.
    """

    solve: Callable
    adjoint: Callable
    solve_ref: Callable
    adjoint_ref: Callable
    refuses: Callable[..., str | None]
    label: str = "one Triton launch"


@dataclass(frozen=True)
class StepsOp:
    """A solver's steps for any cell: `start(z, mask, tol, limit, tail, **options)` returns a `steps.base.Steps`.

    The options are the solver's, and `relative` and `scale`.
    """

    start: Callable
    refuses: Callable[..., str | None]
    label: str


@dataclass(frozen=True)
class RowOp:
    """A part of a cell that maps rows or groups one by one, without gradients: `run` by Triton, `ref` by torch."""

    run: Callable
    ref: Callable
    refuses: Callable[..., str | None]
    label: str = "one Triton launch"


@dataclass(frozen=True)
class CellOp:
    """A solve by steps that evaluate the cell: as of an Op, but each returns a `steps.base.Samples` for the loop."""

    solve: Callable
    adjoint: Callable
    refuses: Callable[..., str | None]
    label: str


AnyOp = Op | StepsOp | RowOp | CellOp
_ops: dict[str, AnyOp] = {}


def register(name: str, op: AnyOp) -> AnyOp:
    """Makes an op known by the name of its module, "rows.affine" for kernels/rows/affine.py; the first one stays."""
    return _ops.setdefault(name, op)


def load(name: str) -> AnyOp:
    """Returns the op of that name, importing its module, and Triton with it, if it is the first to ask."""
    if name not in _ops:
        importlib.import_module(f"{__package__}.{name}")
    return _ops[name]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and not has_triton():
        raise ValueError("backend 'triton' needs the triton package, which is not installed: use 'auto' or 'torch'")
    return name


def set_backend(name: str) -> None:
    """Chooses the backend of the whole process.

    "auto" is Triton for CUDA tensors where it is installed, else torch; "triton" raises where it can't run, and for CPU
    tensors needs Triton's interpreter: TRITON_INTERPRET=1 before the import.

    Raises:
        ValueError: `name` is none of these, or is "triton" and Triton is not installed.
    """
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend as `set_backend` does, for a `with` block in this thread or task.

    It holds in the backward passes of what is solved in the block, too, whenever and in whatever thread they run.
    """
    token = _scoped.set(_checked(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def chosen() -> str:
    """Returns the backend in force: "auto", "triton" or "torch"."""
    return _scoped.get() or _default


@cache
def has_triton() -> bool:
    """Returns whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_version() -> tuple[int, int]:
    """Returns the major and minor version of Triton, which it imports."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def too_old() -> str | None:
    """Returns why this Triton can't run the kernels, or None; imports it."""
    if triton_version() >= LEAST:
        return None
    import triton

    return f"triton {triton.__version__} is installed, and the kernels need {'.'.join(map(str, LEAST))} or later"


@cache
def interpreting() -> bool:
    """Returns whether kernels run in Triton's interpreter, on the CPU, by the variable that Triton reads at import."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _on_cpu() -> str | None:
    """Returns how kernels run on CPU tensors, or None where they can't."""
    if interpreting():
        return "interpreted"
    return f"emulated for sm_{devices.emulated}" if devices.emulated else None


def pick(name: str, device: torch.device, **problem) -> tuple[AnyOp | None, str]:
    """Returns the op for this problem, or None where torch does the work, and the reason in one line either way.

    `problem` has the keyword arguments of the op's `refuses`.

    Raises:
        RuntimeError: Backend "triton" is forced for tensors on which it can't run, or Triton or the GPU is too old.
    """
    cuda = device.type == "cuda"
    forced = chosen() == "triton"
    if chosen() == "torch":
        return None, "the torch backend is chosen"
    if not cuda and not forced:
        return None, f"tensors are on {device.type}, and Triton is for CUDA"
    if not has_triton():
        return None, "triton is not installed"
    if not cuda and not _on_cpu():
        raise RuntimeError(
            f"backend 'triton' can't run on {device.type} tensors: move them to CUDA, or set TRITON_INTERPRET=1 "
            "before triton is imported to use its (slow) interpreter"
        )
    reason = too_old() or devices.lacks(device)
    if reason and forced:
        raise RuntimeError(f"backend 'triton' can't run: {reason}")
    if reason:
        return None, reason
    op = load(name)
    if isinstance(op, Op):
        problem["device"] = device  # for the size of its shared memory
    reason = op.refuses(**problem)
    return (None, reason) if reason else (op, op.label + ("" if cuda else f", {_on_cpu()}"))


@dataclass(frozen=True)
class WholeSolve:
    """What a cell asks of the Op or CellOp that solves it.

    `problem` has the keyword arguments of the op's `refuses`, but for the solver's memory and the terms of weights.
    Its `solve` takes `operands` before the start, its `adjoint` what `at` returns for the solution z [B, N] before the
    cotangent. For a tolerance `options` returns their keyword arguments beside the solver's.
    """

    op: str
    problem: dict[str, Any]
    operands: tuple[Tensor, ...]
    at: Callable[[Tensor], tuple[Tensor, ...]]
    options: Callable[[float], dict[str, Any]]

    def pick(self, device: torch.device, solver_memory: int, tol: float) -> tuple[Op | CellOp | None, str]:
        """As the function `pick`, for a solver with so many differences and this tolerance."""
        problem = self.problem | {"solver_memory": solver_memory, "terms": self.options(tol)["terms"]}
        return pick(self.op, device, **problem)
