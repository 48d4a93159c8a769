"""What `tune` measures: the ops that each cell runs."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cell_works import WHOLE, whole
from .fixed_point import fixed_point
from .kernels import dispatch, launch, space
from .kernels.tails import PLAIN, Tail
from .solvers import Anderson, Broyden, Picard, Solver
from .work import DTYPES, ENDLESS, EVALUATIONS, MOST, NEVER, TOL, Problem, Work, ask, double, narrow

STEPS: dict[str, Solver] = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
SIDES, GROUPS = (8, 32), 8  # of images
CELLS = ("affine", "monotone", "mlp", "gated", "transformer", "conv", "any")


def works(
    cell: str,
    features: int,
    rows: int,
    dtype: str,
    device: torch.device,
    limits: dict[str, int] | None = None,
    rare: bool = False,
) -> Iterator[Work]:
    """The ops that this cell runs at this size.

    Args:
        limits: Of another GPU than the device, as `launch.limits` has them.
        rare: Instead, what few solves ask for: Anderson in whole solves, three bf16 terms, SwiGLU and grid barriers. Of
            these what does not fit is passed over.

    Raises:
        ValueError: none would do it; the message says why.
    """
    of = {"rows": rows, "features": features, "dtype": dtype, "device": device}
    if cell in WHOLE:
        try:
            yield from whole(cell, of, limits, rare)
        except ValueError:
            if cell != "mlp" or dtype == "fp64":
                raise
            yield from _block_steps(of, features)  # of a cell that takes the loop
    elif rare:
        return
    elif cell == "transformer":
        narrow(cell, dtype)
        row = torch.empty(1, features, dtype=DTYPES[dtype], device="meta")
        ask("residual_rms", a=row, b=row, gamma=row[0], weight=row[0], autocast=False)
        yield Norm("residual_rms", **of, shape={"features": features})
        yield from _block_steps(of, -(-space.WIDE // features) * features)
    elif cell == "conv":
        narrow(cell, dtype)
        if features % GROUPS:
            raise ValueError(f"{cell} has {GROUPS} groups: take --features that are multiples of it")
        ask("group_norm", a=torch.empty(1, features, 1, device="meta"), b=None, groups=GROUPS)
        for side in SIDES:
            yield GroupNorm("group_norm", **of, shape={"pixels": side * side, "width": features // GROUPS})
    else:
        itemsize = 8 if dtype == "fp64" else 4
        for op in STEPS:
            yield SolverSteps(op, **of, shape={"width": features, "itemsize": itemsize})


def _block_steps(of: dict[str, Any], width: int) -> Iterator[Work]:
    shape = {"width": width, "itemsize": 4, "features": of["features"]}
    if launch.candidates("picard", **shape):
        yield from (BlockSteps(op, **of, shape=shape) for op in STEPS)


class SolverSteps(Work):
    """The steps of a solver around any cell; a few are timed, of images that nobody had to compute."""

    def prepare(self) -> Problem:
        dtype = torch.float64 if self.dtype == "fp64" else torch.float32
        u = torch.randn(self._samples(), self.shape["width"], dtype=dtype, device=self.device)
        solver, z = STEPS[self.op], torch.zeros_like(u)

        def solved(u: Tensor, backend: str, tol: float) -> tuple[Tensor]:
            f, z = self._map(u), torch.zeros_like(u)
            z = z.unflatten(1, (-1, f.tail[1].features or u.shape[1]))
            with torch.no_grad(), dispatch.backend(backend):
                return (fixed_point(f, z, solver=solver, tol=tol, max_steps=MOST).value,)

        def timed() -> Callable[[], Any]:
            parts, tail = self._map(u).tail
            images = [[part.to(DTYPES[self.dtype]) for part in parts(x)] for x in (z, u)]
            steps = dispatch.load(self.op).start(z, None, NEVER, ENDLESS, tail, **asdict(solver))

            def call() -> None:
                steps.reset(z)
                for i in range(EVALUATIONS):
                    steps.take(*images[i % 2])
                    steps.onward()

            return call

        return Problem(partial(solved, u, "triton", TOL), solved(u.double(), "torch", 1e-10), timed)

    def _samples(self) -> int:
        return self.rows

    def _map(self, u: Tensor) -> "_Map":
        return _Map(lambda z: (u.view_as(z) + 0.5 * torch.tanh(z),), PLAIN)


class BlockSteps(SolverSteps):
    """The steps of a solver around a block that leaves them its last residual sum and its norm."""

    def __str__(self) -> str:
        return f"{super().__str__()} norm of {self.shape['width'] // self.features}"

    def _samples(self) -> int:
        return max(1, self.rows * self.features // self.shape["width"])

    def _map(self, u: Tensor) -> "_Map":
        weight = torch.linspace(0.5, 1.0, self.features, dtype=u.dtype, device=u.device)
        return _Map(lambda z: (u.view_as(z), 0.5 * torch.tanh(z)), Tail("rms", weight=weight, eps=1e-6))


class _Map:
    """f(z) = tail(z, *parts(z))."""

    def __init__(self, parts: Callable[[Tensor], tuple[Tensor, ...]], tail: Tail):
        self.tail = parts, tail

    def __call__(self, z: Tensor) -> Tensor:
        parts, tail = self.tail
        return tail(z, *parts(z))


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

    exact = op.ref(*double(tensors), *options)
    return Problem(run, exact if isinstance(exact, tuple) else (exact,), lambda: run)
