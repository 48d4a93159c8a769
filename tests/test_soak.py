"""Training does not gather memory, and the instrument that shows so can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from soak import Mark, soak, verdicts


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*options: str) -> subprocess.CompletedProcess:
    """The soak in a new process: a peak that other tests have set would hide what grows."""
    command = [sys.executable, "-m", "tests.soak", *options]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_memory_stays():
    done = run("--steps", "5000", "--no-clock")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a backward solve")  # of the few that are cut short
def test_kept_tensors_are_seen():
    kept = []
    marks = soak(20 * 7, 10, after=lambda: kept.append(torch.zeros(1)), show=lambda line: None)
    assert any("tensors" in text for text in verdicts(marks, clock=False))
    clean = soak(20 * 7, 10, show=lambda line: None)
    assert not any("tensors" in text for text in verdicts(clean, clock=False))


def marks(peaks: list[int], seconds: list[float]) -> list[Mark]:
    return [Mark(k, s, p, 5) for k, (p, s) in enumerate(zip(peaks, seconds, strict=True))]


def test_verdicts():
    flat, even = [100, 110, 120, 130, *[140] * 16], [1.0] * 20
    assert verdicts(marks(flat, even)) == []
    assert "memory" in verdicts(marks([100 + k for k in range(20)], even))[0]
    assert verdicts(marks([*flat[:15], *[180] * 5], even)) == []  # one step of the allocator
    slow = marks(flat, [1.0] * 18 + [1.4] * 2)
    assert "slow" in verdicts(slow)[0] and verdicts(slow, clock=False) == []
