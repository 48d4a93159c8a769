"""The affine cell: its equation, its start, its bound, its precision."""

import copy

import pytest
import torch

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Picard, Route
from tritondeq.cells import Affine
from tritondeq.cells.contraction import norm_bound

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "sin": torch.sin,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_equation(activation):
    cell = Affine(5, 3, activation=activation).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    layer = DEQ(cell, tol=1e-13, max_steps=500)
    z = layer(x)
    right = ACTIVATIONS[activation](z @ cell.weight.T + x @ cell.input.weight.T + cell.input.bias)
    torch.testing.assert_close(z, right, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: layer(x), x.requires_grad_())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("features", [1, 2, 16, 100])
def test_contractive_at_initialisation(activation, features):
    for seed in range(2):
        torch.manual_seed(seed)
        cell = Affine(features, activation=activation)
        assert torch.linalg.matrix_norm(cell.weight, 2) * {"gelu": 1.1289}.get(activation, 1) <= 0.9 + 1e-5
        layer = DEQ(cell, max_steps=100)
        layer(torch.randn(4, features))
        assert layer.last.converged.all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (64, 64), (128, 128)])
def test_norm_bound_bounds_and_is_tight(shape):
    for seed in range(3):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        true = torch.linalg.matrix_norm(w, 2)
        bound = norm_bound(w)
        assert true * (1 - 1e-5) <= bound <= true * min(shape) ** (1 / 128) * (1 + 1e-5)


def test_norm_bound_of_extremes():
    assert norm_bound(torch.zeros(4, 4)) < 1e-6
    for scale in (1e-8, 1e8):
        assert norm_bound(scale * torch.eye(4)).item() == pytest.approx(scale * 4 ** (1 / 128), rel=1e-4)
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm_bound, w) and torch.autograd.gradgradcheck(norm_bound, w)


def test_contraction_holds_through_training_that_pulls_against_it():
    cell = Affine(12, contraction=0.8, activation="identity")
    layer = DEQ(cell, max_steps=200)
    opt = torch.optim.Adam(cell.parameters(), lr=0.1)
    x = torch.randn(16, 12)
    for _ in range(40):
        loss = -layer(x).pow(2).mean()  # larger is better: pushes ||W|| up
        opt.zero_grad()
        loss.backward()
        opt.step()
        assert torch.linalg.matrix_norm(cell.weight, 2) <= 0.8 * (1 + 1e-5)
        assert layer.last.converged.all()
    assert torch.linalg.matrix_norm(cell.parametrizations.weight.original, 2) > 0.9  # the bound was at work
    assert torch.linalg.matrix_norm(cell.weight, 2) > 0.7  # and gave away little


def test_bf16_operands_round_the_weight_and_nothing_else():
    exact, rounded = Affine(16), Affine(16, operands="bf16")
    rounded.load_state_dict(exact.state_dict())
    with torch.no_grad():
        exact.weight.copy_(exact.weight.bfloat16().float())
    x = torch.randn(4, 16)
    assert torch.equal(DEQ(exact, tol=1e-6)(x), DEQ(rounded, tol=1e-6)(x))
    layer = DEQ(rounded)
    layer(x).sum().backward()
    assert 1e-3 < layer.last.residual.max() <= 1e-2 and rounded.weight.grad.norm() > 0


@pytest.mark.kernels
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_float16_weights_are_not_rounded_to_bfloat16(autocast, device):
    """A kernel that did so would be twice as far from the truth as torch in float16."""
    cell = Affine(16).to(device) if autocast else Affine(16).to(device).half()
    layer, x = DEQ(cell, tol=1e-4), torch.randn(64, 16, device=device).half()
    exact = copy.deepcopy(layer).double()
    exact.tol, exact.max_steps = 1e-10, 500
    z, errors = exact(x.double()), []
    for backend in ("torch", "triton"):
        with tdeq.backend(backend), torch.autocast(device.type, torch.float16, enabled=autocast):
            errors.append(((layer(x).double() - z).norm() / z.norm()).item())
    assert layer.last.route is Route.KERNEL and errors[1] <= errors[0] + 1e-5, errors


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_wide_cells_take_the_loop(solver):
    layer = DEQ(Affine(300), solver=solver)
    layer(torch.randn(2, 300))
    assert layer.last.route is not Route.KERNEL
