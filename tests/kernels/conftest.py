"""The tiles of the affine cell's own steps."""

import pytest

from tritondeq.kernels import launch


@pytest.fixture
def tile(monkeypatch):
    """Chooses the tiles of all launches; the interpreter takes the same time for each."""
    from own_steps import TILES  # needs Triton, which not all tests of this folder do

    def choose(name):
        monkeypatch.setattr(launch, "TILES", {terms: (TILES[name],) * 3 for terms in (1, 2, 3)})

    choose("small")
    return choose
