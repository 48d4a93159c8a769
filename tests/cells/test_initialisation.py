"""Every cell begins contractive, as `python -m tritondeq.bench.cells` measures it."""

import pytest

from tritondeq import cells
from tritondeq.bench.cells import MAKE, rows, start

NARROW = [(name, width) for name in MAKE for width in (16, 64)]
WIDE = [(name, 256) for name in MAKE] + [(name, 1024) for name in ("MLP, post", "Gated", "Monotone")]


@pytest.mark.parametrize("name, width", NARROW + [pytest.param(*wide, marks=pytest.mark.slow) for wide in WIDE])
def test_contractive(name, width):
    radius, steps = start(name, width, **({"samples": 2, "seeds": 1} if width > 64 else {}))
    assert radius < 0.9 and steps <= 15


def test_every_cell_is_in_the_table():
    shown = {name.split(",")[0] for name in MAKE}
    assert shown == {name for name in vars(cells) if name[0].isupper()} - {"Cell"}
    head, row = rows(["Affine"], (16,))
    assert head == ["cell", "16"] and row[0] == "Affine" and row[1].startswith("0.")
