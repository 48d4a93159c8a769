"""What `tune` measures: for each op a problem with float64 answers, and the call whose time counts."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cells
from .fixed_point import fixed_point
from .kernels import dispatch, launch
from .kernels.tails import PLAIN
from .loop import Settings, drive
from .solvers import Anderson, Broyden, Picard, Solver
from .solvers.splitting import affine_problem, bf16_terms

TOL, MOST = 1e-4, 100  # of the solves
NEVER, ENDLESS = 1e-30, 1 << 30  # a tolerance and a limit that nobody reaches
EVALUATIONS = 11  # of the fused steps that are timed: one fewer than after which a sample may stop
WHOLE = {"affine": cells.Affine, "monotone": cells.Monotone, "mlp": cells.MLP, "gated": cells.Gated}
STEPS: dict[str, Solver] = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
REFERENCES = {"affine_steps": "affine"}  # ops whose reference is another's
SIDES, GROUPS = (8, 32), 8  # of images
CELLS = (*WHOLE, "transformer", "conv", "any")
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


def works(
    cell: str, features: int, rows: int, dtype: str, device: torch.device, limits: dict[str, int] | None = None
) -> Iterator[Work]:
    """The ops that this cell runs at this size.

    Args:
        limits: `launch.limits` of another GPU than the device.

    Raises:
        ValueError: none would do it; the message says why.
    """
    of = {"rows": rows, "features": features, "dtype": dtype, "device": device}
    if cell in WHOLE:
        yield _whole(cell, of, limits or launch.limits(device))
    elif cell == "transformer":
        _narrow(cell, dtype)
        row = torch.empty(1, features, dtype=DTYPES[dtype], device="meta")
        _ask("residual_rms", a=row, b=row, gamma=row[0], weight=row[0], autocast=False)
        yield Norm("residual_rms", **of, shape={"features": features})
    elif cell == "conv":
        _narrow(cell, dtype)
        if features % GROUPS:
            raise ValueError(f"{cell} has {GROUPS} groups: take --features that are multiples of it")
        _ask("group_norm", a=torch.empty(1, features, 1, device="meta"), b=None, groups=GROUPS)
        for side in SIDES:
            yield GroupNorm("group_norm", **of, shape={"pixels": side * side, "width": features // GROUPS})
    else:
        itemsize = 8 if dtype == "fp64" else 4
        for op in STEPS:
            yield SolverSteps(op, **of, shape={"width": features, "itemsize": itemsize})


def _narrow(cell: str, dtype: str) -> None:
    if dtype == "fp64":
        raise ValueError(f"{cell} in fp64 is torch's")


def _ask(op: str, **problem: Any) -> None:
    """Raises where the op would not take the problem, if there is a Triton to ask it."""
    why = dispatch.load(op).refuses(**problem) if dispatch.has_triton() else None
    if why:
        raise ValueError(f"{op}: {why}")


def _whole(cell: str, of: dict[str, Any], limits: dict[str, int]) -> Work:
    features, dtype = of["features"], of["dtype"]
    terms = bf16_terms(TOL, dtype == "bf16")
    _narrow(cell, dtype)
    if cell in ("affine", "monotone") and features > launch.FEATURES:
        w = torch.empty(features, features, device="meta")
        _ask("affine_steps", terms=terms, **affine_problem(w, of["rows"], "tanh", dtype == "bf16")["problem"])
        shape = {"batch": of["rows"], "features": features, "terms": terms, "shared": limits["shared"]}
        return CellSteps("affine_steps", **of, shape=shape, cell=cell)
    sizes = {"mlp": ((2 * features, features), (features, 2 * features)), "gated": ((features, features),) * 3}
    op = cell if cell in sizes else "affine"
    shape = {"batch": of["rows"], "shapes": sizes.get(cell, ((features, features),)), "terms": terms, "memory": 0}
    if not launch.candidates(op, **shape | limits):
        raise ValueError(f"{cell} of {features} features does not fit in a multiprocessor: take fewer --features")
    return WholeSolve(op, **of, shape=shape | limits, cell=cell)


@dataclass(frozen=True)
class WholeSolve(Work):
    """A solve and its adjoint, a launch each."""

    cell: str

    def __str__(self) -> str:
        return f"{self.cell} {self.rows}x{self.features} {self.dtype}"

    def prepare(self) -> Problem:
        operands = "bf16" if self.dtype == "bf16" else "fp32"
        cell = WHOLE[self.cell](self.features, operands=operands, device=self.device)
        x, g = torch.randn(2, self.rows, self.features, device=self.device)
        start = torch.zeros_like(x)
        with torch.no_grad():
            whole = cell.whole_solve(cell.inject(x))
        op, reference = dispatch.load(self.op), dispatch.load(REFERENCES.get(self.op, self.op))
        options = {"tol": TOL, "max_steps": MOST} | whole.options(TOL) | Picard().fused()
        fine = options | {"tol": 1e-10, "max_steps": 10 * MOST}
        z = reference.solve_ref(*_double(whole.operands), start.double(), **fine)[0]
        saved = whole.at(z.float())
        u = reference.adjoint_ref(*_double(saved), g.double(), **fine)[0]

        def run() -> tuple[Tensor, ...]:
            made = op.solve(*whole.operands, start, **options), op.adjoint(*saved, g, **options)
            return tuple(map(self._solved, made))

        return Problem(run, (z, u), lambda: self._timed(run, op, (*whole.operands, start), (*saved, g), options))

    def _solved(self, made: Any) -> Tensor:
        return made[0]

    def _timed(self, run, op, operands, saved, options) -> Callable[[], Any]:
        return run


class CellSteps(WholeSolve):
    """A solve and its adjoint, a launch a step; a few steps of each are timed."""

    def _solved(self, made: Any) -> Tensor:
        return drive(made, Settings(Picard(), TOL, MOST, None, None))[0]

    def _timed(self, run, op, operands, saved, options) -> Callable[[], Any]:
        endless = options | {"tol": NEVER, "max_steps": ENDLESS}
        both = (op.solve(*operands, **endless), operands[-1]), (op.adjoint(*saved, **endless), None)

        def call() -> None:
            for steps, start in both:
                steps.reset(start)
                for _ in range(EVALUATIONS):
                    steps.take()
                    steps.onward()

        return call


class SolverSteps(Work):
    """The steps of a solver around any cell; a few are timed, of images that nobody had to compute."""

    def prepare(self) -> Problem:
        dtype = torch.float64 if self.dtype == "fp64" else torch.float32
        u = torch.randn(self.rows, self.features, dtype=dtype, device=self.device)
        images = [u.to(DTYPES[self.dtype]), -u.to(DTYPES[self.dtype])]
        solver, z = STEPS[self.op], torch.zeros_like(u)

        def solved(u: Tensor, backend: str, tol: float) -> tuple[Tensor]:
            with torch.no_grad(), dispatch.backend(backend):
                z = torch.zeros_like(u)
                return (
                    fixed_point(lambda z: u + 0.5 * torch.tanh(z), z, solver=solver, tol=tol, max_steps=MOST).value,
                )

        def timed() -> Callable[[], Any]:
            steps = dispatch.load(self.op).start(z, None, NEVER, ENDLESS, PLAIN, **asdict(solver))

            def call() -> None:
                steps.reset(z)
                for i in range(EVALUATIONS):
                    steps.take(images[i % 2])
                    steps.onward()

            return call

        return Problem(partial(solved, u, "triton", TOL), solved(u.double(), "torch", 1e-10), timed)


class Norm(Work):
    """A residual sum and its norm."""

    def prepare(self) -> Problem:
        made = {"dtype": DTYPES[self.dtype], "device": self.device}
        a, b = torch.randn(2, self.rows, self.features, **made)
        gamma, weight = torch.rand(2, self.features, **made)
        return _row_op(self.op, (a, b, gamma, weight), (1e-6,))


class GroupNorm(Work):
    """The norm of a sum of images."""

    def __str__(self) -> str:
        return f"{self.op} {self.rows}x{self.features}x{self.shape['pixels']} {self.dtype}"

    def prepare(self) -> Problem:
        made = {"dtype": DTYPES[self.dtype], "device": self.device}
        pixels = self.shape["pixels"]
        a, b = (torch.randn(self.rows, pixels, self.features, **made).movedim(-1, 1) for _ in range(2))
        weight, bias = torch.rand(2, self.features, device=self.device)
        return _row_op(self.op, (a, b, weight, bias), (GROUPS, 1e-5, "after"))


def _row_op(name: str, tensors: tuple[Tensor, ...], options: tuple) -> Problem:
    op = dispatch.load(name)

    def run() -> tuple[Tensor, ...]:
        made = op.run(*tensors, *options)
        return made if isinstance(made, tuple) else (made,)

    exact = op.ref(*_double(tensors), *options)
    return Problem(run, exact if isinstance(exact, tuple) else (exact,), lambda: run)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else tuple(map(_double, x))
