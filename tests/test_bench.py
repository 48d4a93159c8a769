"""The round of measurements: counts that hold on any machine, checks that fail when a contestant is wrong, files."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import pytest
import torch

import tritondeq as tdeq
from tritondeq.bench import __main__ as bench
from tritondeq.bench import (
    blocks,
    choices,
    launches,
    measure,
    memory,
    report,
    rivals,
    shapes,
    solves,
    steps,
    targets,
    uneven,
)
from tritondeq.kernels import affine, launch, rules

CPU = torch.device("cpu")
MOST = [("Picard", tdeq.Picard()), ("Anderson(5)", tdeq.Anderson(memory=5))]


def counted(solver, evaluations, gain, tol, batch=16):
    f, z0 = steps.problem(batch, 16, gain, CPU)
    with torch.no_grad(), tdeq.backend("torch"), measure.AtenOps() as ops:
        solution = tdeq.fixed_point(f, z0, solver=solver, tol=tol, max_steps=evaluations)
    return ops, solution


@pytest.mark.parametrize("name, solver", MOST)
@pytest.mark.parametrize("gain, tol", [(0.9, 1e-12), (0.9, 1e-3), (1.3, 1e-12)])
def test_no_step_has_more_operations_than_promised(name, solver, gain, tol):
    """All rows active, rows that stop one by one, residuals that rise; only window ends cost more."""
    seen = []
    for k in range(2, 24):
        before, after = (counted(solver, n, gain, tol)[0] for n in (k, k + 1))
        if k + 1 not in (12, 24) and after.total > before.total:
            seen.append((after.total - before.total - 2, after.reads - before.reads))  # the cell is addmm, tanh
    assert len(seen) > 8
    assert max(ops for ops, _ in seen) <= targets.OPS[name]
    assert max(reads for _, reads in seen) <= 2


@torch.no_grad()
def test_captured_steps_are_the_steps():
    """On a CPU through the loop: that the contestant of the GPU round does the same work."""
    f, z0 = steps.problem(8, 16, 1.2, CPU)
    for solver in steps.OURS.values():
        loop = tdeq.fixed_point(f, z0, solver=solver, tol=1e-12, max_steps=steps.EVALUATIONS)
        assert torch.equal(steps.captured(f, z0, solver)(), loop.value)


def test_the_counter_counts():
    with measure.AtenOps() as ops:
        x = torch.ones(3)  # one fill
        (x.view(3, 1).t() + 1).sum().item()
    assert dict(ops.counts) == {"ones": 1, "add": 1, "sum": 1} and ops.total == 3 and ops.reads == 1


@pytest.mark.skipif(not rivals.has_torchdeq(), reason="needs torchdeq")
def test_torchdeq_makes_the_operations_that_are_said_of_it():
    f, z0 = steps.problem(16, 16, 0.9, CPU)
    for solver, ours in ((rivals.torchdeq_picard, "Picard"), (rivals.torchdeq_anderson, "Anderson(5)")):
        totals = []
        for n in (8, 11):
            with torch.no_grad(), measure.AtenOps() as ops:
                solver(f, z0, 0.0, n)
            totals.append(ops.total)
        per_step = (totals[1] - totals[0]) / 3 - 2
        assert per_step > 1.5 * targets.OPS[ours]


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_anderson_needs_no_more_evaluations_than_picard(gain):
    f, z0 = steps.problem(64, 64, gain, CPU)
    needed = [
        tdeq.fixed_point(f, z0, solver=solver, tol=1e-4, max_steps=300, throw=True).steps.max() for _, solver in MOST
    ]
    assert needed[1] <= needed[0]


@pytest.mark.parametrize("name", sorted(rivals.solvers()))
def test_rivals_reach_the_same_fixed_point(name):
    f, z0 = steps.problem(8, 16, 0.7, CPU)
    truth = tdeq.fixed_point(lambda z: f(z), z0, tol=1e-7, max_steps=200).value
    z, evaluations = rivals.solvers()[name](f, z0, 1e-5, 200)
    assert (z - truth).norm() <= 1e-3 * truth.norm() and 3 < evaluations < 60


def test_the_peak_is_that_of_what_is_alive_at_once():
    with measure.Peak() as seen:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        b.add_(1)  # nothing new
        assert seen.now == 8000
        assert (b + c.view(-1)).sum() > 0
        del b, c
        d = torch.ones(10)
        assert seen.now == d.nbytes == 40
    assert seen.most == 12004 + 1  # three vectors, their sum, and whether it is positive


def test_memory_is_flat_in_steps_and_that_of_explicit_nets_is_not():
    records = [r for r in memory.run(CPU, "tiny")]
    assert not any(r["wrong"] for r in records)
    for net in ("Affine", "Transformer"):
        of = {}
        for r in records:
            if r["net"] == net:
                of.setdefault(r["contestant"], []).append(r["bytes"])
        for name in ("tied loop", "untied stack", "tritondeq Unrolled"):
            assert of[name][1] > 1.4 * of[name][0], (net, name)
        for name in memory.FLAT:
            assert of[name][1] <= 1.1 * of[name][0], (net, name)


def test_states_beside_the_cell():
    """In torch: where it is, where it was, the best and the residual; and for Anderson(m) 2 m differences beside."""
    picard, anderson = (r["states"] for r in memory.states(CPU, "quick"))
    assert 3.9 < picard < 4.3 and 2 * targets.MEMORY + picard <= anderson < 2 * targets.MEMORY + picard + 2.2


def test_a_memory_that_grows_is_a_fault(monkeypatch):
    sizes = iter(range(10**6, 10**8, 10**5))
    monkeypatch.setattr(memory, "peak", lambda net, x: next(sizes))
    wrong = {r["contestant"]: r["wrong"] for r in memory.run(CPU, "tiny")}
    assert "not flat" in wrong["tritondeq"] and wrong["tied loop"] is None


@pytest.fixture(scope="module")
def round_(tmp_path_factory):
    """(folder, results, what was printed) of the smallest round."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "tritondeq", "bench", "--suite", "tiny", "--cpu", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.json")
    return out, report.load(path), run


