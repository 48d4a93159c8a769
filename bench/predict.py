"""Times predicted from counts, never measured: `python -m tritondeq.bench.predict` prints the table of NOTES.md.

A model of one H200: rates that performance targets assume, bytes and FLOPs counted in the code, and cycles of a tile
counted in the machine code of the kernels (CYCLES.md). `seconds` gives the time of tritondeq on the device, `rival`
that of others, `table` what follows for each target of targets.py. The first round on a GPU decides what is true of it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..kernels import costs, launch
from . import cycles, solves, targets
from .common import markdown_table

MATRICES = {"affine": 1, "mlp": 4, "gated": 3}  # of D x D that a cell multiplies by, the MLP having 2 D hidden features
KERNELS = {"affine": 1, "mlp": 3, "gated": 3}  # that torch.compile makes of an evaluation
LAUNCH, SHORT = 2e-6, 1.5e-6  # of a kernel in a graph: what its launch costs, and the least that it runs
HOST, READ = 4.5e-6, 10e-6  # of an eager operation, and of a value that the host reads
COPY, MATMUL = costs.BANDWIDTH, costs.RATES
CACHE, PORT = 5.5e12, 112e9  # bytes / s of L2, and of it that one multiprocessor takes (64 a clock at 1.75 GHz)
LOAD = 43e9  # and with which it fetches weights at first
SLOWEST = 1.3  # evaluations of the slowest row over the mean, which ours pays
NEEDED = {1e-4: 12, 1e-2: 5}  # evaluations of the slowest row of an affine cell as it begins
TORCHDEQ = {"ops": 35, "passes": 21}  # of its Picard beside the cell: operations, and states read or written
READS = 0.27  # of the evaluations, those after which a tile reads what of W is streamed (streamed.py)
REFILL, IDLE = 1.5, 0.75  # steps that taking rows costs, and the share of lanes at work
DEEPEST, MEAN = 116, 16  # of uneven.py: average over tiles of 16 rows of the deepest, and of all


def gemm(rows: int, d: int, n: int, kind: str) -> float:
    """Seconds of [rows, d] x [d, n]: FLOPs, or the weights' bytes."""
    return max(2 * rows * d * n / MATMUL[kind], (2 if kind == "bf16" else 4) * d * n / COPY)


