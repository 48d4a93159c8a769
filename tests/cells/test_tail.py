"""Cells that leave their last activation to the fused step."""

import pytest
import torch

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Picard
from tritondeq.cells import Affine

SOLVERS = [Picard(), Picard(damping=0.8), Anderson(memory=5), Broyden(memory=3)]  # of which no kernel solves all of it


def watched(cell):
    """`cell`, and a list that grows whenever its own forward is called."""
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(None))
    return cell, calls


@torch.no_grad()
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "sin", "identity"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_same_solution_without_calling_the_activation(solver, activation):
    cell, calls = watched(Affine(12, activation=activation))
    x, seen = torch.randn(5, 12), torch.rand(5, 12) > 0.2 if isinstance(solver, Picard) else None
    results = []
    for name in ("torch", "triton"):
        calls.clear()
        with tdeq.backend(name):
            solution = DEQ(cell, solver=solver, tol=1e-5, max_steps=200, trace=True).solve(x, mask=seen)
        assert bool(calls) == (name == "torch") and solution.converged.all()
        results.append(solution)
    assert (results[0].steps - results[1].steps).abs().max() <= 1
    torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-4, atol=1e-4)


def test_wide_cells_and_their_gradients():
    """Above 256 features and by another solver than Picard, where it matters."""
    layer, x = DEQ(Affine(260), solver=Anderson(2), tol=1e-5, max_steps=100), torch.randn(2, 260)
    results = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            z = layer(x)
            results.append([z, *torch.autograd.grad(z.sin().sum(), list(layer.parameters()))])
    assert "one or two launches a step" in layer.last.path and "the GEMM in them are Picard's" in layer.last.path
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_float64_calls_the_activation():
    cell, calls = watched(Affine(6, dtype=torch.float64))
    with tdeq.backend("triton"):
        solution = DEQ(cell, tol=1e-12, max_steps=300).solve(torch.randn(3, 6, dtype=torch.float64))
    assert calls and solution.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("trace", [False, True])
def test_a_subclass_with_a_forward_of_its_own_is_asked(trace):
    class Shifted(Affine):
        def forward(self, z, injection):
            return super().forward(z, injection) + 1.0

    x = torch.randn(3, 6)
    layer = DEQ(Shifted(6), tol=1e-5, max_steps=200, trace=trace)
    patched = DEQ(Affine(6), tol=1e-5, max_steps=200, trace=trace)
    patched.load_state_dict(layer.state_dict())
    patched.cell.forward = lambda z, injection: Affine.forward(patched.cell, z, injection) + 1.0
    for deq in (layer, patched):
        with tdeq.backend("triton"):
            z = deq(x)
        assert torch.allclose(layer.cell(z, layer.cell.inject(x)), z, atol=1e-3)
