"""What tritondeq is to reach, G1 to G12 on a GPU and the counts and prices on a CPU, held against a results file.

`verdicts` says of each target: met, missed and by how much, or not measured. The worst case decides.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

Record = dict[str, Any]
Values = list[tuple[str, float]]  # (case, what was measured of it)
MEMORY = 4  # of the Anderson whose states are counted


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        key: Unique: G1 to G12, or CPU, and what of it.
        what: In words.
        bound: Of what is measured.
        most: Whether that is the most it may be, else the least.
        measured: All cases of a file that it speaks of.
        unit: "x", "us", "%" or "".
        kind: Of the machine, "cuda" or "cpu".
    """

    key: str
    what: str
    bound: float
    most: bool
    measured: Callable[[list[Record], dict[str, float]], Values]
    unit: str = "x"
    kind: str = "cuda"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def show(self, value: float) -> str:
        scale = {"us": 1e6, "%": 100}.get(self.unit, 1)
        digits = ".3g" if self.unit != "x" or value * scale < 100 else ".0f"
        return f"{value * scale:{digits}}{'' if self.unit in ('x', '%', '') else ' '}{self.unit}"


@dataclass(frozen=True)
class Verdict:
    """`state`: "met", "missed" or "not measured"; `value` and `case` of the worst case; `by`: of a missed one, what is
    missing, as a factor above 1."""

    target: Target
    state: str
    case: str | None = None
    value: float | None = None
    by: float | None = None
    cases: int = 0

    def __str__(self) -> str:
        if self.state != "missed":
            return self.state
        return f"missed by {self.by:.2f}x" if math.isfinite(self.by) else "missed"


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Of every target for the machine of a results file. Records of results that were wrong count for nothing."""
    records = [r for r in results["records"] if not r.get("wrong")]
    found = []
    for target in TARGETS:
        if target.kind == results["machine"]["kind"]:
            found.append(verdict(target, target.measured(records, results["roofs"])))
    return found


def verdict(target: Target, values: Values) -> Verdict:
    if not values:
        return Verdict(target, "not measured")
    case, value = (max if target.most else min)(values, key=lambda one: one[1])
    if target.met(value):
        return Verdict(target, "met", case, value, None, len(values))
    worse, better = (value, target.bound) if target.most else (target.bound, value)
    return Verdict(target, "missed", case, value, worse / better if better else math.inf, len(values))


def plain(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts as values of JSON."""
    found = []
    for one in verdicts(results):
        values = {k: v for k, v in asdict(one).items() if k != "target"}
        target = one.target
        found.append({"key": target.key, "what": target.what, "bound": target.bound, "most": target.most, **values})
    return found


def of_step(kind: str, rows: int, width: int, contestant: str) -> float | None:
    """Most time per evaluation over the bare cell's that a contestant may take, or None."""
    return STEPS.get((kind, rows, width), {}).get(contestant)


STEPS = {
    ("cpu", 256, 256): {"Picard": 1.15, "Anderson(5)": 2.0},
    ("cpu", 32, 64): {"Picard": 3.0, "Anderson(5)": 8.0},
    ("cuda", 4096, 1024): {"Picard": 1.15, "Anderson(5)": 1.6},
    ("cuda", 32, 64): {"Picard, graph": 1.3, "Anderson(5), graph": 2.0},
}
OPS = {"Picard": 12, "Anderson(5)": 24}  # most torch operations of a step beside the cell
LAUNCHES = {"Picard": 1, "Anderson(5)": 2}  # most launches of a step beside the cell


def _over(goal: str, contestant: str, low: bool | None = None):
    """How many times as long a contestant takes as ours."""

    def measured(records: list[Record], roofs: dict[str, float]) -> Values:
        of = (r for r in records if r["goal"] == goal and r["contestant"] == contestant and "over_ours" in r)
        return [(r["case"], r["over_ours"]) for r in of if low is None or r.get("low") is low]

    return measured


def _rate(records: list[Record], roofs: dict[str, float]) -> Values:
    """Share of the measured bf16 matmul rate."""
    ours = (r for r in records if r["goal"] == "G3" and r["contestant"] == "tritondeq" and "seconds" in r)
    return [(r["case"], r["flops"] / r["seconds"] / roofs["bf16"]) for r in ours if "bf16" in roofs]


def _device(width: int):
    def measured(records: list[Record], roofs: dict[str, float]) -> Values:
        ours = (r for r in records if r["goal"] == "G5" and r["contestant"] == "tritondeq" and r["width"] == width)
        return [(r["case"], r["device_seconds"]) for r in ours if r.get("device_seconds")]

    return measured


def _step(rows: int, width: int, contestant: str):
    def measured(records: list[Record], roofs: dict[str, float]) -> Values:
        of = (r for r in records if r["goal"] == "steps" and (r["rows"], r["width"]) == (rows, width))
        return [(r["case"], r["over_cell"]) for r in of if r["contestant"] == contestant]

    return measured


def _ops(contestant: str, field: str = "ops", goal: str = "steps"):
    def measured(records: list[Record], roofs: dict[str, float]) -> Values:
        of = (r for r in records if r["goal"] == goal and r["contestant"] == contestant)
        return [(r["case"], r[field]) for r in of if r.get(field) is not None]

    return measured


