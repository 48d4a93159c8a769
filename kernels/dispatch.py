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

BACKENDS = ("auto", "triton", "torch")
LEAST = (3, 4)  # Triton's version; older ones lack what the kernels, or their tests, need
_default = "auto"
_scoped: ContextVar[str | None] = ContextVar("tritondeq_backend", default=None)


@dataclass(frozen=True)
class Op:
    """A solve of a cell in one launch.

    Attributes:
        solve: Solves z = f(z) for rows; returns what `rows.skeleton.Rows.solve` does.
        adjoint: Solves u = J' u + g for rows, the same way.
        solve_ref: `solve` in torch, for any device and floating dtype.
        adjoint_ref: `adjoint` in torch.
        refuses: Takes keyword arguments that describe the problem; returns why the op can't take it, or None.
        label: What the op does, for `path` and `doctor`.
    """

    solve: Callable
    adjoint: Callable
    solve_ref: Callable
    adjoint_ref: Callable
    refuses: Callable[..., str | None]
    label: str = "one Triton launch"


@dataclass(frozen=True)
class StepsOp:
    """The steps of a solver in one launch or two each, for any cell.

    Attributes:
        start: Called as `start(z, mask, tol, limit, tail, **options)`; returns a `steps.base.Steps`.
        refuses: As `Op.refuses`.
        label: As `Op.label`.
    """

    start: Callable
    refuses: Callable[..., str | None]
    label: str


@dataclass(frozen=True)
class RowOp:
    """A part of a cell that maps rows or groups one by one, without gradients.

    Attributes:
        run: Does it in Triton.
        ref: Does it in torch, with the same signature.
        refuses: As `Op.refuses`.
        label: As `Op.label`.
    """

    run: Callable
    ref: Callable
    refuses: Callable[..., str | None]
    label: str = "one Triton launch"


@dataclass(frozen=True)
class CellOp:
    """A solve of a cell step by step, by steps that evaluate the cell themselves.

    Attributes:
        solve: Takes what `Op.solve` does; returns a `steps.base.Samples` for the loop to drive.
        adjoint: The same of `Op.adjoint`.
        refuses: As `Op.refuses`.
        label: As `Op.label`.
    """

    solve: Callable
    adjoint: Callable
    refuses: Callable[..., str | None]
    label: str


AnyOp = Op | StepsOp | RowOp | CellOp
_ops: dict[str, AnyOp] = {}


def register(name: str, op: AnyOp) -> AnyOp:
    """Makes an op known, so that `pick` and `load` find it.

    The last statement of the op's module calls this. A second call with the same name changes nothing.

    Args:
        name: The module below this folder, "rows.affine" for kernels/rows/affine.py.
        op: What runs, its references, and what it refuses.

    Returns:
        The op that is registered under this name.
    """
    return _ops.setdefault(name, op)


def load(name: str) -> AnyOp:
    """Returns the op of that name, importing its module, and Triton with it, if it is the first to ask.

    Raises:
        ModuleNotFoundError: There is no such module.
        KeyError: The module registers no op of that name.
    """
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
    """Returns whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_version() -> tuple[int, int]:
    """Returns the major and minor version of Triton, which it imports."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def too_old() -> str | None:
    """Returns why this Triton can't run the kernels, or None; imports it."""
    if triton_version() >= LEAST:
        return None
    import triton

    return f"triton {triton.__version__} is installed, and the kernels need {'.'.join(map(str, LEAST))} or later"


def interpreting() -> bool:
    """Returns whether kernels run in Triton's interpreter, on the CPU, by the variable that Triton reads at import."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def pick(name: str, device: torch.device, **problem) -> tuple[AnyOp | None, str]:
    """Returns the op for this problem, or None where torch does the work, and the reason in one line either way.

    Args:
        name: Name of the op, as `register` has it.
        device: Where the tensors are.
        problem: The keyword arguments of the op's `refuses`.

    Raises:
        RuntimeError: Backend "triton" is forced for tensors on which it can't run, or Triton is too old.
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
    return op, op.label + ("" if cuda else ", interpreted")


@dataclass(frozen=True)
class WholeSolve:
    """What a cell asks of an op that solves it: an Op or a CellOp.

    Attributes:
        op: Name of the op.
        problem: Keyword arguments of the op's `refuses`, but for the solver's memory and the terms of weights.
        operands: Tensors that the op's `solve` takes before the start.
        at: Returns the tensors that `adjoint` takes before the cotangent, for the solution z [B, N].
        options: Returns the op's keyword arguments beside the solver's, for a tolerance.
    """

    op: str
    problem: dict[str, Any]
    operands: tuple[Tensor, ...]
    at: Callable[[Tensor], tuple[Tensor, ...]]
    options: Callable[[float], dict[str, Any]]

    def pick(self, device: torch.device, solver_memory: int, tol: float) -> tuple[Op | CellOp | None, str]:
        """Returns what `pick` does, for a solver with so many differences and this tolerance."""
        problem = self.problem | {"solver_memory": solver_memory, "terms": self.options(tol)["terms"]}
        return pick(self.op, device, **problem)
