"""The price of a step: a whole call of `fixed_point` beside as many bare evaluations, and the evaluations needed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, rivals, shapes
from .measure import Record

EVALUATIONS, TOL = 40, 1e-9  # of each call: the problem is not at TOL by then
OURS = {"Picard": tdeq.Picard(), "Anderson(5)": tdeq.Anderson(memory=5)}
CELL = "affine"
MOST = 200  # evaluations that `evaluations` waits for


def problem(rows: int, width: int, gain: float, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns f(z) = tanh(W z + u), W normal with spectral radius about `gain`, and a start [rows, width] of zeros."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(width, width, generator=generator) * gain / math.sqrt(width)
    u = torch.randn(rows, width, generator=generator)
    w, u = w.to(device), u.to(device)
    return (lambda z: torch.tanh(torch.addmm(u, z, w.mT))), torch.zeros_like(u)


def suite_shapes(suite: str, cuda: bool) -> list[shapes.Shape]:
    """Returns the shapes at which a suite measures the price of a step."""
    sizes = [(8, 16)] if suite == "tiny" else [(4096, 1024), (32, 64)] if cuda else [(256, 256), (32, 64)]
    return [shapes.Shape(CELL, width, rows) for rows, width in sizes]


def cell_problem(shape: shapes.Shape, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns (f, start): a problem of gain 1.2, which no contestant finishes; other cells, and bf16, as they begin."""
    if shape.cell == CELL and not shape.low:
        return problem(shape.rows, shape.features, 1.2, device)
    torch.manual_seed(0)
    cell = shape.make(device).requires_grad_(False)
    x = torch.randn(shape.dims, device=device, dtype=next(cell.parameters()).dtype)
    injection = cell.inject(x)
    return (lambda z: cell(z, injection)), torch.zeros_like(x)


def contestants(shape: shapes.Shape, device: torch.device) -> dict[str, Callable[[], int]]:
    """Returns calls by name, each as a user writes it: with gradients enabled, and the number of steps read at the end.

    Each returns the evaluations that it made: EVALUATIONS, unless the state stands still before.
    """
    f, z0 = cell_problem(shape, device)

    def bare():
        z = z0
        for _ in range(EVALUATIONS):
            z = f(z)
        return EVALUATIONS

    def ours(solver):
        return int(tdeq.fixed_point(f, z0, solver=solver, tol=TOL, max_steps=EVALUATIONS).steps.max())

    calls = {"bare cell": bare} | {name: lambda s=solver: ours(s) for name, solver in OURS.items()}
    if device.type == "cuda":
        calls |= {f"{name}, graph": captured(f, z0, solver) for name, solver in OURS.items()}
    for name, solver in rivals.solvers().items():
        calls[name] = lambda s=solver: s(f, z0, TOL, EVALUATIONS)[1]
    return calls


def captured(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Any) -> Callable[[], int]:
    """Returns a call that replays the same evaluations as CUDA graphs; on a CPU, which has none, it is the loop."""

    class Cell(torch.nn.Module):
        def forward(self, z, x):
            return f(z)

    layer = tdeq.DEQ(Cell(), solver=solver, tol=TOL, max_steps=EVALUATIONS, graph=True)

    @torch.no_grad()
    def call():
        layer(z0)
        return int(layer.last.steps.max())

    return call


def run(
    device: torch.device, these: list[shapes.Shape], seconds: float, lose: Callable[[str], None]
) -> Iterator[Record]:
    """Measures the time of each call per evaluation, over the bare cell's, and torch operations per step.

    What is replayed as a CUDA graph is compared with the bare cell in a graph. A record of the
    problem is `wrong` where ours made fewer evaluations than were asked for; other cells may arrive before.

    Args:
        device: Where.
        these: The shapes.
        seconds: Of measuring, for each contestant.
        lose: As in measure.attempt.
    """
    for shape in these:
        yield from _prices(shape, device, seconds, lose)


def _prices(shape: shapes.Shape, device: torch.device, seconds: float, lose: Callable[[str], None]) -> Iterator[Record]:
    plain = shape.cell == CELL and not shape.low
    case = f"{EVALUATIONS} evaluations {f'{shape.rows}x{shape.features}' if plain else shape}"
    calls = contestants(shape, device)
    made, faults = measure.attempt(calls, case, lambda: True, lose)
    if plain:
        short = {name: made[name] for name in OURS if made.get(name, EVALUATIONS) != EVALUATIONS}
        faults |= {name: f"{name}: {count} evaluations, not {EVALUATIONS}" for name, count in short.items()}
    timed = {} if faults else measure.clock(calls, device, seconds)
    if timed and (alone := measure.replayed(calls["bare cell"], device)):
        timed["bare cell, graph"] = measure.Timing(alone, alone, True)
    for name in dict.fromkeys([*calls, *timed]):
        record = {"kind": "steps", "case": case, "rows": shape.rows, "width": shape.features, "contestant": name}
        record |= {"cell": shape.cell, "low": shape.low, "wrong": faults.get(name)}
        if name in timed:
            base = timed.get("bare cell, graph" if name.endswith(", graph") else "bare cell")
            steps = made.get(name, EVALUATIONS)
            record |= measure.times(timed[name], steps) | {"steps": steps}
            record["over_cell"] = record["seconds"] / (base.seconds / EVALUATIONS) if base else None
            record["ops"] = ops_per_step(OURS[name]) if name in OURS else None
        yield record


def ops_per_step(solver: Any, first: int = 7, last: int = 10) -> float:
    """Counts operations per step beside the cell, without views, bare allocations and host reads, by the torch backend.

    Counted between two solves of `first` and `last` evaluations, all rows active, no window's end between them.
    """
    f, z0 = problem(8, 16, 0.9, torch.device("cpu"))

    def count(steps: int) -> int:
        with measure.AtenOps() as ops:
            tdeq.fixed_point(f, z0, solver=solver, tol=1e-12, max_steps=steps)
        return ops.total

    with torch.no_grad(), tdeq.backend("torch"):
        with measure.AtenOps() as cell:
            f(z0)
        return (count(last) - count(first)) / (last - first) - cell.total


def evaluations(device: torch.device, suite: str) -> Iterator[Record]:
    """Counts evaluations until the worst row is at 1e-4, at three gains; None where MOST are not enough.

    A record is `wrong` where our Anderson needs more than Picard, or ours does not arrive although the map contracts.
    """
    rows, width = (8, 16) if suite == "tiny" else (256, 256)
    for gain in (0.5, 0.9, 1.2):
        f, z0 = problem(rows, width, gain, device)
        needed: dict[str, int | None] = {}
        with torch.no_grad():
            for name, solver in OURS.items():
                solution = tdeq.fixed_point(f, z0, solver=solver, tol=1e-4, max_steps=MOST)
                needed[name] = int(solution.steps.max()) if bool(solution.converged.all()) else None
            for name, solver in rivals.solvers().items():
                count = solver(f, z0, 1e-4, MOST)[1]
                needed[name] = count if count < MOST else None
        for name, count in needed.items():
            fault = None
            if name == "Anderson(5)" and (count or MOST) > (needed["Picard"] or MOST):
                fault = f"{name}: {count or f'not in {MOST}'} evaluations, Picard {needed['Picard']}, gain {gain}"
            elif name in OURS and count is None and gain < 1:
                fault = f"{name}: not at 1e-4 in {MOST} evaluations, gain {gain}"
            record = {"kind": "evaluations", "case": f"gain {gain}", "rows": rows, "width": width}
            yield record | {"contestant": name, "steps": count, "wrong": fault}
