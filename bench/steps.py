"""The price of one step of the loop over the bare cell's (G7, G8, the CPU targets), and evaluations needed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, rivals

Record = dict[str, Any]
EVALUATIONS = 24  # two windows of the stop rules
OURS = {"Picard": tdeq.Picard(), "Anderson(5)": tdeq.Anderson(memory=5)}
TARGETS = {  # most time per evaluation over the bare cell's
    ("cpu", 256, 256): {"Picard": 1.15, "Anderson(5)": 2.0},
    ("cpu", 32, 64): {"Picard": 3.0, "Anderson(5)": 8.0},
    ("cuda", 4096, 1024): {"Picard": 1.15, "Anderson(5)": 1.6},
    ("cuda", 32, 64): {"Picard": 1.3, "Anderson(5)": 2.0},
}
OPS = {"Picard": 12, "Anderson(5)": 24}  # most operations of a step beside the cell


def problem(rows: int, width: int, gain: float, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """z = tanh(W z + u), W normal with spectral radius about `gain`, and where to start."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(width, width, generator=generator) * gain / math.sqrt(width)
    u = torch.randn(rows, width, generator=generator)
    w, u = w.to(device), u.to(device)
    return (lambda z: torch.tanh(torch.addmm(u, z, w.mT))), torch.zeros_like(u)


def shapes(suite: str, cuda: bool) -> list[tuple[int, int]]:
    if suite == "tiny":
        return [(8, 16)]
    return [(4096, 1024), (32, 64)] if cuda else [(256, 256), (32, 64)]


def contestants(rows: int, width: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Each makes EVALUATIONS evaluations of a slow problem (gain 1.2), which none of them finishes."""
    f, z0 = problem(rows, width, 1.2, device)

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


def run(device: torch.device, suite: str, seconds: float) -> Iterator[Record]:
    """Time per evaluation over the bare cell's, one thread on a CPU, and operations per step."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for rows, width in shapes(suite, device.type == "cuda"):
                yield from _prices(rows, width, device, seconds)
    finally:
        torch.set_num_threads(threads)


def _prices(rows: int, width: int, device: torch.device, seconds: float) -> Iterator[Record]:
    timed = measure.clock(contestants(rows, width, device), device, seconds)
    bare = timed["bare cell"].seconds
    for name, timing in timed.items():
        yield {
            "goal": "steps",
            "case": f"step {rows}x{width}",
            "rows": rows,
            "width": width,
            "contestant": name,
            "seconds": timing.seconds / EVALUATIONS,
            "median": timing.median / EVALUATIONS,
            "least": timing.least / EVALUATIONS,
            "over_cell": timing.seconds / bare,
            "target": TARGETS.get((device.type, rows, width), {}).get(name),
            "ops": ops_per_step(OURS[name]) if name in OURS else None,
            "most_ops": OPS.get(name),
            "wrong": None,
        }


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
