"""How residual stacks begin as equilibria: the command, and what the docstring of `to_equilibrium` promises of it."""

import pytest
import torch

from tritondeq import to_equilibrium
from tritondeq.bench import wirings
from tritondeq.bench.machine import installed

HERE = [name for name, (_, package) in wirings.WIRINGS.items() if installed(package)]
OF_TORCH = [name for name, (_, package) in wirings.WIRINGS.items() if package == "torch"]


def numbers(cell: str) -> tuple[float, float]:
    low, high = cell.partition(",")[0].split(" to ")
    return float(low), float(high)


def test_stacks_as_they_are_drawn_are_contractions(capsys):
    wirings.main(["--seeds", "1", "--blocks", "3"])
    printed = capsys.readouterr().out
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line)
    assert head == wirings.HEAD and [row[:2] for row in rows] == [[name, w] for w in ("1x", "4x") for name in HERE]
    assert printed.count("Not measured: ") == len(wirings.WIRINGS) - len(HERE)
    for row in rows[: len(HERE)]:
        cells = dict(zip(head, row, strict=True))
        assert "not" not in str(row) and numbers(cells["spectral radius"])[1] < 0.7, row
        assert numbers(cells["undamped"])[1] <= 15 and numbers(cells["its over ours"])[0] >= 1, row


@pytest.mark.parametrize("name", OF_TORCH)
@torch.no_grad()
def test_the_familiar_block_has_the_same_fixed_point(monkeypatch, name):
    monkeypatch.setattr(wirings, "TOL", 1e-6)
    stack, x = wirings.WIRINGS[name][0](2)
    layer = to_equilibrium(stack, tol=1e-6, max_steps=200)
    familiar = wirings._familiar(layer.deq.cell.block, x)
    torch.testing.assert_close(familiar.value, layer(x), rtol=1e-4, atol=1e-4)
    assert familiar.converged.all() and (familiar.value - x).abs().max() > 0.1


def test_what_does_not_converge_is_shown():
    inf, nan = torch.inf, torch.nan
    assert wirings._range(torch.tensor([2.0, 5.0, inf, 3.0]), 0) == "2 to 5, 25 % not"
    assert wirings._range(torch.tensor([nan, nan]), 2) == "100 % not"
