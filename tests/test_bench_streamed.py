"""How often the second term of W is read: the rules are the kernel's, and the predictions take what comes out."""

import importlib

import pytest
import torch

import tritondeq as tdeq
from tritondeq.bench import predict, streamed
from tritondeq.kernels import dispatch


def problem(rows, width=24):
    cell = tdeq.cells.Affine(width)
    with torch.no_grad():
        u, w = cell.inject(torch.randn(rows, width))
    return cell, u, w


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")
def test_the_lag_is_the_kernels():
    assert importlib.import_module("tritondeq.kernels.rows").LAG.value == streamed.LAG


@pytest.mark.parametrize("share", [16, 40, 5])
def test_rows_take_the_steps_of_a_solve(share):
    """Whatever the queue; a row that is behind may take one or two more."""
    _, u, w = problem(2 * share)
    found = streamed.simulate(w, u, None, 1e-4, share)
    plain = tdeq.fixed_point(lambda z: torch.tanh(u + z @ w.mT), torch.zeros_like(u), tol=1e-4, batch_dims=1).steps
    off = found.steps - plain
    assert ((off >= 0) & (off <= 2)).all()
    most = plain.view(2, share).amax(1).double().mean()
    assert found.evaluations >= most and (share > 16 or found.evaluations <= most + 2)


@pytest.mark.parametrize("lag, least, most", [(1e9, 0.0, 0.0), (1e-9, 0.8, 1.0)])
def test_it_is_read_when_the_lag_is_due(monkeypatch, lag, least, most):
    monkeypatch.setattr(streamed, "LAG", lag)
    monkeypatch.setattr(streamed, "MOST", 30)  # who is always behind never stops
    _, u, w = problem(32)
    assert least <= streamed.simulate(w, u, None, 1e-3, 16).reads <= most


def test_the_table_and_the_prediction(capsys):
    _, *rows = streamed.table(tols=(1e-4,), shares=(16,), programs=8)
    assert [row[0] for row in rows] == ["solve", "adjoint"]
    for row in rows:
        assert float(row[-1].removesuffix(" %")) / 100 == pytest.approx(predict.READS, abs=0.03)
    streamed.main([])
    out = capsys.readouterr().out
    assert out.count("\n") == 10 and all(line.startswith("| ") for line in out.splitlines())