def test_the_round_writes_what_it_measured(round_):
    out, results, run = round_
    assert results["complete"] and results["tests"] is None and not report.faults(results)
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["kind"] == "cpu"
    assert "does not" not in run.stderr and "not the Triton kernels" in run.stderr
    goals = {"evaluations", "steps", "states", "depth", "G1", "G2", "G9", "G10", "G11"}
    assert {r["goal"] for r in results["records"]} == goals
    for record in results["records"]:
        assert {"case", "contestant", "rows", "width", "wrong"} <= record.keys()
        if record["goal"] in ("steps", "depth", "G1", "G2", "G9", "G11"):
            assert 0 < record["least"] <= record["median"] and record["seconds"] == record["least"]
    solved = {r["contestant"]: r for r in results["records"] if r["goal"] == "G1"}
    assert solved["tritondeq"]["over_ours"] == 1 and 0 < solved["tritondeq"]["of_limit"] < 1
    assert {"eager loop", "tied loop", "untied stack", "tritondeq Anderson"} <= solved.keys()
    assert {r["steps"] for r in results["records"] if r["goal"] == "depth"} == {2, 4}


def test_rows_of_many_depths_are_what_the_target_speaks_of():
    w, u = uneven.problem(4096, CPU)
    options = {"activation": "identity", "tol": uneven.TOL, "max_steps": uneven.MOST}
    steps = affine.affine_solve_ref(w, u, **options)[1]
    assert 10 < steps.float().mean() < 20 and steps.min() <= 6 and 150 < steps.max() < uneven.MOST
    rows = launch.SHAPES["affine"]
    with uneven.lockstep():
        assert launch.parameters("affine", batch=9, shapes=[(128, 128)], terms=2, memory=0)["REFILL"] == 0
    assert launch.SHAPES["affine"] is rows and list(uneven.run(CPU, "tiny", 0.1)) == []


