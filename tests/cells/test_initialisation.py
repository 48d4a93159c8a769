"""Every cell begins contractive."""

import pytest

from tritondeq import cells
from tritondeq.bench.cells import MAKE, rows, start


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("width", [16, 64, 256])
def test_contractive(name, width):
    small = {"samples": 2, "seeds": 1} if width == 256 else {}
    radius, steps = start(name, width, **small)
    assert radius < 0.9 and steps <= 15


@pytest.mark.parametrize("name", ["MLP, post", "Gated", "Monotone"])
def test_contractive_where_wide(name):
    radius, steps = start(name, 1024, samples=1, seeds=1)
    assert radius < 0.9 and steps <= 15


def test_every_cell_is_in_the_table():
    shown = {name.split(",")[0] for name in MAKE}
    assert shown == {name for name in vars(cells) if name[0].isupper()} - {"Cell"}
    head, (name, cell) = rows(["Affine"], (16,))
    assert head == ["cell", "16"] and name == "Affine" and cell.startswith("0.")
