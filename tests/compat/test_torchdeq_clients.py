"""Small clients of torchdeq, in its own shape of code: by tritondeq.compat.torchdeq they train to the same losses."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from alike import agree

from tritondeq.bench import clients
from tritondeq.compat import torchdeq as ours

# Relative; the last has no tolerance: the same arithmetic.
CURVES = {"Language": 1e-9, "Vision": 1e-9, "Graph": 1e-9, "Flow": 1e-12}


@pytest.mark.parametrize("name", CURVES)
def test_clients_train_alike(theirs, name):
    mine, other = (clients.curve(getattr(clients, name), library, 4) for library in (ours, theirs))
    assert (mine[1:] != mine[:-1]).all()
    agree([mine], [other], CURVES[name])


@pytest.mark.slow
def test_the_table_of_the_clients(theirs):
    rows = clients.table(0.0, 2)
    assert [row[:2] for row in rows[1:]] == [[name, by] for name in CURVES for by in ("torchdeq", "tritondeq")]
    assert all(float(row[3]) <= 1e-9 and float(row[4].split()[0]) > 0 < float(row[5].split()[0]) for row in rows[1:])


def test_rows_that_depend_on_one_another_take_batch_dims_0(theirs):
    """There, each row of a chain is that of its lowest residual, 0 at the start, and the state is no fixed point."""

    def chain(z):
        return torch.cat([torch.ones(1, 2), 0.9 * z[:-1]])

    options, exact = {"f_max_iter": 30, "f_tol": 1e-6}, (0.9 ** torch.arange(6.0))[:, None].expand(6, 2)
    (z,), info = ours.get_deq(**options, batch_dims=0)(chain, exact / 2)
    torch.testing.assert_close(z, exact)
    assert info["abs_lowest"].shape == (1,)
    with pytest.warns(UserWarning, match="rows that are nodes of a graph: batch_dims=0"):
        ours.get_deq(**options)(chain, exact / 2)
    (z,), info = theirs.get_deq(**options)(chain, exact / 2)
    torch.testing.assert_close(z[2:], exact[2:] / 2)
    assert info["abs_lowest"].max() == 0


def test_the_page_runs_as_a_reader_would_run_it():
    torch.set_default_dtype(torch.float32)
    page, names = Path(__file__).parent.parent.parent / "docs/from-torchdeq.md", {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), names)
    assert len(names["states"]) == 2 and (names["info"]["abs_lowest"] <= 1e-3).all()
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
    assert len(names["solution"].states) == 2


def test_the_page_has_every_option_and_name():
    text = (Path(__file__).parent.parent.parent / "docs/from-torchdeq.md").read_text()
    parser = argparse.ArgumentParser()
    ours.add_deq_args(parser)
    for name in vars(parser.parse_args([])):
        assert f"`{name}" in text or name.startswith(("norm_", "jac_")), name
