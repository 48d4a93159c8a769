"""Targets held against results, predictions beside them, and the pictures: from records made up here."""

import math
from pathlib import Path

import pytest

from tritondeq.bench import cycles, pictures, predict, report, solves, steps, targets
from tritondeq.kernels import costs

NOTES = Path(__file__).parent.parent / "bench" / "NOTES.md"
ROOFS = {"copy": 4e12, "fp32": 5e13, "bf16": 8e14}
NAMES = ("speedup", "limit", "step", "memory", "depth")
CUDA = [target for target in targets.TARGETS if target.kind == "cuda"]


def results(records, kind="cuda"):
    machine = dict.fromkeys(("device", "threads", "load", "torch", "triton", "torchdeq", "commit"), "made up")
    machine |= {"kind": kind, "backend": "triton" if kind == "cuda" else "torch"}
    found = {"schema": 1, "suite": "full", "complete": True, "machine": machine, "roofs": ROOFS}
    return found | {"tests": None, "left_out": [], "records": records}


def solve(goal, contestant, over, **more):
    record = {"goal": goal, "case": f"{goal} case", "contestant": contestant, "seconds": 1e-3 * over, "over_ours": over}
    record |= {"rows": 64, "width": 128, "cell": "affine", "low": False, "train": goal == "G2", "steps": 12}
    return record | {"wrong": None, "flops": 1e9, "of_limit": 0.5} | more


def made_up(target, value):
    """Records in which exactly this target's measured value is that."""
    goal, _, what = target.key.partition(" ")
    if goal in ("G1", "G2", "G4", "G11", "G6") or target.key == "G3 compiled":
        name = {"torchdeq": "torchdeq Picard", "explicit": "compiled untied stack", "": "lockstep"}
        low = goal == "G3"
        return [solve(goal, name.get(what, "compiled tied loop"), value, low=low), solve(goal, "tritondeq", 1, low=low)]
    if target.key == "G3 rate":
        return [solve("G3", "tritondeq", 1, flops=value * 1e-3 * ROOFS["bf16"])]
    if goal == "G5":
        return [solve("G5", "tritondeq", 1, width=int(what.split()[1]), device_seconds=value)]
    if goal in ("G7", "G8") or (goal == "CPU" and "x" in what):
        size = {"G7": "4096x1024", "G8": "32x64"}.get(goal) or what.split()[0]
        rows, width = map(int, size.split("x"))
        name = what.split()[-1] + (", graph" if goal == "G8" else "")
        step = {"goal": "steps", "case": f"step {size}", "rows": rows, "width": width, "contestant": name}
        return [step | {"over_cell": value, "seconds": 1e-5, "wrong": None}]
    if target.key == "G9 time":
        names = {"tritondeq": 2 * value, "tritondeq, compiled cell": value, "compiled tied loop": 1.0, "tied loop": 1.3}
        return [solve("G9", name, 1, case="G9", seconds=1e-3 * t) for name, t in names.items()]
    if target.key in ("G9 memory", "G10 flat"):
        net = "Affine" if goal == "G10" else "Transformer"
        record = {"goal": "G10", "contestant": "tritondeq", "net": net, "rows": 4, "width": 8, "wrong": None}
        sizes = {4: 10**6, 64: value * 10**6}
        return [record | {"steps": n, "case": f"G10 {net} 4x8 {n} steps", "bytes": b} for n, b in sizes.items()]
    if target.key == "G10 states":
        return [{"goal": "states", "case": "states", "contestant": "Anderson(4)", "states": value, "wrong": None}]
    solver = what.split()[-1]
    if goal == "CPU":
        return [
            {"goal": "steps", "case": "step", "rows": 1, "width": 1, "contestant": solver, "ops": value, "over_cell": 1}
        ]
    kind = what.split(",")[0]
    others = {"launches": 0, "syncs": 0, "copies": 0, "looks": 0, "wrong": None}
    return [{"goal": "G12", "case": "G12", "contestant": solver} | others | {kind: value}]


