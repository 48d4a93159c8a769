"""Counts what the kernels execute at the parameters that are shipped: python -m tests.ptx.counts --help.

Each row is one step of a solve, or one call of a norm, for one element of the state: the difference of two solves of
which one takes more steps. Instructions are those of the PTX, of which ptxas makes others; an instruction of a warp
counts 32 times. Beside them stands the least time that bytes and products need for 2^20 elements by the data sheet of
the GPU. That is a limit, and no estimate.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it at its import
os.environ["TRITONDEQ_CACHE"] = os.devnull

import torch

from tritondeq import Anderson, Broyden, Picard, backend
from tritondeq.kernels import devices, dispatch, launch
from tritondeq.loop import Settings, iterate

from . import Driver, Options

GPUS = {80: ("A100 SXM 80 GB", 2.0e12, 312e12), 90: ("H200", 4.8e12, 989e12)}  # bytes and bf16 FLOP a second
CLASSES = {  # by the beginning of an opcode, the first that fits
    "tensor": r"mma|wgmma\.mma",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos|div)\.",
    "global": r"(ld|st|atom|red)\.(\w+\.)*global|cp\.async\.c[ag]",
    "shared": r"(ld|st|atom|red)\.(\w+\.)*shared|ldmatrix|stmatrix",
    "lanes": r"shfl|vote|redux|bar",
    "float": r"\w+\.(\w+\.)*(f16|bf16|f32|f64)(x2)?$",
}
COLUMNS = ("all", *CLASSES, "other", "conflicts", "bytes", "FLOP", "us by bytes", "us by FLOP")


@dataclass
class Work:
    """A solve of so many steps, or calls of a norm, and the elements of a state that take each."""

    name: str
    elements: int
    run: Callable[[int], None]
    steps: tuple[int, int] = (3, 5)  # which both begin and end alike


def works(chip: int) -> Iterator[Work]:
    """Yields one program's work of every kernel."""
    for features, terms, batch in (
        (64, 2, 1),
        (64, 1, 1 << 20),
        (128, 2, 1),
        (128, 1, 1 << 20),
        (256, 2, 1),
        (256, 1, 1 << 20),
    ):
        yield whole(features, terms, batch, chip)
    for solver in (Picard(), Anderson(), Broyden()):
        for width in (2048, 8192):
            yield fused(solver, width)
    for terms in (1, 2, 3):
        yield product(terms)
    yield norms("residual_rms 1024", 16 * 1024, lambda: rms(16, 1024))
    yield norms("group_norm 8x8x32", 2 * 32 * 64, lambda: grouped(2, 32, 8))


def whole(features: int, terms: int, batch: int, chip: int) -> Work:
    """A tile of rows as it is shipped for such a batch."""
    shape = {"batch": batch, "shapes": ((features, features),), "terms": terms, "memory": 0}
    limits = {"shared": devices.shared_memory(torch.device("cpu")), "chip": chip}
    config = launch.rows(**shape, **limits)
    rows = config["BLOCK_B"]
    w, u = torch.randn(features, features) * features**-0.5, torch.randn(rows, features)
    choice = {name: config[name] for name in ("BLOCK_B", "STREAM", "num_warps")}

    def run(steps: int) -> None:
        with launch.override("rows.affine", choice):
            options = {"activation": "tanh", "tol": 1e-30, "max_steps": steps, "terms": terms}
            dispatch.load("rows.affine").solve(w, u, **options)

    return Work(f"rows.affine {features}, {terms} terms, {rows} rows", rows * features, run)


def fused(solver, width: int) -> Work:
    """A step of any cell, beside the cell; one sample."""
    z, c = torch.zeros(1, width), torch.randn(1, width)

    def run(steps: int) -> None:
        with backend("triton"):
            iterate(lambda z: 0.9 * torch.sin(z) + c, z, Settings(solver, 1e-30, steps))

    return Work(f"{solver.fused_steps} {width}", width, run, (7, 9))


def product(terms: int, rows: int = 64, features: int = 320) -> Work:
    """A step with its product, in the tile of a middle batch."""
    w, u = torch.randn(features, features) * features**-0.5, torch.randn(rows, features)

    def run(steps: int) -> None:
        with launch.override("steps.affine", {"TILE": launch.TILES[terms][-2]}):
            options = {"activation": "tanh", "tol": 1e-30, "max_steps": steps, "terms": terms}
            made = dispatch.load("steps.affine").solve(w, u, torch.zeros_like(u), **options)
            for _ in range(steps):
                made.take()

    return Work(f"steps.affine {features}, {terms} terms, {rows} rows", rows * features, run)


def norms(name: str, elements: int, call: Callable[[], None]) -> Work:
    return Work(name, elements, lambda steps: [call() for _ in range(steps)] and None, (0, 1))


def rms(rows: int, features: int) -> None:
    a, vector = torch.randn(rows, features), torch.ones(features)
    dispatch.load("norms.residual_rms").run(a, a, vector, vector, 1e-6)


def grouped(groups: int, channels: int, side: int) -> None:
    x = torch.randn(1, channels * groups, side, side).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(channels * groups)
    dispatch.load("norms.group_norm").run(x, x, vector, vector, groups, 1e-5, "before")


def count(work: Work, driver: Driver, chip: int) -> dict[str, float]:
    """Returns the columns of a work, per element and step."""
    totals = []
    for steps in work.steps:
        driver.reports.clear()
        torch.manual_seed(0)
        work.run(steps)
        total: Counter = Counter()
        for report in driver.reports:
            for op, times in report.classes.items():
                total[_class(op)] += 32 * times
                total["all"] += 32 * times
                total["FLOP"] += times * flop(op)
            total["bytes"] += sum(report.bytes.values())
            total["conflicts"] += sum(report.conflicts.values())
        totals.append(total)
    share = work.elements * (work.steps[1] - work.steps[0])
    row = {name: (totals[1][name] - totals[0][name]) / share for name in COLUMNS}
    _, bandwidth, rate = GPUS[chip]
    return row | {"us by bytes": row["bytes"] * 2**20 / bandwidth * 1e6, "us by FLOP": row["FLOP"] * 2**20 / rate * 1e6}


def _class(op: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, op)), "other")


def flop(op: str) -> int:
    """Returns the products and sums that one warp's share of an instruction of tensor cores makes."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", op)
    if not shape:
        return 0
    m, n, k = map(int, shape.groups())
    return 2 * m * n * k // (4 if op.startswith("wgmma") else 1)  # a wgmma is of four warps


def main() -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser("python -m tests.ptx.counts", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--chips", type=int, nargs="+", default=sorted(GPUS), choices=sorted(GPUS), help="by default both"
    )
    parser.add_argument("names", nargs="*", help="beginnings of names; all where there are none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for chip in arguments.chips:
        name, bandwidth, rate = GPUS[chip]
        print(f"sm_{chip}, {name}: {bandwidth / 1e12} TB/s, {rate / 1e12:.0f} TFLOP/s in bf16; per element and step")
        print(" " * 36 + "".join(column.rjust(13) for column in COLUMNS))
        with tempfile.TemporaryDirectory(prefix="ptx-") as folder:
            options = Options(lockstep=True, races="off", counts=True)
            driver = Driver(chip, options, cache_dir=folder).activate()
            for work in works(chip):
                if not arguments.names or work.name.startswith(tuple(arguments.names)):
                    row = count(work, driver, chip)
                    print(
                        work.name.ljust(36) + "".join(f"{row[column]:.4g}".rjust(13) for column in COLUMNS), flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