def _block(records: list[Record], roofs: dict[str, float]) -> Values:
    """The faster of ours over the compiled tied loop."""
    found = []
    for case in dict.fromkeys(r["case"] for r in records if r["goal"] == "G9" and "seconds" in r):
        times = {r["contestant"]: r["seconds"] for r in records if r["case"] == case and "seconds" in r}
        ours = [seconds for name, seconds in times.items() if name.startswith("tritondeq")]
        if ours and "compiled tied loop" in times:
            found.append((case, min(ours) / times["compiled tied loop"]))
    return found


def _growth(net: str, contestants: Iterable[str]):
    """Most over least memory against the number of steps."""

    def measured(records: list[Record], roofs: dict[str, float]) -> Values:
        found = []
        of = [r for r in records if r["goal"] == "G10" and r.get("net", "Affine") == net and r.get("bytes")]
        for name in contestants:
            each = [r["bytes"] for r in of if r["contestant"] == name]
            if len(each) > 1:
                found.append((f"{net}, {name}", max(each) / min(each)))
        return found

    return measured


def _states(records: list[Record], roofs: dict[str, float]) -> Values:
    of = (r for r in records if r["goal"] == "states" and r["contestant"] == f"Anderson({MEMORY})")
    return [(r["case"], r["states"]) for r in of]


def _table() -> Iterable[Target]:
    torchdeq, graphs = "torchdeq Picard", "compiled tied loop"
    yield Target("G1 torchdeq", "whole solve, D 64-256: torchdeq's Picard over ours", 20, False, _over("G1", torchdeq))
    yield Target("G1 compiled", "the same: compiled steps in CUDA graphs over ours", 3, False, _over("G1", graphs))
    yield Target("G2 torchdeq", "training step: torchdeq's over ours", 10, False, _over("G2", torchdeq))
    stack = _over("G2", "compiled untied stack")
    yield Target("G2 explicit", "training step: the compiled untied stack's over ours", 1, False, stack)
    yield Target("G3 compiled", "1,048,576 rows, bf16: compiled over ours", 2, False, _over("G3", graphs, low=True))
    yield Target("G3 rate", "the same: share of the measured matmul rate", 0.45, False, _rate, "%")
    yield Target("G4 torchdeq", "D 512-2048: torchdeq's Picard over ours", 3, False, _over("G4", torchdeq))
    yield Target("G4 compiled", "the same: compiled steps over ours", 1.2, False, _over("G4", graphs))
    yield Target("G5 D 256", "20 steps, 1-64 rows, on the device", 60e-6, True, _device(256), "us")
    yield Target("G5 D 1024", "20 steps, 1-64 rows, on the device", 150e-6, True, _device(1024), "us")
    yield Target("G6", "rows of 5 to 200 steps: lockstep over ours", 3, False, _over("G6", "lockstep"))
    for name in ("Picard", "Anderson(5)"):
        bound = STEPS["cuda", 4096, 1024][name]
        what = f"a step of {name} with its cell over the bare cell's, 4096x1024"
        yield Target(f"G7 {name}", what, bound, True, _step(4096, 1024, name))
    for name in ("Picard", "Anderson(5)"):
        bound = STEPS["cuda", 32, 64][f"{name}, graph"]
        what = f"the same in CUDA graphs, {name}, 32x64"
        yield Target(f"G8 {name}", what, bound, True, _step(32, 64, f"{name}, graph"))
    yield Target("G9 time", "Transformer training step over the compiled tied loop's", 1.2, True, _block)
    growth = _growth("Transformer", ["tritondeq"])
    yield Target("G9 memory", "the same: most over least memory, by steps", 1.01, True, growth)
    growth = _growth("Affine", ["tritondeq", "tritondeq Anderson"])
    yield Target("G10 flat", "training memory: most over least, by steps", 1.01, True, growth)
    what = f"states that Anderson({MEMORY}) keeps beside the cell"
    yield Target("G10 states", what, 2 * MEMORY + 3, True, _states, "")
    yield Target(
        "G11 torchdeq", "Gated and MLP, 4096 rows: torchdeq's Picard over ours", 10, False, _over("G11", torchdeq)
    )
    yield Target("G11 compiled", "the same: compiled steps over ours", 2, False, _over("G11", graphs))
    for name, bound in LAUNCHES.items():
        launches, syncs = _ops(name, "launches", "G12"), _ops(name, "syncs", "G12")
        yield Target(f"G12 launches, {name}", "launches of a step beside the cell", bound, True, launches, "")
        yield Target(f"G12 syncs, {name}", "host syncs of a step", 0, True, syncs, "")
    for (kind, rows, width), bounds in STEPS.items():
        if kind == "cpu":
            for name, bound in bounds.items():
                what = f"a step of {name} with its cell over the bare cell's, {rows}x{width}"
                yield Target(f"CPU {rows}x{width} {name}", what, bound, True, _step(rows, width, name), kind=kind)
    for name, bound in OPS.items():
        what = f"torch operations of a step of {name} beside the cell"
        yield Target(f"CPU ops {name}", what, bound, True, _ops(name), "", "cpu")


TARGETS = tuple(_table())