def of(target, records):
    (found,) = [v for v in targets.verdicts(results(records, target.kind)) if v.target is target]
    return found


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.key)
def test_a_target_is_met_at_its_bound_and_missed_beyond(target):
    assert str(of(target, [])) == "not measured"
    at = of(target, made_up(target, target.bound))
    assert (at.state, at.by, at.cases) == ("met", None, 1) and at.value == pytest.approx(target.bound)
    worse = target.bound * (1.25 if target.most else 0.8) or 0.5
    beyond = of(target, made_up(target, worse))
    assert beyond.state == "missed" and beyond.value == pytest.approx(worse)
    assert beyond.by == (pytest.approx(1.25) if target.bound else math.inf)
    assert str(beyond) == ("missed by 1.25x" if target.bound else "missed")
    wrong = [record | {"wrong": "is wrong"} for record in made_up(target, target.bound)]
    assert of(target, wrong).state == "not measured"


def test_the_worst_case_decides():
    target = next(t for t in targets.TARGETS if t.key == "G1 torchdeq")
    records = [solve("G1", "torchdeq Picard", over, case=f"G1 {over}") for over in (31, 12, 25)]
    verdict = of(target, records)
    assert (verdict.case, verdict.value, verdict.cases, verdict.state) == ("G1 12", 12, 3, "missed")


def test_a_file_has_the_targets_of_its_machine():
    for kind in ("cpu", "cuda"):
        keys = [one["key"] for one in targets.plain(results([], kind))]
        assert keys == [t.key for t in targets.TARGETS if t.kind == kind] and len(set(keys)) == len(keys)
        assert all(key.startswith("CPU") == (kind == "cpu") for key in keys)
    goals = {t.key.split()[0] for t in CUDA}
    assert goals == {f"G{n}" for n in range(1, 13)}


def test_every_goal_of_a_suite_has_a_target():
    goals = {case.goal for case in solves.cases("full", cuda=True)} - {"depth"}
    assert goals <= {t.key.split()[0] for t in CUDA}
    for cuda in (True, False):
        kind = "cuda" if cuda else "cpu"
        sizes = {(kind, shape.rows, shape.features) for shape in steps.suite_shapes("quick", cuda)}
        assert sizes == {size for size in targets.STEPS if size[0] == kind}


def test_each_target_has_a_prediction_and_those_it_misses_a_design():
    predicted = predict.table()
    assert list(predicted.keys() ^ {t.key for t in CUDA}) == []
    for target in CUDA:
        assert predicted[target.key].value >= 0 and predicted[target.key].why
        assert target.met(predicted[target.key].value) or predict.DESIGNS[target.key]


def test_the_notes_hold_what_is_predicted():
    text = NOTES.read_text()
    command = "python -m tritondeq.bench.predict --write bench/NOTES.md"
    assert predict.into(text) == text, command
    begin, end = predict.MARKS
    before = text[: text.index(begin)]
    assert "**Predicted, not measured**" in before[before.rindex("\n## ") :] and predict.markdown() in text


def test_predictions_follow_the_work():
    for more in ({"rows": 8 << 13}, {"evaluations": 24}, {"d": 256}):
        shape = {"cell": "affine", "rows": 1 << 13, "d": 128, "evaluations": 12, "low": False, "train": False}
        assert predict.seconds(**shape | more) > 1.2 * predict.seconds(**shape)
        assert predict.rival("compiled tied loop", **shape | more) > predict.rival("compiled tied loop", **shape)
        assert predict.seconds(**shape | {"train": True}) > 2 * predict.seconds(**shape)
        assert predict.seconds(**shape | {"low": True}) <= predict.seconds(**shape)
    wide = predict.loop(4096, 1024, 10, low=False)
    assert wide == 10 * min(costs.affine_seconds(rows=4096, features=1024, terms=2, cell="fp32"))
    assert predict.seconds("conv", 8, 128, 12, False, False) is None
    assert predict.seconds("gated", 4096, 64, 5, True, False) is None


