"""The round of measurements from end to end: what it writes, prints and refuses, and the files that are committed."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import machine, measure, report, rivals

ROOT = Path(__file__).parent.parent
TINY = ["--suite", "tiny", "--cpu"]


def run(arguments, out):
    """(exit status, results, what was printed, what was reported on stderr) of the command, in this process."""
    printed, reported = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(reported):
        status = bench.main([*arguments, "--out", str(out)])
    (path,) = out.glob("*.json")
    return status, report.load(path), printed.getvalue(), reported.getvalue()


@pytest.fixture(scope="module", autouse=True)
def steady():
    """Every call takes a millisecond: on a busy machine times can be those of no call, and are flagged."""

    def clock(calls, device, seconds=0.0):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, measure.Timing(1e-3, 1e-3, False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "clock", clock)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest round, and its folder."""
    out = tmp_path_factory.mktemp("bench")
    return *run(TINY, out), out


def test_the_round_writes_what_it_measured(tiny):
    status, results, _, reported, _ = tiny
    assert status == 0 and results["complete"] and results["tests"] is None and not report.faults(results)
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["kind"] == "cpu"
    assert results["machine"]["threads"] == 1
    assert "not the Triton kernels" in reported and "\n[11/11] Affine 8x16 fp32 forward 4" in reported
    kinds = {"evaluations", "steps", "host", "states", "depth", "solve", "train", "memory"}
    assert {r["kind"] for r in results["records"]} == kinds
    assert {r["case"] for r in results["records"] if r["kind"] == "evaluations"} >= {"gain 0.5", "gain 1.2"}
    for record in results["records"]:
        assert {"case", "contestant", "rows", "width", "wrong"} <= record.keys()
        if record["kind"] in ("steps", "depth", "solve", "train"):
            assert 0 < record["least"] <= record["median"] and record["seconds"] == record["least"]
    solved = {r["contestant"]: r for r in results["records"] if r["case"] == "Affine 8x16 fp32 forward"}
    assert solved["tritondeq"]["over_ours"] == 1 and 0 < solved["tritondeq"]["of_limit"] < 1
    assert {"eager loop", "tied loop", "untied stack", "tritondeq Anderson"} <= solved.keys()
    assert {r["steps"] for r in results["records"] if r["kind"] == "depth"} == {2, 4}
    assert all(r["steps"] == 40 for r in results["records"] if r["kind"] == "steps" and r["contestant"] == "Picard")


def test_the_table_is_made_from_the_file_alone(tiny, capsys):
    _, _, printed, _, out = tiny
    (path,) = out.glob("*.json")
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == printed.strip()
    titles = ["Whole solve", "Training step", "Price of a step", "Evaluations", "memory", "States", "against its steps"]
    assert all(words in printed for words in titles)


