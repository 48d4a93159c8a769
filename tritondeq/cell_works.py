"""What `tune` measures of the kernels that hold a cell: whole solves, and steps with the cell in them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import cells
from .kernels import costs, dispatch, jobs, launch, offline
from .loop import Settings, drive
from .solvers import Anderson, Picard
from .row_kernels import affine_problem, bf16_terms
from .work import ENDLESS, EVALUATIONS, MOST, NEVER, TOL, Problem, Work, ask, double, narrow

FINE = 1e-6  # a tolerance that takes three bf16 terms of a float32 weight
MEMORIES = (0, 2, 4)  # of Anderson in whole solves; 1 and 3 take what 2 and 4 do
WHOLE = {
    "affine": cells.Affine,
    "monotone": cells.Monotone,
    "mlp": cells.MLP,
    "mlp pre": partial(cells.MLP, form="pre"),
    "swiglu": partial(cells.MLP, activation="swiglu"),
    "swiglu pre": partial(cells.MLP, activation="swiglu", form="pre"),
    "gated": cells.Gated,
}
FORMS = {"mlp": (("mlp", "mlp pre"), ("swiglu", "swiglu pre"))}  # of a cell: of most, and of few; else itself
REFERENCES = {"affine_steps": "affine"}  # ops whose reference is another's


def whole(cell: str, of: dict[str, Any], limits: dict[str, int] | None, rare: bool) -> Iterator[Work]:
    """Those of a cell of WHOLE, as `works` says."""
    narrow(cell, of["dtype"])
    wide = cell in ("affine", "monotone") and of["features"] > launch.FEATURES
    tols = (TOL,) if of["dtype"] == "bf16" else (TOL, min(TOL, FINE))
    most, few = FORMS.get(cell, ((cell,), ()))
    usual = list(product(most, (0,), (TOL,)))
    every = list(product(most + few, (0,) if wide else MEMORIES, tols))
    for form, memory, tol in [one for one in every if one not in usual] if rare else usual:
        try:
            yield from _steps(form, of, limits, tol) if wide else [_rows(form, of, limits, memory, tol)]
        except ValueError:
            if not rare:
                raise
    for tol in tols if wide and rare else ():
        yield from _grid(cell, of, limits, tol)


def _rows(cell: str, of: dict[str, Any], limits: dict[str, int] | None, memory: int, tol: float) -> Work:
    d, limits = of["features"], limits or launch.limits(of["device"])
    op = "affine" if cell in ("affine", "monotone") else cell.partition(" ")[0].replace("swiglu", "mlp")
    up, down = (2 * d, d), (d, 2 * d)
    sizes = {"affine": ((d, d),), "gated": ((d, d),) * 3, "mlp": (up, down)}[op]
    sizes += (up,) if cell.startswith("swiglu") else ()
    shape = {"batch": of["rows"], "shapes": sizes, "terms": bf16_terms(tol, of["dtype"] == "bf16"), "memory": memory}
    if not launch.candidates(op, **shape | limits):
        raise ValueError(f"{cell} of {d} features does not fit in a multiprocessor: take fewer --features")
    return WholeSolve(op, **of, shape=shape | limits, cell=cell, tol=tol)


def _wide(of: dict[str, Any], rows: int, tol: float, shared: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the library tells of an affine cell, the shape that it asks `launch` with)."""
    features, half = of["features"], of["dtype"] == "bf16"
    terms = bf16_terms(tol, half)
    told = affine_problem(torch.empty(features, features, device="meta"), rows, "tanh", half)["problem"]
    return told | {"terms": terms}, {"batch": rows, "features": features, "terms": terms, "shared": shared}


def _steps(cell: str, of: dict[str, Any], limits: dict[str, int] | None, tol: float) -> Iterator[Work]:
    limits = limits or launch.limits(of["device"])
    told, shape = _wide(of, of["rows"], tol, limits["shared"])
    ask("affine_steps", **told)
    yield CellSteps("affine_steps", **of, shape=shape, cell=cell, tol=tol)
    yield FirstStep("affine_steps", **of, shape=shape | {"start": True}, cell=cell, tol=tol)


