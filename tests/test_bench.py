"""The round of measurements: counts that hold on any machine, checks that fail when a contestant is wrong, files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import tritondeq as tdeq
from tritondeq.bench import __main__ as bench
from tritondeq.bench import blocks, choices, measure, memory, report, rivals, solves, steps, uneven
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
    assert max(ops for ops, _ in seen) <= steps.OPS[name]
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
        assert per_step > 1.5 * steps.OPS[ours]


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


def test_memory_is_flat_in_steps_and_the_tied_loop_is_not():
    records = list(memory.run(CPU, "tiny"))
    assert not any(r["wrong"] for r in records)
    tied = [r["bytes"] for r in records if r["contestant"] == "tied loop"]
    ours = [r["bytes"] for r in records if r["contestant"] == "tritondeq"]
    assert tied[1] > 1.5 * tied[0] and ours[0] == ours[1] > 0


def test_a_memory_that_grows_is_a_fault(monkeypatch):
    sizes = iter(range(100, 1000, 100))
    monkeypatch.setattr(memory, "saved", lambda net, x: next(sizes))
    wrong = {r["contestant"]: r["wrong"] for r in memory.run(CPU, "tiny")}
    assert "not flat" in wrong["tritondeq"] and wrong["tied loop"] is None


@pytest.fixture(scope="module")
def round_(tmp_path_factory):
    """(folder, results, what was printed) of the smallest round."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "tritondeq", "bench", "--suite", "tiny", "--cpu", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.json")
    return out, report.load(path), run


def test_the_round_writes_what_it_measured(round_):
    out, results, run = round_
    assert results["complete"] and results["tests"] is None and not report.faults(results)
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["kind"] == "cpu"
    assert "does not" not in run.stderr and "not the Triton kernels" in run.stderr
    assert {r["goal"] for r in results["records"]} == {"evaluations", "steps", "G1", "G2", "G9", "G10", "G11"}
    for record in results["records"]:
        assert {"case", "contestant", "rows", "width", "wrong"} <= record.keys()
        if record["goal"] in ("steps", "G1", "G2", "G9", "G11"):
            assert 0 < record["least"] <= record["median"] and record["seconds"] == record["least"]
    solved = {r["contestant"]: r for r in results["records"] if r["goal"] == "G1"}
    assert solved["tritondeq"]["over_ours"] == 1 and 0 < solved["tritondeq"]["of_limit"] < 1
    assert {"eager loop", "tied loop", "tritondeq Anderson"} <= solved.keys()


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
    broken = calls | {"tied loop": lambda: (calls["tied loop"]()[0] * 1.2, None)}
    monkeypatch.setattr(blocks, "contestants", lambda *_, **__: (broken, layer, steps))
    records = list(blocks.run(CPU, "tiny", 0.01))
    assert [bool(r["wrong"]) for r in records] == [False, True] and all("seconds" not in r for r in records)


def test_the_table_is_made_from_the_file_alone(round_, capsys):
    out, results, run = round_
    (path,) = out.glob("*.json")
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == run.stdout.strip()
    for words in ("Whole solve", "Training step", "Price of a step", "Evaluations", "Memory", "says nothing of"):
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
    out, _, run = round_
    for name in ("speedup", "limit", "step"):
        image = pyplot.imread(out / f"{name}.png")
        assert min(image.shape[:2]) > 200 and image.std() > 0.05 and str(out / f"{name}.png") in run.stderr


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
    assert not results["complete"] and len(results["left_out"]) == 8 and not results["records"]


def test_interrupted_it_writes_what_it_has(tmp_path):
    command = [sys.executable, "-m", "tritondeq.bench", "--suite", "full", "--cpu", "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
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


@pytest.mark.parametrize("wrong", [["--suite", "huge"], ["--minutes", "soon"], ["--minutes", "-1"], ["--rows"]])
def test_bad_arguments(wrong):
    refused(wrong)


def refused(arguments):
    run = subprocess.run([sys.executable, "-m", "tritondeq.bench", *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and "error:" in run.stderr and "Traceback" not in run.stderr


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
    (path,) = bench.RESULTS.glob("*.json")
    assert report.into(readme, report.load(path)) == readme, (
        f"python -m tritondeq.bench.report --readme README.md {path}"
    )


def test_into_a_readme(round_, tmp_path, capsys):
    (path,) = round_[0].glob("*.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "old\n".join(report.MARKS) + "\nafter\n")
    assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| 8x16 | Picard |" in text
    assert "old" not in text
    readme.write_text("nothing\n")
    assert report.main([str(path), "--readme", str(readme)]) == 1 and "no place" in capsys.readouterr().err


def test_benches_run_under_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "32x64 or G1-1x64"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={tmp_path / 'b.json'}"]
    run = subprocess.run(command, cwd=bench.TESTS.parent, capture_output=True, text=True, timeout=120)
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
