"""The hardware's tanh, and gelu and silu made of it: where kernels take it, and what its error does to a solve."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Status
from tritondeq.cells import MLP, Affine, Gated
from tritondeq.kernels import tl_common
from tritondeq.row_kernels import FAST_TANH, kernel_options

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    "activation, tol, narrow, taken",
    [
        ("tanh", 1e-2, True, "fast_tanh"),
        ("tanh", FAST_TANH, True, "fast_tanh"),
        ("tanh", 4.9e-3, True, "tanh"),
        ("tanh", 1e-2, False, "tanh"),
        ("gelu", 1e-2, True, "fast_gelu"),
        ("silu", 1e-2, True, "fast_silu"),
        ("silu", 1e-2, False, "silu"),
        ("relu", 1e-2, True, "relu"),
        ("sin", 1e-2, True, "sin"),
        ("reflected_tanh", 1e-2, True, "reflected_tanh"),
    ],
)
def test_where_it_is_taken(activation, tol, narrow, taken):
    """With weights in one bfloat16 term, to tolerances that are ten times its error."""
    assert kernel_options(activation, tol, narrow)["activation"] == taken


@pytest.mark.parametrize("kind, name", [(Affine, "tanh"), (Gated, "tanh"), (MLP, "gelu")])
def test_what_cells_ask_for(kind, name):
    def taken(tol, **options):
        cell = kind(8, **options)
        return cell.whole_solve(cell.inject(torch.randn(2, 8))).options(tol)["activation"]

    assert taken(1e-2) == taken(1e-3, operands="bf16") == name
    assert taken(1e-2, operands="bf16") == f"fast_{name}"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken(1e-2) == f"fast_{name}" and taken(1e-3) == name


@triton.jit
def _worst(x, INTERP: tl.constexpr):
    """tanh with the error that the hardware's may have, up in one element and down in the next."""
    odd = (x * 1e4).to(tl.int32) % 2 == 0
    return tl_common.tanh(x, INTERP) * tl.where(odd, 1.0 + 0.00048828125, 1.0 - 0.00048828125)


@pytest.mark.skipif(CUDA, reason="for the interpreter, whose tanh is exact")
@pytest.mark.parametrize("solver", [tdeq.Picard(), Anderson(memory=2)], ids=str)
@pytest.mark.parametrize(
    "kind", [Affine, Gated, MLP, partial(MLP, form="pre", activation="swiglu"), partial(Affine, activation="gelu")]
)
def test_a_solve_with_its_worst_error(monkeypatch, kind, solver):
    """All converge, to within what the tolerance allows; so do the gradients."""
    monkeypatch.setattr(tl_common, "fast_tanh", _worst)
    layer = DEQ(kind(16, operands="bf16"), solver=solver, tol=FAST_TANH, max_steps=60)
    x = 2 * torch.randn(40, 16, requires_grad=True)
    with tdeq.backend("triton"):
        z = layer(x)
        grads = torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()])
    assert layer.last.route is tdeq.Route.KERNEL and (layer.last.status == Status.CONVERGED).all()
    exact, x64 = layer.cell.double(), x.detach().double().requires_grad_()
    truth = DEQ(exact, tol=1e-11, max_steps=500)
    y = truth(x64)
    true = torch.autograd.grad(y.sin().sum(), [x64, *truth.parameters()])
    off = (z.double() - y).norm(dim=1) / y.norm(dim=1)
    assert 1e-5 < off.max() < 10 * FAST_TANH, "it took part, and a contraction of 0.9 makes it ten times as much"
    mine, right = (torch.cat([g.double().flatten() for g in each]) for each in (grads, true))
    assert (mine - right).norm() <= 10 * FAST_TANH * right.norm()
