"""The programs of examples/: each learns something in a fresh process, and a training run survives being killed."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
LM = ("--features", "16", "--length", "16", "--batch", "4")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(name: str, *flags: object, launcher: tuple[str, ...] = ()) -> tuple[list[str], dict]:
    """Returns what runs an example on the CPU, where a warning is an error, and the process's options."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error::UserWarning"}
    line = [sys.executable, *launcher, str(FOLDER / f"{name}.py"), *map(str, flags)]
    return line, {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def run(name: str, *flags: object, launcher: tuple[str, ...] = ()) -> str:
    """Returns what an example prints."""
    line, options = command(name, *flags, launcher=launcher)
    done = subprocess.run(line, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, start: str) -> list[float]:
    """Returns the numbers after `start` in the line that begins with it."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [float(number) for number in re.findall(r"-?\d[\d,]*\.?\d*", line[len(start) :].replace(",", ""))]


@pytest.mark.slow
def test_classify_digits():
    """Both nets read most digits, and the equilibrium has a fraction of the weights."""
    text = run("classify_digits", "--steps", 40)
    (ours, right, _), (theirs, rival, _) = (numbers(text, name) for name in ("equilibrium of one", "stack of 6 blocks"))
    assert right > 60 and rival > 60 and ours < theirs / 4
    least, most, mean = numbers(text, "evaluations for a test image:")
    assert 1 < least < mean < most <= 50


@pytest.mark.slow
def test_algorithms():
    """Trained on 6 bits, the equilibrium has most strings of 48 right in every bit, by more evaluations."""
    text = run("algorithms", "--steps", 60, "--bits", 6)
    (_, short, few, *_, long, many), rival = numbers(text, "equilibrium"), numbers(text, "stack of 10 blocks")
    assert short > 80 and long > 80 and many > 2 * few
    assert rival[1] > 80 and rival[-2] < 20, "a stack sees 20 positions"


@pytest.mark.slow
def test_graph():
    """Beyond four edges the stack has a third of the nodes right, by chance, and the equilibrium all."""
    text = run("graph", "--steps", 20)
    ours, rival = numbers(text, "equilibrium"), numbers(text, "stack of 4 convolutions")
    assert min(ours[:3]) > 90 and rival[0] > 90 > 60 > max(rival[1:3]), text
    assert text.endswith("CONVERGED\n")


@pytest.mark.slow
def test_deblur():
    """Trained for a moment, the equilibrium restores more than it was given, and goes on to do so at 128 steps."""
    text = run("deblur", "--steps", 16)
    blurred, wiener, solved = (float(value) for value in re.findall(r"([\d.]+) dB", text)[:3])
    ours = numbers(text, "equilibrium")[1:]
    assert solved > blurred + 0.3 and wiener > blurred + 0.3
    assert ours[-1] > blurred + 0.3 and ours[0] < ours[3] < ours[6], text


@pytest.mark.slow
def test_control():
    """The cost falls, and a solve that starts from the last moment's equilibrium takes fewer evaluations."""
    text = run("control", "--steps", 6)
    costs = [float(cost) for cost in re.findall(r"steps: cost ([\d.]+)", text)]
    assert costs[-1] < 0.95 * costs[0]
    (cold, cost), (warm, same) = (
        numbers(text, f"solves that start from {s}:") for s in ("zeros", "the last moment's equilibrium")
    )
    assert warm < cold - 1 and same == pytest.approx(cost, rel=0.05)


@pytest.mark.slow
def test_train_lm():
    """Far fewer bits than the seven of a symbol of ASCII, and 200 symbols are written beside the prompt."""
    text = run("train_lm", "--features", 32, "--length", 32, "--batch", 4, "--steps", 30, "--every", 10)
    learnt, _ = numbers(text, "held-out text:")
    assert learnt < 5.5
    assert len(text.partition("token by token:\n")[2]) == len("def ") + 200 + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_short_and_starts_with_what_it_teaches(name):
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) < 150
    assert lines[0].startswith('"""') and f"examples/{name}.py" in lines[2] and " s " in lines[3] and lines[4] == '"""'


@pytest.mark.parametrize("flags", ["--steps 0", "--steps many", "--device tpu", "--seed -1", "--stesp 3", "--ste 3"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_flag_is_one_line(name, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and not out and error.count("\n") == 1 and error.startswith(f"{name}.py: error: ")
    assert flags.split()[0] in error


def test_a_save_that_is_cut_off_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save = runpy.run_path(str(FOLDER / "train_lm.py"))["save"]
    path = tmp_path / "last.pt"
    save(path, {"step": 1})

    def cut_off(state, file):
        Path(file).write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"step": 2})
    assert torch.load(path) == {"step": 1}


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """To the bit: the last loss and every parameter."""
    flags = (*LM, "--steps", 24, "--every", 4)
    text = run("train_lm", *flags, "--checkpoint", tmp_path / "whole.pt")
    broken = tmp_path / "broken.pt"
    line, options = command("train_lm", *flags, "--checkpoint", broken)
    with subprocess.Popen(line, **options) as process:
        for printed in process.stdout:
            if printed.startswith("step 12:"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    reached = torch.load(broken)["step"]
    assert 8 <= reached < 24
    rest = run("train_lm", *flags, "--checkpoint", broken)
    assert rest.startswith(f"goes on after step {reached} of ") and rest.splitlines()[-2:] == text.splitlines()[-2:]
    whole, resumed = torch.load(tmp_path / "whole.pt"), torch.load(broken)
    assert whole["step"] == resumed["step"] == 24 and whole["loss"] == resumed["loss"]
    assert all(torch.equal(p, resumed["net"][name]) for name, p in whole["net"].items())

    line, options = command("train_lm", *flags, "--seed", "5", "--checkpoint", broken)
    refused = subprocess.run(line, **options)
    assert refused.returncode == 1 and refused.stderr.startswith(f"{broken} is of a run with other flags: ")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_train_as_one_process_does(tmp_path):
    """Both end with the same parameters, which are those of one process with the same batches."""
    flags = (*LM, "--steps", 12, "--every", 6)
    alone, two = tmp_path / "alone.pt", tmp_path / "two.pt"
    run("train_lm", *flags, "--checkpoint", alone)
    run("train_lm", *flags, "--checkpoint", two, launcher=TORCHRUN)  # fails where ranks end with other parameters
    for name, p in torch.load(alone)["net"].items():
        torch.testing.assert_close(p, torch.load(two)["net"][name], rtol=1e-3, atol=1e-4)