def test_into_a_readme(tiny, tmp_path, capsys):
    (path,) = tiny[-1].glob("*.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "old\n".join(report.MARKS) + "\nafter\n")
    assert report.main([str(path), str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    head, *rows = [line.split("|")[1:-1] for line in report.summary(report.load(path)).splitlines() if line[:1] == "|"]
    assert [name.strip() for name in head] == ["what", "tritondeq", "torchdeq", "plain loop"] and len(rows) - 1 <= 10
    assert text.count("40 evaluations by Picard, 8x16") == 2
    readme.write_text("nothing\n")
    assert report.main([str(path), "--readme", str(readme)]) == 1 and "no place" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speedup", "limit", "step", "memory", "depth"])
def test_the_pictures_show_something(tiny, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, results, _, reported, out = tiny
    path = out / f"{machine.name_of(results['machine'])}-{name}.png"
    ink = (pyplot.imread(path)[..., :3] < 0.9).any(axis=2)
    assert min(ink.shape) > 200 and 0.005 < ink.mean() < 0.5 and str(path) in reported
    assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off"


def only(monkeypatch, word):
    """Leaves the parts of the round whose names contain the word."""
    parts = bench._parts
    monkeypatch.setattr(bench, "_parts", lambda *a: [part for part in parts(*a) if word in part[0]])


def test_a_wrong_contestant_is_not_timed_and_the_round_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(rivals.SOLVERS, "eager loop", lambda f, z, tol, most: (z + 1, most))
    only(monkeypatch, "MLP")
    status, results, _, reported = run(TINY, tmp_path)
    assert status == 1 and "CHECK FAILED: MLP 8x16 fp32 forward: eager loop: differs from ours" in reported
    assert not any("seconds" in record for record in results["records"])


def test_a_figure_that_cannot_be_is_flagged_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "roofs", lambda *_: {"copy": 1.0, "fp32": 1.0})  # a machine slower than it is
    only(monkeypatch, "MLP")
    status, results, printed, reported = run(TINY, tmp_path)
    assert status == 1 and "SUSPECT: MLP 8x16 fp32 forward, tritondeq: " in reported
    assert all("% of the measured limit" in r["suspect"] for r in results["records"])
    assert "% (?) |" in printed and "**Suspect" in printed and not list(tmp_path.glob("*.png"))


def test_what_time_does_not_allow_is_named(tmp_path):
    status, results, *_ = run([*TINY, "--minutes", "0"], tmp_path)
    assert status == 0 and not results["complete"] and not results["records"]
    assert len(results["left_out"]) == 11 and all(lost.endswith(": no time") for lost in results["left_out"])


def test_a_round_of_shapes_measures_those_and_nothing_else(tmp_path):
    status, results, printed, _ = run([*TINY, *"--cell mlp --features 8 --rows 5".split()], tmp_path)
    assert status == 0 and results["shapes"] == ["MLP 5x8 fp32"] and results["complete"]
    assert {(r["kind"], r["rows"], r["width"]) for r in results["records"]} == {
        (kind, 5, 8) for kind in ("solve", "train", "steps", "memory")
    }
    assert "| MLP 5x8 fp32 forward " in printed


def test_interrupted_it_writes_what_it_has(tmp_path, monkeypatch):
    def stops():
        raise KeyboardInterrupt
        yield

    parts = bench._parts
    monkeypatch.setattr(bench, "_parts", lambda *a: [parts(*a)[0], ("late", stops())])
    status, results, _, reported = run(TINY, tmp_path)
    assert status == 130 and "interrupted" in reported
    assert results["complete"] is False and {r["kind"] for r in results["records"]} == {"evaluations"}


def test_without_optional_packages_it_goes_on_and_without_needed_ones_it_does_not_begin(tmp_path, monkeypatch):
    hidden, find = ["torchdeq", "matplotlib"], machine.importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    status, results, _, reported = run([*TINY, *"--cell mlp --rows 3 --features 8".split()], tmp_path)
    assert status == 0 and not list(tmp_path.glob("*.png"))
    assert all(f"{package} is not installed" in reported for package in hidden)
    assert not any("torchdeq" in r["contestant"] for r in results["records"])
    hidden += ["tabulate", "tqdm"]
    refused([*TINY, "--out", str(tmp_path)], 'not installed: pip install "tritondeq[bench]"')


@pytest.mark.slow
def test_benches_run_under_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "32x64 or (1x64 and forward)"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={tmp_path / 'b.json'}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout
    measured = {b["name"] for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert {"test_step[32x64-Picard]", "test_solve[Affine 1x64 fp32 forward-tritondeq]"} <= measured


def refused(arguments, words):
    """One line, before anything is measured."""
    reported = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(reported):
        bench.main(arguments)
    assert stop.value.code == 2 and "error:" in reported.getvalue() and words in reported.getvalue()
    assert reported.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--suite huge", "invalid choice: 'huge'"),
        ("--minutes soon", "--minutes: invalid float value: 'soon'"),
        ("--minutes nan", "--minutes: must be at least 0, got nan"),
        ("--rows", "--rows: expected at least one argument"),
        ("--rows 0", "--rows: takes an integer from 1 to 2147483647, got '0'"),
        ("--cell afine", "--cell: takes affine, monotone, mlp, gated, transformer, conv, got 'afine'"),
        ("--dtype fp64", "--dtype: invalid choice: 'fp64'"),
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--out setup.py", "cannot write to setup.py"),
        ("--rows 2000000000 --features 4096", "GiB are free: lower --rows to "),
        ("--features 2000000000 --rows 1", "GiB are free: lower --features"),
    ],
)
def test_bad_arguments(wrong, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("setup.py").touch()
    monkeypatch.setattr(bench, "_round", pytest.fail)
    refused(["--cpu", *wrong.split()], words)


@pytest.mark.parametrize(
    "text, words",
    [("{", "not a JSON file"), ('{"schema": 1}', "lacks suite"), (None, "measure again")],
)
def test_a_file_that_is_no_results_file(tiny, tmp_path, capsys, text, words):
    (tmp_path / "r.json").write_text(json.dumps(tiny[1] | {"schema": 1}) if text is None else text)
    assert report.main([str(tmp_path / "r.json")]) == 1 and words in capsys.readouterr().err


def test_a_wheel_without_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path / "none")
    assert report.main([]) == 1
    assert capsys.readouterr().err.startswith("this installation has no committed results")


def test_committed_results_are_readable_and_green():
    for path in report.committed():
        results = report.load(path)
        assert results["complete"] and not report.faults(results) and path.stem == machine.name_of(results["machine"])
        assert results["machine"]["commit"] and "dirty" not in results["machine"]["commit"]
        assert not any(r.get("suspect") for r in results["records"])


def test_the_documentation_shows_what_the_committed_files_hold():
    page = (ROOT / "docs" / "performance.md").read_text()
    command = "python -m tritondeq.bench.report --readme docs/performance.md"
    assert report.into(page, report.committed()) == page, command