def tile(rows: int, d: int, terms: int, adjoint: bool = False) -> tuple[float, float]:
    """(seconds of a step of a tile of 16, rows x steps / s) of a whole solve of the affine cell, by CYCLES.md."""
    width = max(launch.block(d), 64)
    act = "fast_tanh" if terms == 1 else "tanh"
    if width < 256 or terms == 1:
        few, many = (cycles.Kernel("affine", width, terms, act, adjoint, rows) for rows in (cycles.FEW, cycles.MANY))
        return _cycles()[str(few)][0], _cycles()[str(many)][1]
    latency = _cycles()[str(cycles.Kernel("affine", width, 1, act, adjoint))][0]
    tiles = min(launch.PROCESSORS, -(-rows // 16))
    streamed = READS * 2 * width * width * (terms - 1) / min(PORT, CACHE / tiles)  # what does not fit is read again
    return latency + streamed, launch.PROCESSORS * 16 / (latency + streamed)


@cache
def _cycles() -> dict[str, tuple[float, float]]:
    return cycles.read()


def whole(rows: int, d: int, evaluations: float, terms: int, adjoint: bool = False) -> float:
    """Seconds of a whole solve in one launch."""
    latency, rate = tile(rows, d, terms, adjoint)
    weights = 2 * min(launch.block(d), 256) ** 2 * (1 if d > 128 else terms) / LOAD
    mean = evaluations / SLOWEST if rows * latency / 16 > evaluations * latency else evaluations
    return LAUNCH + weights + max(evaluations * latency, mean * rows / rate)


def loop(rows: int, d: int, evaluations: float, low: bool) -> float:
    """Seconds of a solve of a wide affine cell, one or two launches a step: the faster, by costs.affine_seconds."""
    kind = "bf16" if low else "fp32"
    return evaluations * min(costs.affine_seconds(rows=rows, features=d, terms=1 if low else 2, cell=kind))


def injected(rows: int, d: int, low: bool) -> float:
    """Of U x + b, which all compute once a solve."""
    return LAUNCH + max(SHORT, gemm(rows, d, d, "bf16" if low else "fp32"))


def seconds(cell: str, rows: int, d: int, evaluations: float, low: bool, train: bool) -> float | None:
    """Of a solve of ours, or a training step, on the device; None where there is no model."""
    terms = 1 if low else 2
    if cell in ("mlp", "gated"):
        if d != 128 or not low or train:
            return None
        act = "fast_gelu" if cell == "mlp" else "fast_tanh"
        latency, _ = _cycles()[str(cycles.Kernel(cell, d, terms, act))]
        return (
            injected(rows, d, low)
            + LAUNCH
            + 3e-6
            + max(evaluations, rows / 16 / launch.PROCESSORS * evaluations) * latency
        )
    if cell != "affine":
        return None
    if d > launch.FEATURES:
        return None if train else injected(rows, d, low) + loop(rows, d, evaluations, low)
    forward = injected(rows, d, low) + whole(rows, d, evaluations, terms)
    if not train:
        return forward
    products = 3 * injected(rows, d, low=False)  # the cell at z*, dW, dU
    return forward + whole(rows, d, evaluations, terms, adjoint=True) + products + 8 * (LAUNCH + SHORT)


def step_of(rows: int, d: int, low: bool, cell: str = "affine", passes: int = 3) -> float:
    """Of the cell compiled, in a graph: its products, the activations in them, and the states it reads and writes."""
    kind, size = ("bf16", 2) if low else ("fp32", 4)
    work = MATRICES[cell] * gemm(rows, d, d, kind) + (passes - 1) * KERNELS[cell] * rows * d * size / COPY
    return KERNELS[cell] * LAUNCH + max(KERNELS[cell] * SHORT, work)


def rival(name: str, cell: str, rows: int, d: int, evaluations: int, low: bool, train: bool) -> float | None:
    """Of a rival, or None where there is no model."""
    if cell not in MATRICES:
        return None
    kind, size = ("bf16", 2) if low else ("fp32", 4)
    state = rows * d * size
    if name == "torchdeq Picard":
        ops = TORCHDEQ["ops"] + 2 * KERNELS[cell]
        moved = (TORCHDEQ["passes"] + 3 * KERNELS[cell]) * state / COPY + MATRICES[cell] * gemm(rows, d, d, kind)
        return (2 if train else 1) * evaluations * (max(ops * HOST, moved) + READ) + injected(rows, d, low)
    if name == "compiled tied loop" and not train:
        return injected(rows, d, low) + evaluations * step_of(rows, d, low, cell)
    if name == "compiled untied stack" and train and cell == "affine":
        # Forward two products; backward four, and the slope of the activation.
        return evaluations * (2 * step_of(rows, d, low) + 4 * step_of(rows, d, low, passes=1) + LAUNCH + SHORT)
    return None


def case(one: solves.Case, name: str | None = None) -> float | None:
    """Seconds of tritondeq in a case of solves.py, or of the rival of that name."""
    evaluations = one.steps or NEEDED[one.tol]
    shape = one.cell, one.rows, one.width, evaluations, one.low, one.train
    return seconds(*shape) if name is None else rival(name, *shape)


def record(r: dict) -> float | None:
    """Seconds of tritondeq for a record of a whole solve, with the evaluations that it took."""
    if r.get("cell") is None or r["goal"] in ("steps", "G9"):
        return None
    return seconds(r["cell"], r["rows"], r["width"], r["steps"], r["low"], r["train"])


MARKS = "<!-- predictions: written by tritondeq.bench.predict, not by hand -->\n", "<!-- /predictions -->"


@dataclass(frozen=True)
class Prediction:
    """`value` in the unit of its target, None where nothing can be said; `why`: from what, and what would help."""

    value: float | None
    why: str


def table() -> dict[str, Prediction]:
    """By the key of the target; the worst case of the full suite decides."""
    ratios = {key: _worst(*of) for key, of in RATIOS.items()}
    return ratios | {key: make() for key, make in OTHERS.items()}


def _worst(goal: str, name: str) -> Prediction:
    found = []
    for one in solves.cases("full", cuda=True):
        if one.goal == goal and (one.compiled or "compiled" not in name):
            ours, theirs = case(one), case(one, name)
            if ours and theirs:
                found.append((theirs / ours, f"{one}: ours {_time(ours)}, theirs {_time(theirs)}"))
    return Prediction(*min(found))


def _rate() -> Prediction:
    found = []
    for one in solves.cases("full", cuda=True):
        if one.goal == "G3":
            work = 2 * one.rows * one.width**2 * NEEDED[one.tol] / SLOWEST
            found.append((work / case(one) / MATMUL["bf16"], f"{one}: ours {_time(case(one))}"))
    return Prediction(*min(found))


def _device(width: int) -> Prediction:
    found = [
        (case(one), str(one)) for one in solves.cases("full", cuda=True) if one.goal == "G5" and one.width == width
    ]
    return Prediction(*max(found))


def _uneven() -> Prediction:
    ours = MEAN / IDLE * (1 + REFILL / (MEAN / 2))
    return Prediction(
        DEEPEST / ours, f"{DEEPEST} steps a tile in lockstep, {ours:.0f} with rows taken as lanes fall idle"
    )


def _price(rows: int, d: int, launches: int, states: float) -> Prediction:
    state = 4 * rows * d
    cell = 2 * LAUNCH + max(SHORT, gemm(rows, d, d, "fp32")) + max(SHORT, 2 * state / COPY)
    step = launches * LAUNCH + max(launches * SHORT, states * state / COPY)
    times = f"the cell {_time(cell)}, the step {_time(step)}"
    return Prediction(1 + step / cell, f"{times}: {states} states, {launches} launch{'es' if launches > 1 else ''}")


def _block() -> Prediction:
    k, beside = 6, 1.1
    why = f"{k} evaluations: {k} + 1 + {k} + 2 units of work against 3 x {k}, a tenth for the steps; our cell compiled"
    return Prediction((2 * k + 3) / (3 * k) * beside, why)


def _counted(value: float, why: str) -> Callable[[], Prediction]:
    return lambda: Prediction(value, why)


RATIOS = {
    "G1 torchdeq": ("G1", "torchdeq Picard"),
    "G1 compiled": ("G1", "compiled tied loop"),
    "G2 torchdeq": ("G2", "torchdeq Picard"),
    "G2 explicit": ("G2", "compiled untied stack"),
    "G3 compiled": ("G3", "compiled tied loop"),
    "G4 torchdeq": ("G4", "torchdeq Picard"),
    "G4 compiled": ("G4", "compiled tied loop"),
    "G11 torchdeq": ("G11", "torchdeq Picard"),
    "G11 compiled": ("G11", "compiled tied loop"),
}
OTHERS = {
    "G3 rate": _rate,
    "G5 D 256": lambda: _device(256),
    "G5 D 1024": lambda: _device(1024),
    "G6": _uneven,
    "G7 Picard": lambda: _price(4096, 1024, 1, 3),
    "G7 Anderson(5)": lambda: _price(4096, 1024, 1, 16),
    "G8 Picard": lambda: _price(32, 64, 1, 3),
    "G8 Anderson(5)": lambda: _price(32, 64, 1, 16),
    "G9 time": _block,
    "G9 memory": _counted(1.0, "nothing that is kept depends on the steps"),
    "G10 flat": _counted(1.0, "nothing that is kept depends on the steps"),
    "G10 states": _counted(2 * targets.MEMORY + 3, "two iterates in rotation, the best, two rings"),
    "G12 launches, Picard": _counted(1, "one kernel a step"),
    "G12 syncs, Picard": _counted(0, "the flag is read a look late"),
    "G12 launches, Anderson(5)": _counted(2, "one kernel for dots, one that mixes, where programs share a sample"),
    "G12 syncs, Anderson(5)": _counted(0, "the flag is read a look late"),
}
# What could reach a target that is predicted to be missed, or nearly so.
DESIGNS = {
    "G1 torchdeq": "of float32 weights at D 256 one bf16 term stays and the other is read from L2 after a quarter of "
    "the evaluations; two multiprocessors that share a tile (clusters) would hold both",
    "G1 compiled": "of few rows a tile by mma takes 0.6 us for its products and 0.3 us for sums and barriers, so that "
    "3x leaves nothing for the rest: only multiprocessors that share a tile and its products (clusters) are faster",
    "G2 torchdeq": "as G1: forward and adjoint are the same kernel",
    "G2 explicit": "as G1",
    "G3 compiled": "at D 256 the products and the instructions of a lone program take turns; two that share a "
    "multiprocessor, each with half of W's columns, would overlap them",
    "G3 rate": "as the line above",
    "G4 torchdeq": "cuBLAS and a fused step, which costs.affine_seconds chooses where it is faster",
    "G4 compiled": "it is bf16 that misses it: our state is float32, 22 bytes an element a step against 6. Increments "
    "could stay in bf16 between steps. In float32 the target is reached",
    "G5 D 256": "as G1; with operands='bf16' it is about half",
    "G5 D 1024": "W spread over the chip, with a barrier a step, in one launch",
    "G6": "smaller tiles, which wait for fewer rows",
    "G7 Picard": "an activation left to the step (`Cell.tail`), which saves two passes of the cell's",
    "G7 Anderson(5)": "half=True, 2.5 states less",
    "G8 Picard": "an activation left to the step (`Cell.tail`) is no kernel more than the bare cell has; for any cell "
    "only a launch that overlaps the one before it (programmatic dependent launch)",
    "G9 time": "`graph=True` around the compiled cell",
    "G11 torchdeq": "64 rows a tile, by wgmma",
    "G11 compiled": "as the line above",
}


def rows() -> Iterator[list[str]]:
    """Of each target: its bound, what is predicted, whether that reaches it, and why."""
    predicted = table()
    yield ["target", "bound", "predicted", "reaches it", "worst case, or why"]
    for target in targets.TARGETS:
        if target.kind == "cuda":
            one = predicted[target.key]
            sign = "at most" if target.most else "at least"
            reaches = "yes" if target.met(one.value) else "**no**"
            yield [target.key, f"{sign} {target.show(target.bound)}", target.show(one.value), reaches, one.why]


def times() -> Iterator[list[str]]:
    """Of each whole solve and training step of the full suite: ours and two rivals."""
    yield ["case", "evaluations", "tritondeq", "torchdeq Picard", "compiled, explicit"]
    for one in solves.cases("full", cuda=True):
        if one.goal != "depth":
            explicit = case(one, "compiled untied stack" if one.train else "compiled tied loop")
            found = [case(one), case(one, "torchdeq Picard"), explicit]
            yield [str(one), str(one.steps or NEEDED[one.tol]), *(_time(t) if t else "" for t in found)]


def markdown() -> str:
    """All that NOTES.md holds of it."""
    lines = [*markdown_table(list(rows())), "", "What could reach those that are predicted to be missed:", ""]
    predicted = table()
    for target in targets.TARGETS:
        if target.kind == "cuda" and not target.met(predicted[target.key].value):
            lines.append(f"* {target.key}: {DESIGNS[target.key]}")
    return "\n".join([*lines, "", *markdown_table(list(times()))])


def _time(t: float) -> str:
    return f"{t * 1e6:.0f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms"


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, or with --write puts them between the marks of NOTES.md."""
    parser = argparse.ArgumentParser("python -m tritondeq.bench.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it between the marks of this file, of NOTES.md")
    path = parser.parse_args(argv).write
    if path is None:
        print(markdown())
        return
    path.write_text(into(path.read_text()))


def into(text: str) -> str:
    """`text` with what stands between its marks made new."""
    begin, end = MARKS
    return text[: text.index(begin) + len(begin)] + markdown() + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    main()
