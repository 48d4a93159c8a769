"""What the host does for a solve by a kernel that holds the cell, by counts that hold on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Torch operations and calls of Python functions at most, of a forward pass and of a training step.
MOST = {
    "Affine": ((3, 300), (53, 700)),
    "MLP": ((11, 360), (125, 950)),
    "Gated": ((4, 310), (105, 780)),
    "Monotone": ((25, 400), (82, 850)),
}


@pytest.mark.kernels
@pytest.mark.slow
def test_a_solve_is_one_launch_and_one_of_its_weights_terms_and_no_more_than_promised_beside_them():
    command = [sys.executable, "-W", "ignore", "-m", "tests.ptx.host", "0"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    rows = [[part.strip() for part in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert {(name, work) for name, work, *_ in rows} == {(c, w) for c in MOST for w in ("forward", "training step")}
    for name, work, _, launches, ops, frames in rows:
        backward = work != "forward"
        most_ops, most_frames = MOST[name][backward]
        assert int(launches) == 2 + 2 * backward and int(ops) <= most_ops and int(frames) <= most_frames, (name, work)
