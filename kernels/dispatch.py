"""The one place that picks Triton or torch.

An op is a file of this folder whose last statement registers it. It is imported the first time it is asked for, so that
importing the library needs no Triton. `pick` answers with the op, or with the reason why torch does the work.
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

BACKENDS = ("auto", "triton", "torch")
LEAST = (3, 4)  # Triton's version; older ones lack what the kernels, or their tests, need
_default = "auto"
_scoped: ContextVar[str | None] = ContextVar("tritondeq_backend", default=None)


@dataclass(frozen=True)
class Op:
    """One whole-solve op: `solve` and `adjoint` with their torch references, and what it can take."""

    solve: Callable
    adjoint: Callable
    solve_ref: Callable
    adjoint_ref: Callable
    refuses: Callable[..., str | None]  # keyword arguments that name the problem -> why it can't be taken, or None
    says: str = "one Triton launch"


@dataclass(frozen=True)
class StepsOp:
    """The steps of a solver, fused: `start(z, keep, tol, **options)` makes what steps.py says, and what it can take."""

    start: Callable
    refuses: Callable[..., str | None]
    says: str


@dataclass(frozen=True)
class RowOp:
    """A part of a cell that maps rows or groups one by one, without gradients; its reference, what it can take."""

    run: Callable
    ref: Callable
    refuses: Callable[..., str | None]
    says: str = "one Triton launch"


@dataclass(frozen=True)
class CellOp:
    """One cell's solve step by step: `solve` and `adjoint` take what an Op's do, and make steps (steps.py) for the loop
    to drive, which evaluate the cell themselves."""

    solve: Callable
    adjoint: Callable
    refuses: Callable[..., str | None]
    says: str


AnyOp = Op | StepsOp | RowOp | CellOp
_ops: dict[str, AnyOp] = {}


def register(name: str, op: AnyOp) -> AnyOp:
    return _ops.setdefault(name, op)


def load(name: str) -> AnyOp:
    """Returns the op of that name: "rows.affine" is kernels/rows/affine.py. Imports Triton."""
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

    Args:
        name: "auto" (Triton for CUDA tensors where it is installed, else torch), "triton" (raise where it can't run;
            CPU tensors then need Triton's interpreter, TRITON_INTERPRET=1 before the import) or "torch".

    Raises:
        ValueError: `name` is none of these, or is "triton" and Triton is not installed.
    """
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend as `set_backend` does, for the duration of a `with` block in this thread or task."""
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
    return importlib.util.find_spec("triton") is not None


@cache
def too_old() -> str | None:
    """Why this Triton can't run the kernels, or None; imports it."""
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found >= LEAST:
        return None
    return f"triton {triton.__version__} is installed, and the kernels need {'.'.join(map(str, LEAST))} or later"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; the variable is Triton's own, read at its import."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def pick(name: str, device: torch.device, **problem) -> tuple[AnyOp | None, str]:
    """The op for this problem or None, and the reason in one line either way.

    Args:
        name: Name of the op, as its file's.
        device: Where the tensors are.
        problem: What the op's `refuses` wants to know.

    Raises:
        RuntimeError: backend "triton" is forced for tensors on which it can't run, or Triton is too old.
    """
    cuda = device.type == "cuda"
    if chosen() == "torch":
        return None, "the torch backend is chosen"
    if chosen() == "auto" and not cuda:
        return None, f"tensors are on {device.type}, and Triton is for CUDA"
    if not has_triton():
        return None, "triton is not installed"
    if not cuda and not interpreting():
        raise RuntimeError(
            f"backend 'triton' can't run on {device.type} tensors: move them to CUDA, or set TRITON_INTERPRET=1 "
            "before triton is imported to use its (slow) interpreter"
        )
    reason = too_old()
    if reason:
        if chosen() == "triton":
            raise RuntimeError(f"backend 'triton' can't run: {reason}")
        return None, reason
    op = load(name)
    if isinstance(op, Op):
        problem["device"] = device  # for the size of its shared memory
    reason = op.refuses(**problem)
    if reason:
        return None, reason
    return op, op.says + ("" if cuda else ", interpreted")


@dataclass(frozen=True)
class WholeSolve:
    """What a cell asks of an op that solves it: an Op or a CellOp.

    Attributes:
        op: Name of the op.
        problem: What the op's `refuses` wants to know.
        operands: Its tensors before the state [B, N].
        at: The tensors that its adjoint wants before the cotangent, for the solution z [B, N].
        options: Its keyword arguments beside the solver's, for a tolerance.
    """

    op: str
    problem: dict[str, Any]
    operands: tuple[Tensor, ...]
    at: Callable[[Tensor], tuple[Tensor, ...]]
    options: Callable[[float], dict[str, Any]]

    def pick(self, device: torch.device, solver_memory: int, tol: float) -> tuple[Op | CellOp | None, str]:
        problem = self.problem | {"solver_memory": solver_memory, "terms": self.options(tol)["terms"]}
        return pick(self.op, device, **problem)
