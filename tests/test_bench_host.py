"""What a call of a small layer costs beside its evaluations, by counts that hold on any machine."""

import pytest
import torch

from tritondeq import backend, cells
from tritondeq.bench import host

CPU = torch.device("cpu")
# Torch operations and calls of Python functions at most, beyond those by hand: six evaluations, and six products.
MOST = {"forward": (28, 260), "training step, OneStep": (42, 420), "training step, Implicit": (78, 620)}


@pytest.mark.parametrize("work", host.WORK)
def test_no_call_does_more_than_promised(work):
    with backend("torch"):
        calls = host.contestants(work, CPU)
        by_hand, ours = (host.counts(calls[name]) for name in ("by hand", "tritondeq"))
    assert ours["ops"] - by_hand["ops"] <= MOST[work][0]
    assert ours["frames"] - by_hand["frames"] <= MOST[work][1]


def test_a_call_makes_six_evaluations_and_six_products():
    """The bench's own solves: else more would be measured than is done by hand."""
    torch.manual_seed(0)
    cell, x = host.Cell(), torch.randn(host.ROWS, host.WIDTH)
    layer = host.layer(True, cell, x)
    host.loss(layer(x)).backward()
    for outcome in (layer.last, layer.last.adjoint):
        assert outcome.converged.all() and outcome.steps.max() == host.EVALUATIONS


def test_the_table():
    with backend("torch"):
        records = list(host.run(CPU, 0.0, width=8))
    rows = host.table(records)
    assert len(rows) == 1 + len(records) and {record["case"] for record in records} > set(host.WORK)
    for record in records:
        assert record["over_hand"] > 0 and (record["contestant"] != "by hand" or record["over_hand"] == 1)


@pytest.mark.parametrize("name", ["Affine", "Gated", "MLP", "Monotone"])
def test_no_cell_is_decomposed_as_it_is_constructed(name, monkeypatch):
    """Of a wide cell: a decomposition takes seconds, and drawing the weights a fraction of one."""

    def decompose(*_, **__):
        raise AssertionError("a matrix was decomposed")

    for function in ("svdvals", "svd", "eigh", "matrix_norm", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, function, decompose)
    bounded = {"contraction": 0.9} if name in ("Affine", "Gated") else {}
    for options in ({}, bounded):
        getattr(cells, name)(300, **options)


@pytest.mark.parametrize("width", [257, 512])
def test_a_wide_cell_begins_with_the_norm_of_a_narrow_one(width):
    norm = torch.linalg.matrix_norm(cells.Affine(width).weight.detach(), 2)
    assert 0.9 * 0.95 < norm < 0.9 * 1.03
