"""The Python of README.md runs, block by block, as a reader would."""

import re
from pathlib import Path

import torch

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_block_runs(capsys):
    blocks, names = re.findall(r"```python\n(.*?)```", TEXT, re.S), {}
    blocks = [block for block in blocks if "import timm" not in block]  # tests/test_convert_real.py runs that
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 5
    report, printed = names["report"], capsys.readouterr().out
    assert 1 < report["steps"] <= report["steps_max"] <= 50 and 0 < report["radius"]
    assert (
        printed.startswith("DEQ of Block: Picard(), Implicit(), tol 0.001, max_steps 50\n") and "  radius " in printed
    )
    assert all(p.grad.isfinite().all() for p in names["core"].parameters())
    assert isinstance(names["core"].tol, float) and torch.is_grad_enabled()
