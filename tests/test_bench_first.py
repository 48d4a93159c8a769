"""The first minutes on a GPU, without one: what is compared, reported, written and refused."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import figures, first, processes
from tritondeq.bench.problems import OUTCOME, listed
from tritondeq.kernels import dispatch, launch

CPU = torch.device("cpu")
FEW = ("rows.affine solve", "steps.picard solve", "norms.residual_rms")
pytestmark = pytest.mark.kernels


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Runs the command with a few problems; returns (exit status, results, what was printed, what was reported)."""
    monkeypatch.setattr(first, "listed", lambda: [problem for problem in listed() if problem.name in FEW])

    def run(*arguments):
        printed, reported = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(reported):
            status = bench.main(["--first", "--cpu", "--out", str(tmp_path), *arguments])
        (path,) = tmp_path.glob("first-*.json")
        return status, json.loads(path.read_text()), printed.getvalue(), reported.getvalue()

    return run


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(figures, "run", lambda *_: iter(()))


def wrong_by(factor):
    """The op residual_rms, with its norm off by this factor."""
    op = dispatch.load("norms.residual_rms")

    def run(*arguments):
        s, n = op.run(*arguments)
        return s, n * factor

    return dataclasses.replace(op, run=run)


def test_the_dry_form_from_end_to_end(go):
    status, results, printed, reported = go()
    assert status == 0 and results["schema"] == first.SCHEMA and not results["complete"]
    assert results["machine"]["torch"] == torch.__version__ and results["emulator"]["triton"]
    assert [r["name"] for r in results["problems"]] == list(FEW)
    for r in results["problems"]:
        assert r["wrong"] is None and r["reference_error"] > 0 and 0 < r["error"] <= r["bound"] < 1e-3
        assert r["bits"] and not any(bits["promised"] for bits in r["bits"].values())
    assert len(results["figures"]) == 10 and printed.count("not measured") == 20
    for r in results["figures"]:
        assert (r["device"], r["host"], r["wrong"], r["note"]) == (None, None, None, "not measured on a GPU")
    assert results["tests"] is None and "left out: tests: they are for a GPU" in reported
    assert "in Triton's interpreter, which promises no bits" in reported


def test_a_wrong_op_fails(go, no_figures, monkeypatch):
    monkeypatch.setitem(dispatch._ops, "norms.residual_rms", wrong_by(1 + 1e-5))
    status, results, printed, reported = go()
    assert status == 1 and [bool(r["wrong"]) for r in results["problems"]] == [False, False, True]
    assert "CHECK FAILED: norms.residual_rms: an error of 1.0e-05, and the bound is" in reported
    assert printed.count("WRONG") == 1


def test_an_op_of_nan_is_wrong(go, no_figures, monkeypatch):
    monkeypatch.setitem(dispatch._ops, "norms.residual_rms", wrong_by(float("nan")))
    status, results, *_ = go()
    assert status == 1 and results["problems"][-1]["error"] == float("inf")


@pytest.mark.parametrize(
    "name, change, words",
    [("steps", lambda x: x + 3, "3 steps more or fewer"), ("status", lambda x: x + 1, "status [1, 1, 1], and")],
)
def test_a_wrong_report_is_wrong(monkeypatch, name, change, words):
    (problem,) = (problem for problem in listed() if problem.name == FEW[1])

    def solve(device, dtype, kernel, tol):
        got = problem.solve(device, dtype, False, tol)
        return got | {name: change(got[name])} if kernel else got

    monkeypatch.setattr(first, "listed", lambda: [dataclasses.replace(problem, solve=solve)])
    (record,) = first.compared(CPU, "interpreter", None)
    assert words in record["wrong"]