def test_a_wrong_block_is_found(monkeypatch):
    calls, layer, steps = blocks.contestants(blocks.SIZES["tiny"], CPU, compiled=False)
    broken = calls | {"tied loop": lambda: calls["tied loop"]() * 1.2}
    monkeypatch.setattr(blocks, "contestants", lambda *_, **__: (broken, layer, steps))
    records = list(blocks.run(CPU, "tiny", 0.01, lambda: True, pytest.fail))
    assert [bool(r["wrong"]) for r in records] == [False, True] and all("seconds" not in r for r in records)


def test_the_table_is_made_from_the_file_alone(round_, capsys):
    out, results, run = round_
    (path,) = out.glob("*.json")
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == run.stdout.strip()
    titles = ["Whole solve", "Training step", "Price of a step", "Evaluations", "Memory", "States", "against its steps"]
    for words in [*titles, "Targets", "not measured", "says nothing of"]:
        assert words in printed
    widths, title = {}, ""
    for line in printed.splitlines():
        if line.startswith("|"):
            widths.setdefault(title, set()).add(line.count("|"))
        elif line.startswith("**"):
            title = line
    assert widths and all(len(w) == 1 for w in widths.values())


def test_the_pictures_show_something(round_):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    out, results, run = round_
    for name in ("speedup", "limit", "step", "memory", "depth"):
        path = out / f"{measure.name_of(results['machine'])}-{name}.png"
        image = pyplot.imread(path)
        assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.05 and str(path) in run.stderr


def test_a_wrong_contestant_is_not_timed_and_the_round_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rivals.SOLVERS, "eager loop", lambda f, z, tol, most: (z + 1, most))
    monkeypatch.setattr(bench, "_parts", lambda *a: [p for p in parts(*a) if "G1" in p[0]])
    assert bench.main(["--suite", "tiny", "--cpu", "--out", str(tmp_path)]) == 1
    assert "CHECK FAILED: G1 8x16 fp32 forward: eager loop: differs from ours" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    assert not any("seconds" in record for record in report.load(path)["records"])


def parts(*arguments, make=bench._parts):
    return make(*arguments)


def test_a_wrong_gradient_is_a_fault():
    setup = solves.Setup(solves.Case("G2", 8, 16, train=True), CPU)
    calls = setup.contestants(False)

    def doubled():
        z, k = calls["tied loop"]()
        setup.cell.weight.grad *= 2
        return z, k

    faults = solves.wrong_gradients(setup, {"tritondeq": calls["tritondeq"], "tied loop": doubled})
    assert "gradient differs" in faults["tied loop"]
    assert solves.wrong_gradients(setup, calls)["tied loop"] is None


