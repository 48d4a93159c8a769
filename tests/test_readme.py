"""The Python blocks of README.md run one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_every_block_runs(capsys):
    blocks, names = re.findall(r"```python\n(.*?)```", TEXT, re.S), {}
    blocks = [block for block in blocks if "import timm" not in block]  # tests of to_equilibrium run that one
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 5
    report, printed = names["report"], capsys.readouterr().out
    assert 1 < report["steps"] <= report["steps_max"] <= 50 and 0 < report["radius"]
    assert (
        "\nDEQ of Block: Picard(), Implicit(), tol 0.001, max_steps 50\n" in f"\n{printed}" and "  radius " in printed
    )
    assert all(p.grad.isfinite().all() for p in names["core"].parameters())
    assert isinstance(names["core"].tol, float) and torch.is_grad_enabled()
