"""How residual stacks begin as equilibria: the command, the table of NOTES.md that it printed, and who quotes that."""

import re
from pathlib import Path

import pytest
import torch

import tritondeq as tdeq
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


def test_a_part_of_the_measurement_lies_within_the_committed_table(committed, capsys):
    """Of torch's blocks, where every sample converged: how a diverging one fares differs between machines, and what
    other packages draw between their releases."""
    wirings.main(["--seeds", "1", "--blocks", "3"])
    printed = capsys.readouterr().out
    found, checked = table(printed), 0
    here = [name for name, wiring in wirings.WIRINGS.items() if installed(wiring.needs)]
    assert [*found] == [(name, weights) for weights in ("1x", "4x") for name in here] and len(here) >= 5
    assert printed.count("Not measured: ") == len(wirings.WIRINGS) - len(here)
    for key, row in found.items():
        own = wirings.WIRINGS[key[0]].needs == "torch"
        assert own or key[1] == "4x" or (numbers(row["spectral radius"])[1] < 1 and "not" not in str(row)), key
        for column, cell in row.items():
            if own and "not" not in committed[key]["undamped"] and column != "weights":
                (low, high), (least, most) = numbers(cell), numbers(committed[key][column])
                room = {"spectral radius": 0.02, "its over ours": 0.3}.get(column, 1)
                assert least - room <= low <= high <= most + room, (key, column)
                checked += 1
    assert checked == 8 * 6  # torch's encoders, of large weights, are left out
    mean, first = numbers(found["MLP, pre-norm", "1x"]["spectral radius"])
    assert mean < 0.5 * first  # a mean of three has weights smaller by sqrt(3), and so both its matrices


def test_the_docstring_tells_what_the_command_printed(committed):
    doc = " ".join(to_equilibrium.__doc__.split())
    assert COMMAND in doc

    def spread(column, weights):
        cells = [numbers(row[column]) for (_, w), row in committed.items() if w == weights and "not" not in row[column]]
        return min(low for low, _ in cells), max(high for _, high in cells)

    def missed(name, column):
        return int(re.search(r"(\d+) % not", committed[name, "4x"][column])[1])

    (rho, top), (few, many) = spread("spectral radius", "1x"), spread("undamped", "1x")
    assert f"spectral radius {rho:.2f} to {top:.2f}, {few:g} to {many:g} undamped evaluations to 1e-3" in doc
    assert "and {:.1f} to {:.1f} times as many of the familiar block".format(*spread("its over ours", "1x")) in doc
    rho, many = spread("spectral radius", "4x")[1], spread("undamped", "4x")[1]
    assert f"four times as large, up to {rho:.2f} and {many:g} where all converge" in doc
    pre, post = "encoder, pre-norm", "encoder, post-norm"
    assert f"{missed(pre, 'undamped')} % (pre-norm) and {missed(post, 'undamped')} % (post-norm) do not in 200" in doc
    assert f"by Anderson {missed(pre, 'Anderson(5)')} % and {missed(post, 'Anderson(5)')} %." in doc
    failing = {name for (name, weights), row in committed.items() if "not" in row["undamped"]}
    assert failing == {pre, post} and not any("not" in str(row) for (_, w), row in committed.items() if w == "1x")


@pytest.mark.parametrize("name", [name for name, wiring in wirings.WIRINGS.items() if wiring.needs == "torch"])
@torch.no_grad()
def test_the_familiar_block_has_the_same_fixed_point(monkeypatch, name):
    monkeypatch.setattr(wirings, "TOL", 1e-6)
    stack, x = wirings.WIRINGS[name].make(2)
    layer = to_equilibrium(stack, tol=1e-6, max_steps=200)
    familiar = wirings._familiar(layer.deq.cell.block, x)
    torch.testing.assert_close(familiar.value, layer(x), rtol=1e-4, atol=1e-4)
    assert familiar.converged.all() and (familiar.value - x).abs().max() > 0.1


def test_weights_are_scaled_and_biases_are_not(monkeypatch):
    seen = []
    monkeypatch.setattr(
        tdeq, "to_equilibrium", lambda stack, made=to_equilibrium, **how: seen.append(stack) or made(stack, **how)
    )
    for scale in (1, 4):
        wirings.start("MLP, pre-norm", scale, 1, "first", 0)
    for (name, a), b in zip(seen[0].named_parameters(), seen[1].parameters(), strict=True):
        assert torch.equal(4 * a if name.endswith(("up.weight", "down.weight")) else a, b)


def test_what_does_not_converge_is_told_apart():
    inf, nan = torch.inf, torch.nan
    assert wirings._range(torch.tensor([2.0, 5.0, inf, 3.0]), 0) == "2 to 5, 25 % not"
    assert (
        wirings._range(torch.tensor([nan, nan]), 2) == "100 % not"
        and wirings._range(torch.tensor([0.5]), 2) == "0.50 to 0.50"
    )
