"""The command line: what it answers, in how many lines, and with which exit status."""

import os
import re
import signal
import subprocess
import sys
import time
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


def start(code: str, *arguments: str, **options) -> subprocess.Popen:
    """The command in a new process, after `code`."""
    code = f"import sys\n{code}\nfrom tritondeq.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


WHOLE = "takes an integer from {} to 2147483647, got '{}'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: command"),
        ("dmeo", "invalid choice: 'dmeo' (choose from"),
        ("demo mnist", "invalid choice: 'mnist' (choose from"),
        ("demo --qui", "demo: error: unrecognized arguments: --qui"),
        ("doctor digits", "doctor: error: unrecognized arguments: digits"),
        ("demo --out", "--out: expected one argument"),
        ("demo --seeds 0", f"--seeds: {WHOLE.format(1, 0)}"),
        ("demo --seeds 1.5", f"--seeds: {WHOLE.format(1, 1.5)}"),
        ("demo --seed -1", f"--seed: {WHOLE.format(0, -1)}"),
        ("demo --seed 2147483648", f"--seed: {WHOLE.format(0, 2147483648)}"),
        ("tune --cell mnist", "--cell: invalid choice: 'mnist' (choose from"),
        ("tune --cell", "--cell: expected at least one argument"),
        ("tune 64", "tune: error: unrecognized arguments: 64"),
        ("demo --device tpu", "--device: takes auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("demo --device meta", "--device: takes auto, cpu, cuda or cuda:N, got 'meta'"),
        ("demo --device cuda:99", "--device: asks for cuda:99, and torch sees"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    status, line = fails(capsys, *arguments.split())
    assert status == 2
    assert line.startswith("python -m tritondeq") and message in line and "--help" in line


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out, error = capsys.readouterr()
    assert not stop.value.code and not error
    assert re.findall(r"^    (\w+)  ", out, re.MULTILINE) == ["demo", "doctor", "tune", "bench"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert not stop.value.code and "--suite" in capsys.readouterr().out


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: "all is well")
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr() == ("all is well\n", "")


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("task", cli.TASKS)
def test_a_folder_that_cannot_be_written(capsys, tmp_path, task, below):
    """It fails before anything is trained."""
    file = tmp_path / "file"
    file.touch()
    out = file / "out" if below else file
    status, line = fails(capsys, "demo", task, "--out", str(out))
    assert status == 1 and line.startswith(f"tritondeq: cannot write to {out}: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "module", "package"), [("digits", "sklearn", "scikit-learn"), ("parity", "matplotlib", "matplotlib")]
)
def test_a_missing_package(tmp_path, task, module, package):
    process = start(f"sys.modules[{module!r}] = None", "demo", task, "--out", str(tmp_path / "out"))
    out, error = process.communicate()
    assert process.returncode == 1 and not out
    assert error == f'tritondeq: {package} is missing: pip install "tritondeq[demo]"\n'
    assert not (tmp_path / "out").exists()


def test_other_missing_modules_are_not_blamed_on_an_extra(monkeypatch, tmp_path):
    def run(*arguments):
        raise ModuleNotFoundError("No module named 'colour'", name="colour")

    monkeypatch.setattr(digits, "run", run)
    with pytest.raises(ModuleNotFoundError, match="colour"):
        cli.main(["demo", "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_while_it_trains(tmp_path):
    """The handler is set by hand, because a shell's background jobs, and so this test in one, ignore the signal."""
    handler = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(handler, "demo", "parity", "--out", str(tmp_path / "out"))
    first = process.stdout.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130 and "parity" in first and not out
    assert error == "tritondeq: interrupted; finished: nothing yet\n"
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
    quick = "import tritondeq.doctor as d\nd.report = lambda: 'all is well'"
    with start(quick, "doctor", env=buffered) as process:
        process.stdout.close()
        assert not process.stderr.read()
    assert process.returncode == 1