def test_an_op_that_raises_is_reported_and_the_next_one_follows(go, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(dispatch._ops, "rows.affine", dataclasses.replace(dispatch.load("rows.affine"), solve=raises))
    status, results, _, reported = go()
    assert status == 1 and [bool(r["wrong"]) for r in results["problems"]] == [True, False, False]
    assert "CHECK FAILED: rows.affine solve: raised RuntimeError: no such instruction" in reported
    assert results["figures"][0]["wrong"] and not results["figures"][1]["wrong"]


def test_only_promised_bits_fail(monkeypatch):
    """On a GPU that is not there: the op's results are the reference's, and the emulator's are an ulp off."""
    (problem,) = (problem for problem in listed() if problem.name == FEW[2])
    plain = dataclasses.replace(problem, solve=lambda *known: problem.solve(known[0], known[1], False, known[3]))
    monkeypatch.setattr(first, "listed", lambda: [plain])
    got = plain.run(CPU)
    tensors = {name: first.kept(value) | {"promised": name == "s"} for name, value in got.items()}
    known = {"triton": ".".join(map(str, dispatch.triton_version())), "chips": {"90": {problem.name: tensors}}}

    def record():
        (one,) = first.compared(CPU, "gpu", known)
        return one

    assert record()["wrong"] is None and {b["same"] for b in record()["bits"].values()} == {True}
    tensors["n"] = first.kept(torch.nextafter(got["n"], torch.tensor(9.0))) | {"promised": False}
    assert record()["wrong"] is None and record()["bits"]["n"] == {"promised": False, "same": False, "ulps": 1.0}
    tensors["s"] = first.kept(torch.nextafter(got["s"], torch.tensor(9.0))) | {"promised": True}
    assert record()["wrong"] == "s has other bits than the emulator's, which are promised (1.0 ulps)"
    known["triton"] = "2.0.0"
    assert record()["wrong"] is None and not record()["bits"]["s"]["promised"]
    known["triton"] = ".".join(map(str, dispatch.triton_version()))
    monkeypatch.setattr(first.devices, "emulated", 100)
    assert record()["wrong"] is None and not record()["bits"]["s"]["promised"]


def test_ctrl_c_and_what_time_does_not_allow(go, monkeypatch):
    status, results, _, reported = go("--minutes", "0")
    assert status == 0 and results["problems"] == [] == results["figures"]
    assert "left out: problems: the time was over after 0" in reported

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "run", interrupted)
    status, results, _, reported = go()
    assert status == 130 and len(results["problems"]) == len(FEW) and "interrupted" in reported


