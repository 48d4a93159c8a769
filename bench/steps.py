"""The price of one step of the loop over the bare cell's (G7, G8, the CPU targets), and evaluations needed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, rivals, shapes

Record = dict[str, Any]
EVALUATIONS = 24  # two windows of the stop rules
OURS = {"Picard": tdeq.Picard(), "Anderson(5)": tdeq.Anderson(memory=5)}
CELL = "affine"  # whose name a case does not say


def problem(rows: int, width: int, gain: float, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """z = tanh(W z + u), W normal with spectral radius about `gain`, and where to start."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(width, width, generator=generator) * gain / math.sqrt(width)
    u = torch.randn(rows, width, generator=generator)
    w, u = w.to(device), u.to(device)
    return (lambda z: torch.tanh(torch.addmm(u, z, w.mT))), torch.zeros_like(u)


def suite_shapes(suite: str, cuda: bool) -> list[shapes.Shape]:
    sizes = [(8, 16)] if suite == "tiny" else [(4096, 1024), (32, 64)] if cuda else [(256, 256), (32, 64)]
    return [shapes.Shape(CELL, width, rows) for rows, width in sizes]


def cell_problem(shape: shapes.Shape, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A slow problem (gain 1.2), which no contestant finishes; another cell, or in bf16, is taken as it begins."""
    if shape.cell == CELL and not shape.low:
        return problem(shape.rows, shape.features, 1.2, device)
    torch.manual_seed(0)
    cell = shape.make(device)
    x = torch.randn(shape.dims, device=device, dtype=next(cell.parameters()).dtype)
    injection = cell.inject(x)
    return (lambda z: cell(z, injection)), torch.zeros_like(x)


def contestants(shape: shapes.Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Each makes EVALUATIONS evaluations."""
    f, z0 = cell_problem(shape, device)

    def bare():
        z = z0
        for _ in range(EVALUATIONS):
            z = f(z)

    calls = {"bare cell": bare}
    for name, solver in OURS.items():
        calls[name] = lambda s=solver: tdeq.fixed_point(f, z0, solver=s, tol=1e-12, max_steps=EVALUATIONS)
    if device.type == "cuda":
        for name, solver in OURS.items():
            calls[f"{name}, graph"] = captured(f, z0, solver)
    if rivals.has_torchdeq():
        calls["torchdeq Picard"] = lambda: rivals.torchdeq_picard(f, z0, 0.0, EVALUATIONS)
        calls["torchdeq Anderson(6)"] = lambda: rivals.torchdeq_anderson(f, z0, 0.0, EVALUATIONS)
    return calls


def captured(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Any) -> Callable[[], Any]:
    """The same evaluations, replayed as CUDA graphs; on a CPU, where there are none, the loop."""

    class Cell(torch.nn.Module):
        def forward(self, z, x):
            return f(z)

    layer = tdeq.DEQ(Cell(), solver=solver, tol=1e-12, max_steps=EVALUATIONS, graph=True)
    return lambda: layer(z0)


def run(
    device: torch.device, these: list[shapes.Shape], seconds: float, lose: Callable[[str], None]
) -> Iterator[Record]:
    """Time per evaluation over the bare cell's, one thread on a CPU, and operations per step. What is replayed as a
    CUDA graph is held against the bare cell in a graph. `wrong` where ours made fewer evaluations than were asked for,
    unless in bf16, where a solve ends when its state stands still; `lose` as in measure.attempt."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for shape in these:
                yield from _prices(shape, device, seconds, lose)
    finally:
        torch.set_num_threads(threads)


def _prices(shape: shapes.Shape, device: torch.device, seconds: float, lose: Callable[[str], None]) -> Iterator[Record]:
    plain = shape.cell == CELL and not shape.low
    case = f"step {f'{shape.rows}x{shape.features}' if plain else shape}"
    calls = contestants(shape, device)
    outcomes, faults = measure.attempt(calls, case, lambda: True, lose)
    made = {name: evaluations_of(outcome) for name, outcome in outcomes.items()}
    if not shape.low:
        faults |= {name: short(name, made[name]) for name in OURS if name in made}
    right = {name: call for name, call in calls.items() if not faults.get(name)}
    timed = measure.clock(right, device, seconds) if "bare cell" in right else {}
    alone = measure.replayed(right["bare cell"], device) if timed else None
    if alone:
        timed["bare cell, graph"] = measure.Timing(alone, alone, True)
    for name in dict.fromkeys([*calls, *timed]):
        record = {"goal": "steps", "case": case, "rows": shape.rows, "width": shape.features, "contestant": name}
        record |= {"cell": shape.cell, "low": shape.low, "wrong": faults.get(name)}
        if name in timed:
            base = timed.get("bare cell, graph" if name.endswith(", graph") else "bare cell")
            timing, steps = timed[name], made.get(name, EVALUATIONS)
            record |= {"seconds": timing.seconds / steps, "median": timing.median / steps, "steps": steps}
            record["least"] = timing.least / steps
            record["over_cell"] = record["seconds"] / (base.seconds / EVALUATIONS) if base else None
            record["ops"] = ops_per_step(OURS[name]) if name in OURS else None
        yield record


def evaluations_of(outcome: Any) -> int:
    """How many a call made: those of a solve of ours or of a rival, else EVALUATIONS."""
    if isinstance(outcome, tdeq.Solution):
        return int(outcome.steps.max())
    return outcome[1] if isinstance(outcome, tuple) else EVALUATIONS


def short(name: str, made: int) -> str | None:
    """Why a solve is none of EVALUATIONS evaluations, or None."""
    return None if made == EVALUATIONS else f"{name}: {made} evaluations, not {EVALUATIONS}"


def ops_per_step(solver: Any, first: int = 7, last: int = 10) -> float:
    """Operations per step beside the cell; views, bare allocations and host reads apart; torch backend on a CPU.

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
    """Evaluations until the worst row is at 1e-4, at three gains; None for a solver of ours that is not there in 200.
    `wrong` where our Anderson needs more than Picard."""
    rows, width = (8, 16) if suite == "tiny" else (256, 256)
    most = 200
    for gain in (0.5, 0.9, 1.2):
        f, z0 = problem(rows, width, gain, device)
        needed: dict[str, int | None] = {}
        with torch.no_grad():
            for name, solver in OURS.items():
                solution = tdeq.fixed_point(f, z0, solver=solver, tol=1e-4, max_steps=most)
                needed[name] = int(solution.steps.max()) if bool(solution.converged.all()) else None
            for name, solver in rivals.solvers().items():
                _, count = solver(f, z0, 1e-4, most)
                needed[name] = count if count < most else None
        for name, count in needed.items():
            fault = None
            if name == "Anderson(5)" and (count or most) > (needed["Picard"] or most):
                fault = f"{name}: {count or 'not in ' + str(most)} evaluations, Picard {needed['Picard']}, gain {gain}"
            elif name in OURS and count is None and gain < 1:
                fault = f"{name}: not at 1e-4 in {most} evaluations, gain {gain}"
            record = {"goal": "evaluations", "case": f"gain {gain}", "rows": rows, "width": width}
            yield record | {"contestant": name, "steps": count, "wrong": fault}
