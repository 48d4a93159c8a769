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
    """The command in a process of its own, after `code`."""
    code = f"import sys\n{code}\nfrom tritondeq.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "required: command"),
        ("dmeo", "invalid choice: 'dmeo' (choose from"),
        ("demo mnist", "invalid choice: 'mnist' (choose from"),
        ("demo --bogus", "demo: error: unrecognized arguments: --bogus"),
        ("demo --qui", "demo: error: unrecognized arguments: --qui"),
        ("doctor digits", "doctor: error: unrecognized arguments: digits"),
        ("demo --out", "--out: expected one argument"),
        ("demo --seeds 0", "--seeds: takes an integer from 1 to 2147483647, got '0'"),
        ("demo --seeds -2", "--seeds: takes an integer from 1 to 2147483647, got '-2'"),
        ("demo --seeds 1.5", "--seeds: takes an integer from 1 to 2147483647, got '1.5'"),
        ("demo --seeds two", "--seeds: takes an integer from 1 to 2147483647, got 'two'"),
        ("demo --seed -1", "--seed: takes an integer from 0 to 2147483647, got '-1'"),
        ("demo --seed 2147483648", "--seed: takes an integer from 0 to 2147483647, got '2147483648'"),
        ("tune --cell mnist", "--cell: invalid choice: 'mnist' (choose from"),
        ("tune --cell", "--cell: expected at least one argument"),
        ("tune --dtype int8", "--dtype: invalid choice: 'int8' (choose from"),
        ("tune --features 64 0", "--features: takes an integer from 1 to 2147483647, got '0'"),
        ("tune --rows many", "--rows: takes an integer from 1 to 2147483647, got 'many'"),
        ("tune 64", "tune: error: unrecognized arguments: 64"),
        ("demo --device tpu", "--device: takes auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("demo --device meta", "--device: takes auto, cpu, cuda or cuda:N, got 'meta'"),
        ("demo --device cuda:99", "--device: asks for cuda:99, and torch sees"),
    ],
)
def test_bad_arguments(capsys, arguments, says):
    status, line = fails(capsys, *arguments.split())
    assert status == 2
    assert line.startswith("python -m tritondeq") and says in line and "--help" in line


def test_no_cuda_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert fails(capsys, "demo", "--device", "cuda")[1].count("torch sees 0 CUDA devices") == 1


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out, error = capsys.readouterr()
    assert not stop.value.code and not error
    assert re.findall(r"^    (\w+)  ", out, re.MULTILINE) == ["demo", "doctor", "tune", "bench"]


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: "all is well")
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr() == ("all is well\n", "")


def test_bench_reads_its_own_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert not stop.value.code and "--suite" in capsys.readouterr().out


def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.touch()
    return path


def below_a_file(tmp_path: Path) -> Path:
    return file(tmp_path) / "out"


def read_only(tmp_path: Path) -> Path:
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    path = tmp_path / "locked"
    path.mkdir(mode=0o500)
    return path


@pytest.mark.parametrize("make", [file, below_a_file, read_only])
@pytest.mark.parametrize("task", cli.TASKS)
def test_folder_that_cannot_be_written(capsys, tmp_path, task, make):
    """It is said before anything is trained."""
    out = make(tmp_path)
    status, line = fails(capsys, "demo", task, "--out", str(out))
    assert status == 1 and line.startswith(f"tritondeq: cannot write to {out}: ")


@pytest.mark.parametrize(
    ("task", "module", "package"),
    [("digits", "sklearn", "scikit-learn"), ("parity", "matplotlib", "matplotlib"), ("parity", "tqdm", "tqdm")],
)
def test_missing_package(tmp_path, task, module, package):
    process = start(f"sys.modules[{module!r}] = None", "demo", task, "--out", str(tmp_path / "out"))
    out, error = process.communicate()
    assert process.returncode == 1 and not out
    assert error == f'tritondeq: {package} is missing: pip install "tritondeq[demo]"\n'
    assert not (tmp_path / "out").exists()


def test_other_missing_modules_are_not_blamed_on_an_extra(monkeypatch):
    def run(options, finished):
        raise ModuleNotFoundError("No module named 'colour'", name="colour")

    monkeypatch.setattr(digits, "run", run)
    with pytest.raises(ModuleNotFoundError, match="colour"):
        cli.main(["demo"])


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("task", cli.TASKS)
def test_interrupted_while_it_trains(tmp_path, task):
    """The handler is set by hand, because a shell's background jobs, and so this test in one, ignore the signal."""
    handler = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(handler, "demo", task, "--out", str(tmp_path / "out"))
    first = process.stdout.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130
    assert task in first and not out
    assert error == "tritondeq: interrupted; finished: nothing yet\n"
    assert not (tmp_path / "out").exists()


def test_interrupted_says_what_is_finished(capsys, monkeypatch, tmp_path):
    def run(options, finished):
        finished += ["DEQ (seed 0) 98.1 %", "one block (seed 0) 97.9 %"]
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "run", run)
    threads = torch.get_num_threads()
    status, line = fails(capsys, "demo", "--out", str(tmp_path))
    assert status == 130 and "finished: DEQ (seed 0) 98.1 %, one block (seed 0) 97.9 %" in line
    assert tmp_path.exists(), "it was there before"
    assert torch.get_num_threads() == threads


def test_options_reach_the_demonstration(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(digits, "run", lambda options, finished: taken.append(options))
    out = tmp_path / "new" / "out"
    common = ["demo", "--device", "cpu", "--out", str(out)]
    for more in ([], ["--quick"], ["digits", "--quick", "--seeds", "2", "--seed", "5"]):
        assert cli.main(common + more) == 0
    assert [(list(o.all_seeds), o.quick) for o in taken] == [([0, 1, 2], False), ([0], True), ([5, 6], True)]
    assert {(o.out, o.device.type) for o in taken} == {(out, "cpu")} and out.is_dir()


def test_closed_pipe():
    """As in `python -m tritondeq doctor | true`."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    quick = "import tritondeq.doctor as d\nd.report = lambda: 'all is well'"
    with start(quick, "doctor", env=buffered) as process:
        process.stdout.close()
        assert not process.stderr.read()
    assert process.returncode == 1