def test_a_kernel_that_does_not_end(go, monkeypatch):
    """The main thread is in a call that no alarm ends; here one that ignores it."""

    def hangs(*_):
        yield {"name": "one", "size": "", "device": None, "host": None, "wrong": None}
        assert ended.wait(20)

    ended, statuses = threading.Event(), []
    monkeypatch.setattr(first.os, "_exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr(first.measure, "deadline", lambda seconds: contextlib.nullcontext())
    monkeypatch.setattr(first, "SPARE", 0.3)
    monkeypatch.setattr(first, "listed", list)
    monkeypatch.setattr(figures, "run", hangs)
    status, results, _, reported = go("--minutes", "0.01")
    assert statuses == [1] and status == 1
    assert "CHECK FAILED: figures: the GPU did not answer after 1 were done" in reported


@pytest.mark.parametrize("passed, status", [(True, 0), (None, 0), (False, 1)])
def test_a_gpu_runs_its_tests_last(go, no_figures, monkeypatch, passed, status):
    asked = []

    def tests(folder, seconds, most):
        asked.append((folder.name, seconds, most))
        return {"passed": passed, "text": "some words"}

    monkeypatch.setattr(processes, "tests", tests)
    monkeypatch.setattr(first, "backend_of", lambda device: ("gpu", "as if"))
    monkeypatch.setattr(first, "listed", list)
    got, results, printed, reported = go("--minutes", "1")
    ((folder, seconds, most),) = asked
    assert folder == "kernels" and 30 < seconds < 60 and most > 1
    assert got == status and results["tests"]["passed"] is passed and results["complete"] is (passed is not None)
    assert ("CHECK FAILED: tests: some words" in reported) is (status == 1)
    assert go("--no-tests")[1]["tests"] is None and len(asked) == 1


@pytest.mark.slow
def test_failures_of_tests_are_named(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_a():\n    pass\ndef test_b():\n    assert 0\ndef test_c():\n    assert 0\n"
    )
    outcome = processes.tests(tmp_path, 60, 5)
    *named, last = outcome["text"].splitlines()
    assert not outcome["passed"] and "2 failed, 1 passed" in last
    assert [line.rpartition("::")[2].split()[0] for line in named] == ["test_b", "test_c"]
    assert processes.tests(tmp_path, 0) == {"passed": None, "text": "no time"}
    code = "import time; print('..F.E'); print('.F [ 90%]', flush=True); time.sleep(60)"
    assert processes.run(["-S", "-c", code], 2) == (1, "stopped after 2 s, when 3 tests had failed")


@pytest.mark.parametrize("arguments", [["--suite", "full"], ["--cell", "mlp"], ["--minutes", "-1"]])
def test_bad_arguments(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        bench.main(["--first", "--out", str(tmp_path), *arguments])
    assert error.value.code == 2 and "argument --" in capsys.readouterr().err


def test_without_the_interpreter_references_run_alone(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritondeq", "bench", "--first", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "TRITON_INTERPRET=1 runs the kernels in an interpreter" in done.stderr
    (path,) = tmp_path.glob("first-*.json")
    results = json.loads(path.read_text())
    assert len(results["problems"]) == len(listed()) == done.stdout.count("not run")
    for r in results["problems"]:
        exact = r["op"] == "norms.residual"  # true or false, and so without an error
        assert (
            r["error"] is None and (r["reference_error"] == 0 if exact else r["reference_error"] > 0) and not r["wrong"]
        )


def test_problems_have_every_op_and_what_the_emulator_gave():
    problems, known = {problem.name: problem for problem in listed()}, first.expected()
    assert {problem.op for problem in problems.values()} == set(launch.SHAPES)
    assert len(problems) == len(listed())
    for tensors in known["chips"].values():
        assert tensors.keys() == problems.keys()
        promised = {name: {key for key, one in of.items() if one["promised"]} for name, of in tensors.items()}
        for name in (
            "rows.affine relu solve",
            "rows.affine relu adjoint",
            "steps.affine relu solve",
            "steps.picard solve",
        ):
            assert promised[name] == {"z", "steps", "status"}
        for solver in ("picard", "anderson", "broyden"):
            assert promised[f"steps.{solver} float64 solve"] == {"z", *OUTCOME}
        assert promised["norms.residual_rms"] == {"s"} and promised["norms.residual"] == {"1 + far"}
        for name in ("rows.affine solve", "rows.mlp solve", "rows.gated adjoint", "norms.group_norm"):
            assert not promised[name], "it has approximate instructions"


@pytest.mark.parametrize("replayed, note", [(2e-5, None), (None, "no graph took it")])
def test_figures_of_a_gpu(monkeypatch, replayed, note):
    waits, times = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(figures.measure, "replayed", lambda call, device: replayed)
    monkeypatch.setattr(figures, "calls", lambda large: [("it", "4 x 4", lambda device: lambda: times.append(large))])
    (record,) = figures.run(torch.device("cuda"), "gpu")
    assert (record["device"], record["note"], record["wrong"]) == (replayed, note, None)
    assert 0 < record["host"] < 1e-3 and times == [True] * (1 + figures.LAUNCHES * figures.ROUNDS)
    assert len(waits) == figures.ROUNDS + 1


@pytest.mark.parametrize(
    "name",
    ["steps.picard step", "steps.affine step"]
    + [pytest.param(f"steps.{solver} step", marks=pytest.mark.slow) for solver in ("anderson", "broyden")],
)
def test_no_sample_stops_while_steps_are_timed(name):
    made = {name: make for name, _, make in figures.calls(False)}
    call = made[name](CPU)
    for _ in range(26):  # past the test of a plateau
        call()
    steps = call.func.__self__
    assert steps.count == 4 and (steps.outcome()[1] == 26).all()
