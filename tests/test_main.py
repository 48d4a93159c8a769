"""The command line: what it answers, in how many lines, and with which exit status."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritondeq import __main__ as cli
from tritondeq import doctor
from tritondeq.demo import digits

ROOT = Path(__file__).parent.parent


def fails(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and the only line printed."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    out, error = capsys.readouterr()
    assert not out and error.endswith("\n") and error.count("\n") == 1, (out, error)
    return status, error


WHOLE = "takes an integer from {} to 2147483647, got '{}'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: command"),
        ("dmeo", "invalid choice: 'dmeo' (choose from"),
        ("demo --qui", "error: unrecognized arguments: --qui"),
        ("doctor digits", "error: unrecognized arguments: digits"),
        ("demo --out", "--out: expected one argument"),
        ("demo --seeds 0", f"--seeds: {WHOLE.format(1, 0)}"),
        ("demo --seeds 1.5", f"--seeds: {WHOLE.format(1, 1.5)}"),
        ("demo --seed -1", f"--seed: {WHOLE.format(0, -1)}"),
        ("tune --cell mnist", "--cell: invalid choice: 'mnist' (choose from"),
        ("demo --device tpu", "--device: takes auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("demo --device cuda:99", "--device: asks for cuda:99, and torch sees"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    status, line = fails(capsys, *arguments.split())
    assert status == 2
    assert line.startswith("python -m tritondeq") and message in line and "--help" in line


def test_help_lists_the_commands(capsys, monkeypatch):
    for arguments in (["--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert not stop.value.code
    out, error = capsys.readouterr()
    assert re.findall(r"^    (\w+)  ", out, re.MULTILINE) == ["demo", "doctor", "tune", "bench"]
    assert not error and "--suite" in out
    monkeypatch.setattr(doctor, "report", lambda: "all is well")
    assert cli.main(["doctor"]) == 0 and capsys.readouterr() == ("all is well\n", "")


@pytest.mark.parametrize("task", cli.TASKS)
def test_a_folder_that_cannot_be_written(capsys, tmp_path, task):
    """It fails before anything is trained."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        status, line = fails(capsys, "demo", task, "--out", str(out))
        assert status == 1 and line.startswith(f"tritondeq: cannot write to {out}: ")


@pytest.mark.parametrize("name", ["sklearn.datasets", "colour"])
def test_a_missing_package(capsys, monkeypatch, tmp_path, name):
    """One of an extra is named with how to install it; of another the error goes on."""

    def run(*arguments):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(digits, "run", run)
    arguments = ["demo", "--out", str(tmp_path / "out")]
    if name == "colour":
        with pytest.raises(ModuleNotFoundError, match="colour"):
            cli.main(arguments)
    else:
        line = 'tritondeq: scikit-learn is missing: pip install "tritondeq[demo]"\n'
        assert fails(capsys, *arguments) == (1, line)
    assert not (tmp_path / "out").exists()


def test_interrupted_after_some_runs(capsys, monkeypatch, tmp_path):
    def run(seeds, out, device, quick, finished):
        finished += ["DEQ (seed 0) 98.1 %", "one block (seed 0) 97.9 %"]
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "run", run)
    threads = torch.get_num_threads()
    status, line = fails(capsys, "demo", "--out", str(tmp_path))
    assert status == 130 and "finished: DEQ (seed 0) 98.1 %, one block (seed 0) 97.9 %" in line
    assert tmp_path.exists() and torch.get_num_threads() == threads


def test_options_reach_the_demonstration(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(digits, "run", lambda *arguments: taken.append(arguments))
    out = tmp_path / "new" / "out"
    common = ["demo", "--device", "cpu", "--out", str(out)]
    for more in ([], ["--quick"], ["digits", "--quick", "--seeds", "2", "--seed", "5"]):
        assert cli.main(common + more) == 0
    expected = [(range(3), False), (range(1), True), (range(5, 7), True)]
    assert [arguments[:4] for arguments in taken] == [(r, out, torch.device("cpu"), q) for r, q in expected]
    assert out.is_dir()


@pytest.mark.slow
def test_a_closed_pipe():
    """As in `python -m tritondeq doctor | true`."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = "import tritondeq.doctor as d, tritondeq.__main__ as m\nd.report = lambda: 'well'\nexit(m.main(['doctor']))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered, **pipes) as process:
        process.stdout.close()
        assert not process.stderr.read()
    assert process.returncode == 1
