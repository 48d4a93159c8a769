"""What the bench times, and that nothing is timed that is wrong, cannot run or takes too long."""

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import blocks, measure, rivals, shapes, solves, suspect

CPU = torch.device("cpu")


def record(contestant="tritondeq", **more):
    return {"kind": "solve", "case": "a case", "contestant": contestant, "wrong": None, "seconds": 1e-3} | more


@pytest.mark.parametrize(
    "figure, reason",
    [
        ({"over_cell": 0.93}, "0.93 of the time of the bare cell"),
        ({"of_limit": 1.2}, "120 % of the measured limit"),
        ({"seconds": 0.0}, "no time"),
        ({"wrong": "differs"}, "results of this case differ"),
        ({"over_cell": 1.0, "of_limit": 1.0, "over_ours": 0.1}, None),
    ],
)
def test_a_figure_that_cannot_be_is_suspect(figure, reason):
    records = [record(**figure), record(case="another")]
    suspect.mark(records)
    assert "suspect" not in records[1] and (reason or "None") in records[0].get("suspect", "None")
    assert suspect.listed(records) == ([f"a case, tritondeq: {records[0]['suspect']}"] if reason else [])


def test_a_speed_up_on_results_that_differ_is_suspect_and_a_case_without_times_is_not():
    records = [record(over_ours=1.0), record("eager loop", wrong="eager loop: differs")]
    suspect.mark(records)
    assert all("results of this case differ" in r["suspect"] for r in records)
    for each in records:
        del each["seconds"]
    suspect.mark(records)
    assert suspect.listed(records) == []


def test_the_clock_calls_contestants_in_turn_and_as_often():
    order: list[str] = []
    timed = measure.clock({name: lambda name=name: order.append(name) for name in "ab"}, CPU, seconds=0.0)
    assert order[:2] == ["a", "b"] and order.count("a") == order.count("b") > 4
    assert all(0 < timing.least <= timing.median < 0.1 for timing in timed.values())


def test_a_wrong_block_is_a_fault(monkeypatch):
    calls, layer, steps = blocks.contestants(blocks.SIZES["tiny"], CPU, compiled=False)
    broken = calls | {"tied loop": lambda: calls["tied loop"]() * 1.2}
    monkeypatch.setattr(blocks, "contestants", lambda *_, **__: (broken, layer, steps))
    records = list(blocks.run(CPU, "tiny", 0.01, lambda: True, pytest.fail))
    assert [bool(r["wrong"]) for r in records] == [False, True] and all("seconds" not in r for r in records)


def test_a_wrong_gradient_is_a_fault():
    setup = solves.Setup(solves.Case("train", 8, 16), CPU)
    calls = setup.contestants(False)

    def doubled():
        z, k = calls["tied loop"]()
        setup.cell.weight.grad *= 2
        return z, k

    faults = solves.wrong_gradients(setup, {"tritondeq": calls["tritondeq"], "tied loop": doubled})
    assert "gradient differs" in faults["tied loop"]
    assert solves.wrong_gradients(setup, calls)["tied loop"] is None


def test_shapes_are_combined_and_sequences_and_images_are_whole():
    parse = bench._parser().parse_args
    assert shapes.asked(parse([])) == shapes.asked(parse(["--suite", "full"])) == []
    asked = shapes.asked(parse("--cell MLP gated --rows 5 7 5 --dtype bf16".split()))
    assert asked == [shapes.Shape(cell, 128, rows, True) for cell in ("mlp", "gated") for rows in (5, 7)]
    assert shapes.asked(parse(["--features", "3"])) == [shapes.Shape("affine", 3, 1024)]
    dims = {("transformer", 600): (3, 256, 8), ("transformer", 5): (1, 5, 8), ("gated", 5): (5, 8)}
    dims |= {("conv", 300): (2, 8, 16, 16), ("conv", 10): (2, 8, 3, 3)}
    assert {(cell, rows): shapes.Shape(cell, 8, rows).dims for cell, rows in dims} == dims


