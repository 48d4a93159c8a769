"""The fused residual sum and norm: against float64, row by row, and where the transformer cell takes it."""

import itertools
import re

import close
import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ
from tritondeq.cells import Transformer
from tritondeq.kernels import dispatch
from tritondeq.kernels.norms import residual_rms
from tritondeq.kernels.norms.residual_rms import MOST, residual_rms_ref

FP32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def problem(rows, features, a=FP32, b=FP32, gamma=FP32, weight=FP32, device="cpu"):
    """(a, b, gamma, weight), the last two None where their dtype is."""
    vectors = [None if d is None else torch.randn(features, device=device).to(d) for d in (gamma, weight)]
    return torch.randn(rows, features, device=device).to(a), torch.randn(rows, features, device=device).to(b), *vectors


def exact(operands, keep_sum=True):
    return residual_rms_ref(*(t if t is None else t.double() for t in operands), EPS, keep_sum)


def check(operands):
    got, eager, truth = residual_rms.residual_rms(*operands, EPS), residual_rms_ref(*operands, EPS), exact(operands)
    for actual, theirs, true in zip(got, eager, truth, strict=True):
        assert actual.dtype == theirs.dtype and actual.shape == theirs.shape
        close.assert_as_eager(actual, theirs, true)
    return got


@pytest.mark.parametrize(
    "rows, features", [(1, 1), (1, 7), (3, 128), (129, 8), (5, 129), (2, 1024), (3, 1025), (1, MOST)]
)
def test_values(rows, features, device):
    """One row, a prime, a tile and a tile plus one, the widest there is."""
    for gamma, weight in itertools.product((None, FP32), repeat=2):
        check(problem(rows, features, gamma=gamma, weight=weight, device=device))


@pytest.mark.parametrize("a, b", itertools.product((FP32, BF16), repeat=2), ids=str)
def test_dtypes_and_what_they_become(a, b, device):
    """As torch promotes them; bfloat16 is rounded once, to nearest."""
    wide = torch.promote_types(a, b)
    for gamma, weight in itertools.product((None, wide), repeat=2):
        s, n = check(problem(37, 100, a, b, gamma, weight, device))
        assert s.dtype == n.dtype == wide
    if wide == BF16:
        operands = problem(37, 100, a, b, None, None, device)
        s, n = residual_rms.residual_rms(*operands, EPS)
        assert torch.equal(s, exact(operands)[0].to(BF16))
        assert (n.double() - exact(operands)[1]).abs().max() <= 2**-8 * n.abs().max()


def test_the_norm_alone(device):
    operands = problem(9, 65, device=device)
    s, n = residual_rms.residual_rms(*operands, EPS, keep_sum=False)
    assert s is None and torch.equal(n, residual_rms.residual_rms(*operands, EPS)[1])


def test_leading_dims_and_strides(device):
    a, b, gamma, weight = problem(24, 40, device=device)
    flat = residual_rms.residual_rms(a, b, gamma, weight, EPS)
    a3 = a.view(2, 12, 40).transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((24, 80), float("nan"), device=device)
    wide[:, ::2] = b
    got = residual_rms.residual_rms(a3, wide[:, ::2].view(2, 12, 40), gamma, weight, EPS)
    for x, y in zip(got, flat, strict=True):
        assert x.shape == (2, 12, 40) and torch.equal(x.reshape(24, 40), y)


def test_a_row_does_not_depend_on_others(device):
    operands = problem(300, 24, device=device)
    together = residual_rms.residual_rms(*operands, EPS)
    operands[0][1] = float("nan")
    for x, y in zip(residual_rms.residual_rms(*operands, EPS), together, strict=True):
        assert torch.equal(x[2:], y[2:]) and torch.equal(x[0], y[0]) and x[1].isnan().all()
    alone = residual_rms.residual_rms(operands[0][7:8], operands[1][7:8], *operands[2:], EPS)
    assert all(torch.equal(x[0], y[7]) for x, y in zip(alone, together, strict=True))


