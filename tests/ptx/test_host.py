"""What the host does for a solve by a kernel that holds the cell, by counts that hold on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Launches, and torch operations and Python calls at most, of a forward pass and of a training step. A solve is one
# launch; one scales a right-hand side, and one compares residuals unless a solver splits.
MOST = {
    "Affine": ((1, 3, 240), (4, 27, 590)),
    "MLP": ((1, 11, 300), (4, 99, 740)),
    "Gated": ((1, 4, 240), (4, 71, 620)),
    "Monotone": ((1, 25, 350), (3, 75, 700)),
}


@pytest.mark.kernels
@pytest.mark.slow
def test_a_call_has_no_more_launches_operations_and_calls_than_promised():
    command = [sys.executable, "-W", "ignore", "-m", "tests.ptx.host", "0"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    rows = [[part.strip() for part in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert {(name, work) for name, work, *_ in rows} == {(c, w) for c in MOST for w in ("forward", "training step")}
    for name, work, _, *counted in rows:
        launches, ops, frames = map(int, counted)
        wanted, most_ops, most_frames = MOST[name][work != "forward"]
        assert launches == wanted and ops <= most_ops and frames <= most_frames, (name, work)
