"""How residual stacks begin as equilibria: the command, and what the docstring of `to_equilibrium` promises of it."""

import pytest

from tritondeq.bench import wirings
from tritondeq.bench.machine import installed

HERE = [name for name, (_, package) in wirings.WIRINGS.items() if installed(package)]


def numbers(cell: str) -> tuple[float, float]:
    low, high = cell.partition(",")[0].split(" to ")
    return float(low), float(high)


@pytest.mark.slow
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