def _grid(cell: str, of: dict[str, Any], limits: dict[str, int] | None, tol: float) -> Iterator[Work]:
    """For as many of the rows as slices of W of each width take."""
    features, device = of["features"], of["device"]
    processors = offline.PROCESSORS[limits["chip"]] if limits else launch.multiprocessors(device)
    limits = limits or launch.limits(device)
    most = [16 * (processors // -(-features // block_n)) for block_n in launch.SLICES]
    for rows in sorted({min(of["rows"], launch.GRID_ROWS, tiles) for tiles in most}):
        told, shape = _wide(of, rows, tol, limits["shared"])
        shape |= {"processors": processors}
        if features > launch.GRID_FEATURES or not rows or not launch.candidates("affine_grid", **shape):
            continue
        here, apart = costs.grid_seconds(cell=told["cell"], **shape)
        if here <= apart:
            yield WholeSolve("affine_grid", **of | {"rows": rows}, shape=shape, cell=cell, tol=tol)


@dataclass(frozen=True)
class WholeSolve(Work):
    """A solve and its adjoint, a launch each.

    Attributes:
        cell: A key of WHOLE.
    """

    cell: str
    tol: float

    def __str__(self) -> str:
        memory, terms = self.shape.get("memory", 0), self.shape["terms"]
        words = [self.cell, "grid" if self.op == "affine_grid" else "", f"{self.rows}x{self.features}", self.dtype]
        words += ["start" if self.shape.get("start") else "", f"memory {memory}" if memory else ""]
        return " ".join(filter(None, [*words, "terms 3" if terms == 3 else ""]))

    def launches(self, chip: int, config: dict) -> list[dict[str, Any]]:
        form = "pre" if self.cell.endswith(" pre") else "post"
        return jobs.of_candidate(self.op, chip, config, self.dtype, self.shape, form)

    def prepare(self) -> Problem:
        operands = "bf16" if self.dtype == "bf16" else "fp32"
        cell = WHOLE[self.cell](self.features, operands=operands, device=self.device)
        x, g = torch.randn(2, self.rows, self.features, device=self.device)
        start = self._start(x)
        with torch.no_grad():
            whole = cell.whole_solve(cell.inject(x))
        op, reference = dispatch.load(self.op), dispatch.load(REFERENCES.get(self.op, self.op))
        memory = self.shape.get("memory", 0)
        solver = Anderson(memory=memory) if memory else Picard()
        limits = {"tol": self.tol, "max_steps": MOST}
        fine = whole.options(self.tol) | {"tol": 1e-10, "max_steps": 10 * MOST}
        z = reference.solve_ref(*double(whole.operands), start.double(), **fine)[0]
        saved = whole.at(z.float())
        u = reference.adjoint_ref(*double(saved), g.double(), **fine)[0]
        options = whole.options(self.tol) | limits | solver.fused()

        def run() -> tuple[Tensor, ...]:
            made = op.solve(*whole.operands, start, **options), op.adjoint(*saved, g, **options)
            return tuple(map(self._solved, made))

        return Problem(run, (z, u), lambda: self._timed(run, op, (*whole.operands, start), (*saved, g), options))

    def _start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def _solved(self, made: Any) -> Tensor:
        return made[0]

    def _timed(self, run, op, operands, saved, options) -> Callable[[], Any]:
        return run


class CellSteps(WholeSolve):
    """A solve and its adjoint, a launch a step; a few steps of each are timed."""

    def _solved(self, made: Any) -> Tensor:
        return drive(made, Settings(Picard(), self.tol, MOST, None, None))[0]

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


class FirstStep(CellSteps):
    """The first launch of a solve from anywhere, and of its adjoint; one of a solve from zero is timed, too."""

    def _start(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def _timed(self, run, op, operands, saved, options) -> Callable[[], Any]:
        endless = options | {"tol": NEVER, "max_steps": ENDLESS}
        cold = op.solve(*operands[:-1], torch.zeros_like(operands[-1]), **endless)
        first = cold, op.solve(*operands, **endless), op.adjoint(*saved, **endless)

        def call() -> None:
            for steps in first:
                steps.forget()
                steps.start = True
                steps.take()

        return call