def test_a_model_of_one_tile_against_its_arithmetic():
    """64 rows of width 128, one bf16 term: a launch, 32 KiB of weights, 12 steps of a tile alone."""
    few, many = (cycles.read()[f"affine 128, 1 term, fast_tanh, {rows}"] for rows in ("few rows", "many"))
    assert predict.whole(64, 128, 12, 1) == pytest.approx(2e-6 + 2 * 128 * 128 / 43e9 + 12 * few[0])
    full = predict.whole(1 << 20, 128, 13, 1)
    assert full == pytest.approx(2e-6 + 2 * 128 * 128 / 43e9 + 10 * (1 << 20) / many[1])


def test_a_model_of_a_tile_that_reads_what_does_not_fit():
    """Width 256 in two terms: 128 KiB after 27 % of the evaluations, from a port of its own or from a shared cache."""
    alone, _ = cycles.read()["affine 256, 1 term, tanh, few rows"]
    latency, rate = predict.tile(16, 256, 2)
    assert latency == pytest.approx(alone + 0.27 * 131072 / 112e9)
    assert rate == pytest.approx(132 * 16 / latency)
    assert predict.tile(1 << 20, 256, 2)[0] == pytest.approx(alone + 0.27 * 131072 * 132 / 5.5e12)


def test_the_report_sets_predictions_beside_what_was_measured():
    guess = predict.seconds("affine", 64, 128, 12, False, False)
    ours = solve("G1", "tritondeq", 1, seconds=3 * guess, device_seconds=2 * guess)
    rows = next(rows for title, rows in report._tables(results([ours])) if title.startswith("Whole solve"))
    assert dict(zip(*rows, strict=True))["predicted / measured"] == "0.50"
    made = results(made_up(next(t for t in CUDA if t.key == "G7 Picard"), 1.2))
    text = report.table(made)
    (line,) = [line for line in text.splitlines() if line.startswith("| G7 Picard")]
    assert "| at most 1.15x | step 4096x1024 | 1.2x | missed by 1.04x | 1.09x | 0.91 |" in line
    assert "| G6 | rows of 5 to 200 steps: lockstep over ours | at least 3x |  |  | not measured | 4.58x |  |" in text


def test_nothing_is_predicted_in_the_report_of_a_cpu():
    assert "predicted" not in report.table(results([solve("G1", "tritondeq", 1)], kind="cpu"))


def everything():
    """A file with records of every kind."""
    records = [record for target in CUDA for record in made_up(target, 1.5 * target.bound)]
    for name in ("tritondeq", "eager loop", "torchdeq Picard", "compiled tied loop"):
        records += [solve("depth", name, n, case=f"depth 64x128 fp32 forward {n} steps", steps=n) for n in (4, 16, 64)]
    return results(records)


def test_a_readme_shows_targets_and_pictures_of_a_gpu():
    text = report.summary(everything())
    assert text.count("| G5 D 256 |") == 1 and "](bench/results/made-up-speedup.png)" in text
    assert "| G1 case | 12 | 1.00 ms |" in report.table(everything()) and "| G2 case |" in report.table(everything())
    assert "says nothing of the Triton kernels" not in text


def test_all_pictures_are_drawn_and_show_something(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    paths = pictures.draw(everything(), tmp_path)
    assert [path.stem for path in paths] == [f"made-up-{name}" for name in NAMES]
    for path in paths:
        image = pyplot.imread(path)
        assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.05
    assert pictures.draw(results([]), tmp_path) == []


def test_a_contestant_looks_alike_in_all_pictures_and_like_no_other():
    for together in (
        ("tritondeq", "tritondeq Anderson", "eager loop", "eager Anderson", "torchdeq Picard", "torchdeq Anderson")
        + ("tied loop", "untied stack", "compiled tied loop", "compiled untied stack", "compiled cell in a loop"),
        ("Picard", "Anderson(5)", "Picard, graph", "Anderson(5), graph", "torchdeq Picard", "torchdeq Anderson(6)"),
        ("tritondeq", "tritondeq Anderson", "tritondeq Unrolled", "tied loop", "untied stack"),
    ):
        assert len({tuple(pictures.style(name).items()) for name in together}) == len(together)