def test_what_time_does_not_allow_is_named(tmp_path):
    assert bench.main(["--suite", "tiny", "--cpu", "--minutes", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = report.load(path)
    assert not results["complete"] and len(results["left_out"]) == 12 and not results["records"]
    assert all(lost.endswith(": no time") for lost in results["left_out"])


def test_interrupted_it_writes_what_it_has(tmp_path):
    command = [sys.executable, "-m", "tritondeq.bench", "--suite", "full", "--cpu", "--out", str(tmp_path)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": bench.interruptible}
    with subprocess.Popen(command, **options) as run:
        assert "torch" in run.stderr.readline()  # it has begun
        time.sleep(3)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted" in err and "Traceback" not in err
    (path,) = tmp_path.glob("*.json")
    assert report.load(path)["complete"] is False


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    refused(["--out", str(tmp_path / "new")])


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused(["--suite", "tiny", "--out", str(tmp_path / "file")])


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("--suite huge", "invalid choice: 'huge'"),
        ("--minutes soon", "--minutes: invalid float value: 'soon'"),
        ("--minutes -1", "--minutes: must be at least 0, got -1"),
        ("--minutes nan", "--minutes: must be at least 0, got nan"),
        ("--rows", "--rows: expected at least one argument"),
        ("--rows 0", "--rows: takes an integer from 1 to 2147483647, got '0'"),
        ("--features 64 -1", "--features: takes an integer from 1 to 2147483647, got '-1'"),
        ("--cell afine", "--cell: takes affine, monotone, mlp, gated, transformer, conv, got 'afine'"),
        ("--dtype fp64", "--dtype: invalid choice: 'fp64'"),
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--rows 2000000000 --features 4096", "GiB are free: lower --rows to "),
        ("--features 2000000000 --rows 1", "GiB are free: lower --features"),
    ],
)
def test_bad_arguments(wrong, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_round", pytest.fail)
    refused(["--cpu", *wrong.split()], says)


def refused(arguments, says="cannot write to"):
    """One line, before anything is measured."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(said):
        bench.main(arguments)
    assert stop.value.code == 2 and "error:" in said.getvalue() and says in said.getvalue()
    assert said.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "text, says", [("{", "not a JSON file"), ("[]", "lacks schema"), ('{"schema": 1}', "lacks suite")]
)
def test_a_file_that_is_no_results_file(tmp_path, capsys, text, says):
    (tmp_path / "r.json").write_text(text)
    assert report.main([str(tmp_path / "r.json")]) == 1
    assert says in capsys.readouterr().err
    assert report.main([str(tmp_path / "absent.json")]) == 1


def test_committed_results_are_readable_and_green():
    paths = sorted(bench.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        results = report.load(path)
        assert results["complete"] and not report.faults(results) and path.stem == measure.name_of(results["machine"])
        assert results["machine"]["commit"] and "dirty" not in results["machine"]["commit"]


def test_the_readme_shows_what_the_committed_file_says():
    readme = (bench.TESTS.parent / "README.md").read_text()
    paths = sorted(bench.RESULTS.glob("*.json"))
    command = "python -m tritondeq.bench.report --readme README.md bench/results/*.json"
    assert report.into(readme, paths) == readme, command


def test_into_a_readme(round_, tmp_path, capsys):
    (path,) = round_[0].glob("*.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "old\n".join(report.MARKS) + "\nafter\n")
    assert report.main([str(path), str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| 8x16 | Picard |" in text
    assert "old" not in text and text.count("| 8x16 | Picard |") == 2
    readme.write_text("nothing\n")
    assert report.main([str(path), "--readme", str(readme)]) == 1 and "no place" in capsys.readouterr().err


def test_benches_run_under_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "32x64 or G1-1x64"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={tmp_path / 'b.json'}"]
    run = subprocess.run(command, cwd=bench.TESTS.parent, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout
    measured = {b["name"] for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert "test_step[32x64-Picard]" in measured


def test_tables_behind_the_options():
    """Each at a size of its own choice: what NOTES.md concludes from them holds."""
    _, *rows = choices.safeguard(factors=(2.0, 100.0), seeds=1)
    assert all(float(at_2[:-1]) <= float(at_100[:-1]) for *_, at_2, at_100 in rows) and rules.SAFEGUARD == 100
    ((_, _, fresh, reused),) = choices.reuse(gains=(1.2,), memories=(40,), seeds=6)[1:]
    assert float(reused) < 0.85 * float(fresh)
    assert all(whole == half for *_, whole, half in choices.half(gains=(0.5, 0.9), tols=(1e-3,))[1:])


def test_a_suite_has_the_goals_that_its_shapes_have():
    for case in solves.cases("full", cuda=True):
        if not case.steps:
            assert solves.goal_of(case.shape, case.train) == case.goal, case
    assert solves.goal_of(shapes.Shape("transformer", 128, 64), train=False) == "shape"


def test_shapes_are_combined_and_the_rest_is_the_default():
    parse = bench._parser().parse_args
    assert shapes.asked(parse([])) == [] and shapes.asked(parse(["--suite", "full"])) == []
    asked = shapes.asked(parse("--cell MLP gated --rows 5 7 5 --dtype bf16".split()))
    assert asked == [shapes.Shape(cell, 128, rows, True) for cell in ("mlp", "gated") for rows in (5, 7)]
    assert shapes.asked(parse(["--features", "3"])) == [shapes.Shape("affine", 3, 1024)]


def test_sequences_and_images_are_whole():
    assert shapes.Shape("transformer", 8, 600).dims == (3, 256, 8)
    assert shapes.Shape("transformer", 8, 5).dims == (1, 5, 8)
    assert shapes.Shape("conv", 8, 300).dims == (2, 8, 16, 16) and shapes.Shape("conv", 8, 300).positions == 512
    assert shapes.Shape("conv", 8, 10).dims == (2, 8, 3, 3)
    assert shapes.Shape("gated", 8, 5).dims == (5, 8)


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


@pytest.mark.parametrize("cell", ["gated", "conv"])
def test_the_price_of_a_step_of_any_cell(cell):
    lost = []
    records = list(steps.run(CPU, [shapes.Shape(cell, 16, 9, low=True)], 0.0, lost.append))
    prices = {r["contestant"]: r["over_cell"] for r in records}
    assert prices["bare cell"] == 1 and prices["Picard"] > 0.5 and not any(r["wrong"] for r in records)
    assert all("torchdeq" in one for one in lost)  # its Anderson has no bf16


def test_a_round_of_shapes_measures_those_and_nothing_else(tmp_path, capsys):
    arguments = "--suite tiny --cpu --cell mlp --features 8 16 --rows 5".split()
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = report.load(path)
    assert results["shapes"] == ["MLP 5x8 fp32", "MLP 5x16 fp32"] and results["complete"]
    assert {(r["rows"], r["width"]) for r in results["records"]} == {(5, 8), (5, 16)}
    assert {r["goal"] for r in results["records"]} == {"shape", "steps", "G10"}
    assert "| MLP 5x16 fp32 forward |" in capsys.readouterr().out


def test_flops_are_those_of_the_cell(monkeypatch):
    setup = solves.Setup(solves.Case("shape", 5, 16, cell="gated"), CPU)
    assert setup.flops == pytest.approx(2 * 3 * 16 * 16 * 5 * setup.mean) and setup.nbytes == 4 * (2 * 5 * 16 + 768)


def test_counted_steps_are_taken_by_all_or_it_is_a_fault():
    case = solves.Case("depth", 4, 16, steps=6)
    setup = solves.Setup(case, CPU)
    assert setup.steps == setup.mean == 6 and setup.wrong("tied loop", (setup.values[1], 6)) is None
    with torch.no_grad():
        early = rivals.Tied(setup.cell, 4)(setup.x)
    assert "differs from ours" in setup.wrong("eager loop", (early, 4))


def fails(error):
    def call():
        raise error

    return call


def test_what_cannot_run_here_is_lost_and_what_ours_raises_is_a_fault():
    broken = RuntimeError("\n  Failed to find C compiler. Please specify via CC environment variable.\nlong story")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
    calls = {
        "tritondeq": lambda: 1,
        "tritondeq Anderson": fails(RuntimeError("no such kernel")),
        "tritondeq, compiled cell": fails(broken),
        "compiled tied loop": fails(broken),
        "tied loop": fails(full),
        "torchdeq Anderson": fails(NotImplementedError("lu for bf16")),
        "eager loop": fails(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
    }
    lost = []
    outcomes, faults = measure.attempt(calls, "case", lambda: True, lost.append)
    assert outcomes == {"tritondeq": 1} and faults == {
        "tritondeq Anderson": "tritondeq Anderson: raised RuntimeError: no such kernel"
    }
    assert list(calls) == ["tritondeq", "tritondeq Anderson"]
    compiler = "torch.compile failed: Failed to find C compiler. Please specify via CC environment variable."
    assert lost == [
        f"case, tritondeq, compiled cell: {compiler}",
        f"case, compiled tied loop: {compiler}",
        "case, tied loop: out of memory",
        "case, torchdeq Anderson: raised NotImplementedError: lu for bf16",
        "case, eager loop: out of memory",
    ]
    with pytest.raises(torch.OutOfMemoryError):
        measure.attempt({"tritondeq": fails(full)}, "case", lambda: True, lost.append)


def test_nothing_is_compiled_when_time_is_short():
    lost = []
    calls = {"tritondeq": lambda: 1, "compiled tied loop": pytest.fail}
    assert measure.attempt(calls, "case", lambda: False, lost.append) == ({"tritondeq": 1}, {})
    assert lost == ["case, compiled tied loop: no time to compile it"] and list(calls) == ["tritondeq"]


def test_a_deadline_stops_what_goes_on_and_leaves_no_alarm(monkeypatch):
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(measure.Late), measure.deadline(0.05):
        time.sleep(5)
    with measure.deadline(30):
        pass
    monkeypatch.setattr(measure, "AGAIN", 0.05)
    with pytest.raises(measure.Late), measure.deadline(0.05):
        with contextlib.suppress(measure.Late):
            time.sleep(5)
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.fixture
def stand_ins(monkeypatch):
    """A round on a device that is not there: what it does in which order, and what its parts are to be."""
    log, parts = [], {}
    monkeypatch.setattr(measure, "roofs", lambda device, quick: log.append("roofs") or {"copy": 1e9})
    monkeypatch.setattr(bench, "_tests", lambda: log.append("tests") or {"passed": True, "says": "9 passed"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def tune(minutes):
        log.append("tuning")
        return {"tuned": minutes > 0, "says": "tuned"}

    def made(results, device, suite, these, seconds, compiles):
        log.append(f"compiles: {compiles()}")
        return list(parts.items())

    monkeypatch.setattr(bench, "_tune", tune)
    monkeypatch.setattr(bench, "_parts", made)

    def go(*arguments):
        arguments = bench._parser().parse_args(list(arguments))
        results = {"left_out": [], "records": [], "tests": None, "tuning": None}
        bench._round(results, torch.device("cuda"), arguments, [])
        return results, log

    return go, parts


def good(name):
    yield {"case": name, "goal": "G1"}


def test_the_round_on_a_gpu_goes_in_order(stand_ins):
    go, parts = stand_ins
    parts |= {"one": good("one"), "two": good("two")}
    results, log = go()
    assert log == ["roofs", "tests", "tuning", "compiles: True"]
    assert [r["case"] for r in results["records"]] == ["one", "two"] and not results["left_out"]
    assert results["tests"]["passed"] and results["tuning"]["tuned"]
    assert go("--no-tests", "--no-tune")[1][4:] == ["roofs", "compiles: True"]


def test_a_part_that_fails_hangs_or_finds_no_room_does_not_end_the_round(stand_ins, monkeypatch):
    go, parts = stand_ins

    def hangs():
        yield {"case": "slow", "goal": "G1"}
        time.sleep(20)

    def runs(error):
        raise error
        yield

    monkeypatch.setattr(bench, "PART_SECONDS", 0.1)
    parts |= {"slow": hangs(), "wide": runs(torch.OutOfMemoryError("no")), "broken": runs(KeyError("x"))}
    parts["last"] = good("last")
    results, _ = go()
    assert results["left_out"] == ["slow: stopped after 0 s", "wide: out of memory; take fewer --rows or --features"]
    assert [r["case"] for r in results["records"]] == ["slow", "broken", "last"]
    assert report.faults(results) == ["broken: raised KeyError: 'x'"]


def test_no_part_goes_on_after_the_time(stand_ins, monkeypatch):
    go, parts = stand_ins
    monkeypatch.setattr(bench, "SPARE_SECONDS", 0.05)

    def hangs():
        time.sleep(20)
        yield

    parts |= {"slow": hangs(), "late": good("late")}
    results, log = go("--minutes", "0.001")
    assert results["left_out"] == ["slow: stopped after 0 s", "late: no time"]


def test_the_tests_of_the_round(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TESTS", tmp_path)
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_offline_b.py").write_text("def test_b(): assert False\n")
    assert bench._tests()["passed"] is True and "1 passed" in bench._tests()["says"]
    (tmp_path / "test_c.py").write_text("def test_c(): assert False\n")
    found = bench._tests()
    assert found["passed"] is False and "1 failed" in found["says"]
    (tmp_path / "test_c.py").write_text("import time\n\n\ndef test_c(): time.sleep(60)\n")
    monkeypatch.setattr(bench, "TESTS_SECONDS", 3)
    found = bench._tests()
    assert found["passed"] is None and "stopped after 3 s" in found["says"]


def test_tuning_is_tried_and_what_came_of_it_is_said(monkeypatch):
    found = object()
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "tritondeq.tune" else found)
    assert bench._tune(1.0) == {"tuned": False, "says": "this installation has no tritondeq.tune"}
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: found)
    assert bench._tune(0.0) == {"tuned": False, "says": "no time"}
    say = "import sys, time; print('12 shapes\\nwritten: table.json'); sys.stderr.write('no GPU\\n'); "
    interrupted = "except KeyboardInterrupt: sys.stderr.write('interrupted; finished: 3\\n'); sys.exit(130)"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"
    codes = {
        say + "sys.exit(0)": (1.0, True, "written: table.json"),
        say + "sys.exit(1)": (1.0, False, "no GPU"),
        f"import sys, time\ntry: time.sleep(30)\n{interrupted}": (4 / 60, True, "interrupted; finished: 3"),
        deaf: (4 / 60, False, "did not stop after 4 s"),
    }
    monkeypatch.setattr(bench, "STOPPING_SECONDS", 2)
    start = subprocess.Popen
    for code, (minutes, tuned, says) in codes.items():

        def run(command, code=code, **options):
            assert command[1:] == ["-m", "tritondeq", "tune"]
            return start([command[0], "-S", "-c", code], **options)

        monkeypatch.setattr(bench.subprocess, "Popen", run)
        assert bench._tune(minutes) == {"tuned": tuned, "says": says}


def test_a_gpu_too_old_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton").knobs
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert bench.unfit(cuda) == "Tesla T4 has capability 7.5, and the kernels need 8.0 (A100) or later: take --cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file"))
    assert "set TRITON_CACHE_DIR to a folder it can write to" in bench.unfit(cuda)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "new"))
    assert bench.unfit(cuda) is None and bench.unfit(CPU) is None
    monkeypatch.setattr(bench, "installed", lambda package: package != "triton")
    assert "pip install triton, or take --cpu" in bench.unfit(cuda) and bench.unfit(CPU) is None


def test_without_torchdeq_and_matplotlib_it_says_so_and_goes_on(tmp_path):
    code = """
        import sys
        from importlib.machinery import PathFinder
        find, hidden = PathFinder.find_spec, ("torchdeq", "matplotlib")
        PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
        from tritondeq.__main__ import main
        sys.exit(main(["bench", "--suite", "tiny", "--cpu", "--rows", "3", "--features", "8", "--out", sys.argv[1]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    for package in ("torchdeq", "matplotlib"):
        assert sum(line.startswith(f"{package} is not installed") for line in run.stderr.splitlines()) == 1
    (path,) = tmp_path.iterdir()
    assert not any("torchdeq" in r["contestant"] for r in report.load(path)["records"])


def test_launches_and_waits_are_told_apart():
    events = [("cudaLaunchKernel", False), ("gemm", True), ("tanh", True), ("Memcpy DtoH (Device -> Pinned)", True)]
    events += [("Memset (Device)", True), ("cudaStreamSynchronize", False), ("cudaEventSynchronize", False)]
    events += [("cudaMemcpyAsync", False), ("aten::mm", False)]
    counts = launches.tally(events)
    assert (counts["launches"], counts["copies"], counts["waits"], counts["looks"]) == (2, 2, 1, 1)


def test_launches_of_a_step_are_the_difference_of_two_solves(monkeypatch):
    asked = []
    monkeypatch.setattr(tdeq, "fixed_point", lambda *_, max_steps, **__: asked.append(max_steps))
    monkeypatch.setattr(rivals, "has_torchdeq", lambda: False)
    monkeypatch.setattr(steps, "problem", lambda *a, make=steps.problem: make(*a[:3], CPU))

    def profile(call):
        call()
        n = asked.pop() if asked else None
        return Counter(launches=2) if n is None else Counter(launches=9 + 4 * n, waits=1, looks=n // 4)

    monkeypatch.setattr(launches, "profile", profile)
    records = list(launches.run(torch.device("cuda")))
    assert [r["contestant"] for r in records] == list(targets.LAUNCHES)
    assert all((r["launches"], r["syncs"], r["looks"], r["copies"]) == (2, 0, 0.25, 0) for r in records)
    assert list(launches.run(CPU)) == []


def test_what_is_compiled_is_what_a_target_speaks_of_and_once_all_the_rest(monkeypatch):
    """With a stand-in for the compiler."""
    monkeypatch.setattr(rivals, "compiled", lambda net, graphs: net)

    def compiled(**options):
        made = solves.Setup(solves.Case("G1", 4, 8, compiled=True, **options), CPU).contestants(True)
        return [name for name in made if "compiled" in name]

    assert compiled() == ["compiled tied loop"] and compiled(train=True) == ["compiled untied stack"]
    nets = ["compiled tied loop", "compiled untied stack"]
    assert compiled(every=True) == ["compiled cell in a loop", *nets] and compiled(every=True, train=True) == nets
    suite = [case for case in solves.cases("full", cuda=True) if case.compiled]
    assert {case.train for case in suite if case.every} == {True, False} and len(suite) < 16
    assert not any(case.compiled for case in solves.cases("full", cuda=False) + solves.cases("quick", cuda=True))


def test_compiled_code_is_forgotten_between_cases(monkeypatch):
    """torch.compile takes a module's code a few times, then leaves it as it is and says nothing."""
    pytest.importorskip("torch._dynamo")
    called = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: called.append("reset"))
    measure.forget(CPU)
    assert called == ["reset"]


def test_a_result_is_kept_from_who_writes_over_it():
    memory = torch.zeros(3)
    calls = {"tritondeq": lambda: (memory.fill_(1), 5), "tied loop": lambda: (memory.fill_(2), 5)}
    outcomes, _ = measure.attempt(calls, "case", lambda: True, pytest.fail)
    assert [z.tolist() for z, _ in outcomes.values()] == [[1] * 3, [2] * 3]


def test_fewer_steps_than_were_asked_for_are_a_fault(monkeypatch):
    monkeypatch.setattr(solves, "slow", lambda cell, x: None)
    records = list(solves.run(solves.Case("depth", 3, 8, steps=60), CPU, {}, 0.0, lambda: True, pytest.fail))
    assert "60 were asked for" in records[0]["wrong"] and not any("seconds" in r for r in records)


@pytest.mark.parametrize("cell", shapes.CELLS)
def test_the_memory_a_shape_is_reckoned_to_take_is_what_explicit_nets_take(cell):
    shape = shapes.Shape(cell, 32, 256)
    taken = memory.peak(rivals.Tied(shape.make(CPU), shapes.BLOCKS), torch.randn(shape.dims))
    kept = taken / (shapes.BLOCKS * 4 * 256 * 32)
    assert taken <= shape.bytes and 0.6 * shapes.CELLS[cell][1] <= kept <= shapes.CELLS[cell][1]