@pytest.mark.slow
@pytest.mark.parametrize("cell", shapes.CELLS)
@pytest.mark.parametrize("low", [False, True], ids=shapes.DTYPES)
def test_every_cell_is_measured_and_agrees_with_its_rivals(cell, low):
    lost = []
    for width in (16, 13) if cell == "affine" else (16,):
        for case in solves.asked([shapes.Shape(cell, width, 24, low)], compiled=True):
            records = list(solves.run(case, CPU, {"copy": 1e10, "fp32": 1e11}, 0.0, lambda: True, lost.append))
            assert not [r["wrong"] for r in records if r["wrong"]] and all(r["over_ours"] > 0 for r in records)
            names = {r["contestant"] for r in records}
            assert {"tritondeq", "tied loop", "untied stack"} <= names and not any("compiled" in n for n in names)
    assert not lost


def test_flops_and_steps_are_counted_and_fewer_steps_are_a_fault(monkeypatch):
    setup = solves.Setup(solves.Case("solve", 5, 16, cell="gated"), CPU)
    assert setup.flops == pytest.approx(2 * 3 * 16 * 16 * 5 * setup.mean) and setup.nbytes == 4 * (2 * 5 * 16 + 768)
    setup = solves.Setup(solves.Case("depth", 4, 16, steps=6), CPU)
    assert setup.steps == setup.mean == 6 and setup.wrong("tied loop", (setup.values[1], 6)) is None
    with torch.no_grad():
        early = rivals.Tied(setup.cell, 4)(setup.x)
    assert "differs from ours" in setup.wrong("eager loop", (early, 4))
    monkeypatch.setattr(solves, "slow", lambda cell, x: None)
    records = list(solves.run(solves.Case("depth", 3, 8, steps=60), CPU, {}, 0.0, lambda: True, pytest.fail))
    assert "60 were asked for" in records[0]["wrong"] and not any("seconds" in r for r in records)


def fails(error):
    def call():
        raise error

    return call


def test_what_cannot_run_here_is_lost_and_an_error_of_ours_is_a_fault():
    broken = RuntimeError("\n  Failed to find C compiler.\nlong story")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
    calls = {
        "tritondeq": lambda: 1,
        "tritondeq Anderson": fails(RuntimeError("no such kernel")),
        "tritondeq, compiled cell": fails(broken),
        "tied loop": fails(full),
        "torchdeq Anderson": fails(NotImplementedError("lu for bf16")),
        "eager loop": fails(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
    }
    lost = []
    outcomes, faults = measure.attempt(calls, "case", lambda: True, lost.append)
    assert outcomes == {"tritondeq": 1} and list(calls) == ["tritondeq", "tritondeq Anderson"]
    assert faults == {"tritondeq Anderson": "tritondeq Anderson: raised RuntimeError: no such kernel"}
    assert lost == [
        "case, tritondeq, compiled cell: torch.compile failed: Failed to find C compiler.",
        "case, tied loop: out of memory",
        "case, torchdeq Anderson: raised NotImplementedError: lu for bf16",
        "case, eager loop: out of memory",
    ]
    with pytest.raises(torch.OutOfMemoryError):
        measure.attempt({"tritondeq": fails(full)}, "case", lambda: True, lost.append)
    calls = {"tritondeq": lambda: 1, "compiled tied loop": pytest.fail}
    assert measure.attempt(calls, "case", lambda: False, lost.append) == ({"tritondeq": 1}, {})
    assert lost[4:] == ["case, compiled tied loop: no time to compile it"] and list(calls) == ["tritondeq"]


def test_a_result_is_kept_from_a_contestant_that_writes_over_it():
    memory = torch.zeros(3)
    calls = {"tritondeq": lambda: (memory.fill_(1), 5), "tied loop": lambda: (memory.fill_(2), 5)}
    outcomes, _ = measure.attempt(calls, "case", lambda: True, pytest.fail)
    assert [z.tolist() for z, _ in outcomes.values()] == [[1] * 3, [2] * 3]