def test_extremes(device):
    """Zeros stay zeros, and the square of 1e15 fits."""
    for scale in (0.0, 1e-15, 1e15):
        a = torch.full((2, 9), scale, device=device)
        s, n = residual_rms.residual_rms(a, a, None, None, EPS)
        assert torch.equal(s, 2 * a) and n.isfinite().all()
        torch.testing.assert_close(n.double(), exact((a, a, None, None))[1], rtol=1e-6, atol=0)
    empty = torch.zeros(0, 5, device=device)
    assert residual_rms.residual_rms(empty, empty, None, None, EPS)[1].shape == (0, 5)


def test_the_reference_is_torchs_norm():
    a, b, gamma, weight = (t.double() for t in problem(3, 20))
    s, n = residual_rms_ref(a, b, gamma, weight, EPS)
    torch.testing.assert_close(s, torch.addcmul(a, gamma, b))
    torch.testing.assert_close(n, torch.nn.functional.rms_norm(s, (20,), weight, EPS))


@pytest.mark.parametrize(
    "change, autocast, why",
    [
        ({}, False, None),
        ({}, True, None),
        ({"a": BF16, "b": BF16, "gamma": BF16, "weight": BF16}, False, None),
        ({"b": BF16}, True, None),
        ({"a": BF16, "b": BF16, "gamma": None, "weight": None}, True, "autocast"),
        ({"a": BF16, "b": BF16, "gamma": BF16}, False, "weight is torch.float32.*input is torch.bfloat16"),
        ({"b": torch.float16}, False, "float16"),
        ({"a": torch.float64}, False, "float64"),
        ({"features": MOST + 1}, False, "8193 features"),
        ({"features": 0}, False, "0 features"),
    ],
    ids=str,
)
def test_what_is_refused(change, autocast, why, device):
    operands = problem(**({"rows": 2, "features": 8} | change), device=device)
    names = dict(zip(("a", "b", "gamma", "weight"), operands, strict=True))
    with tdeq.backend("triton"):
        op, reason = dispatch.pick("norms.residual_rms", torch.device(device), autocast=autocast, **names)
    assert (op is None) == (why is not None)
    assert why is None or re.search(why, reason)


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        residual_rms.residual_rms(torch.zeros(2, 3), torch.zeros(1, 3), None, None, EPS)


def launches(monkeypatch):
    """Returns a list that grows at every launch by whether the sum was wanted."""
    seen, run = [], dispatch.load("norms.residual_rms").run

    def spy(*args, **kwargs):
        seen.append(kwargs["keep_sum"])
        return run(*args, **kwargs)

    op = dispatch.RowOp(spy, residual_rms_ref, residual_rms.refuses, "spied")
    monkeypatch.setitem(dispatch._ops, "norms.residual_rms", op)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("wiring, sums", [("outer", [True, True]), ("damped", [False]), ("head", [True, False])])
def test_the_transformer_takes_it(monkeypatch, wiring, sums, decay, autocast, device):
    """In the solve, not where the gradient is taken; with the same solution, steps and gradient. The last sum and norm
    of a block are the step's."""
    seen = launches(monkeypatch)
    layer = DEQ(Transformer(12, heads=2, wiring=wiring, decay=decay), tol=1e-2 if autocast else 1e-5, max_steps=60)
    layer, x, results = layer.to(device), torch.randn(2, 5, 12, device=device), []
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0
    for name in ("torch", "triton"):
        with tdeq.backend(name), torch.autocast(device.type, dtype=BF16, enabled=autocast):
            z = layer(x)
            grads = torch.autograd.grad(z.sin().sum(), list(layer.parameters()))
        results.append([z, *grads])
        assert bool(seen) == (name == "triton")
    assert seen == sums * (len(seen) // len(sums)) and len(seen) == len(sums) * layer.last.steps.max()
    tight = {"rtol": 5e-2, "atol": 5e-2} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tight)


@torch.no_grad()
def test_where_the_transformer_does_without(monkeypatch, device):
    """In float64, and where a norm has been replaced."""
    seen = launches(monkeypatch)
    x = torch.randn(2, 3, 12, device=device)
    with tdeq.backend("triton"):
        DEQ(Transformer(12, heads=2).to(device).double())(x.double())
        assert not seen
        cell = Transformer(12, heads=2).to(device)
        cell.outer_norm = nn.LayerNorm(12, device=device)
        layer = DEQ(cell, tol=1e-5)
        z = layer(x)
        assert seen == [True, True] * layer.last.steps.max() and z.mean(-1).abs().max() < 1e-4
