"""The round of measurements from end to end: what it writes and prints, arguments, and files that are committed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import measure, report, rivals


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


def test_a_round_of_shapes_measures_those_and_nothing_else(tmp_path, capsys):
    arguments = "--suite tiny --cpu --cell mlp --features 8 16 --rows 5".split()
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = report.load(path)
    assert results["shapes"] == ["MLP 5x8 fp32", "MLP 5x16 fp32"] and results["complete"]
    assert {(r["rows"], r["width"]) for r in results["records"]} == {(5, 8), (5, 16)}
    assert {r["goal"] for r in results["records"]} == {"shape", "steps", "G10"}
    assert "| MLP 5x16 fp32 forward |" in capsys.readouterr().out


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
