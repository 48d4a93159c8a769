"""How residual stacks begin as equilibria: the command, and the table of NOTES.md that it printed."""

from pathlib import Path

import pytest
import torch

from tritondeq import to_equilibrium
from tritondeq.bench import wirings
from tritondeq.bench.common import installed

NOTES = (Path(__file__).parent.parent / "bench" / "NOTES.md").read_text()
COMMAND = "python -m tritondeq.bench.wirings"


def table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """Cells by column, by wiring and weights."""
    (_, *head), _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    )
    assert ["wiring", *head] == wirings.HEAD
    return {(name, row[0]): dict(zip(head, row, strict=True)) for name, *row in rows}


def numbers(cell: str) -> tuple[float, float]:
    low, high = cell.partition(",")[0].split(" to ")
    return float(low), float(high)


@pytest.fixture(scope="module")
def committed():
    (section,) = (part for part in NOTES.split("\n## ") if COMMAND in part)
    return table(section[section.index("| wiring") :])


def test_the_committed_table_has_all_wirings(committed):
    assert [*committed] == [(name, f"{scale}x") for scale in wirings.SCALES for name in wirings.WIRINGS]


@pytest.mark.slow
def test_a_part_of_the_measurement_lies_within_the_committed_table(committed, capsys):
    """Of torch's blocks, where every sample converged: how a diverging one fares differs between machines, and what
    other packages draw between their releases."""
    wirings.main(["--seeds", "1", "--blocks", "3"])
    printed = capsys.readouterr().out
    measured, checked = table(printed), 0
    here = [name for name, wiring in wirings.WIRINGS.items() if installed(wiring.needs)]
    assert [*measured] == [(name, weights) for weights in ("1x", "4x") for name in here] and len(here) >= 5
    assert printed.count("Not measured: ") == len(wirings.WIRINGS) - len(here)
    for key, row in measured.items():
        plain = wirings.WIRINGS[key[0]].needs == "torch"
        assert plain or key[1] == "4x" or (numbers(row["spectral radius"])[1] < 1 and "not" not in str(row)), key
        for column, cell in row.items():
            if plain and "not" not in committed[key]["undamped"] and column != "weights":
                (low, high), (least, most) = numbers(cell), numbers(committed[key][column])
                room = {"spectral radius": 0.02, "its over ours": 0.3}.get(column, 1)
                assert least - room <= low <= high <= most + room, (key, column)
                checked += 1
    assert checked == 8 * 6  # torch's encoders, of large weights, are left out
    mean, first = numbers(measured["MLP, pre-norm", "1x"]["spectral radius"])
    assert mean < 0.5 * first  # a mean of three has weights smaller by sqrt(3), and so both its matrices


@pytest.mark.parametrize("name", [name for name, wiring in wirings.WIRINGS.items() if wiring.needs == "torch"])
@torch.no_grad()
def test_the_familiar_block_has_the_same_fixed_point(monkeypatch, name):
    monkeypatch.setattr(wirings, "TOL", 1e-6)
    stack, x = wirings.WIRINGS[name].make(2)
    layer = to_equilibrium(stack, tol=1e-6, max_steps=200)
    familiar = wirings._familiar(layer.deq.cell.block, x)
    torch.testing.assert_close(familiar.value, layer(x), rtol=1e-4, atol=1e-4)
    assert familiar.converged.all() and (familiar.value - x).abs().max() > 0.1
