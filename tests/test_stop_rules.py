"""What the stop rules mean for a solve: fixed points at 0, absolute tolerances, gradients of slow maps, pauses."""

import math

import pytest
import torch

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Implicit, Picard, Status, fixed_point
from tritondeq.kernels import rules

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("rate", [0.3, -0.6, pytest.param(0.8, marks=pytest.mark.slow)])
def test_a_decay_to_zero_ends_where_it_is_small_beside_where_it_began(rate, dtype, backend):
    """z_k = rate^(k-1) z0 has r = |rate - 1| |z_k|: it ends at tol * SHARE * |f(z0)|, whatever the size of z0 is."""
    tol = 1e-3
    k = 1 + math.ceil(math.log(tol * rules.SHARE * abs(rate) / abs(rate - 1)) / math.log(abs(rate)))
    for size in (1e-10, 1.0, 1e10):
        with tdeq.backend(backend):
            z0 = torch.full((2, 3), size, dtype=dtype)
            solution = fixed_point(lambda z: rate * z, z0, tol=tol, max_steps=200)
        assert (solution.status == Status.CONVERGED).all() and (solution.steps == k).all()
        torch.testing.assert_close(solution.value, z0 * rate ** (k - 1), rtol=1e-4, atol=0)


@BACKENDS
@pytest.mark.parametrize("solver", [Picard(), Anderson(2), Broyden(3)], ids=str)
def test_an_absolute_tolerance(solver, backend):
    """z = z / 2 + c with |c| = 1e-6 and 1: the first sample ends at atol, the second at tol."""
    c = torch.tensor([[1e-6], [1.0]], dtype=torch.float64)

    def f(z):
        return 0.5 * torch.sin(z) + c

    with tdeq.backend(backend):
        solution = fixed_point(f, 1 + c, solver=solver, tol=1e-6, atol=1e-4)
    assert solution.converged.all()
    y, z = f(solution.value), solution.value
    r, s = (y - z).norm(dim=1), y.norm(dim=1)
    assert 1e-6 * s[0] < r[0] <= 1e-4 and r[1] <= 1e-4
    torch.testing.assert_close(solution.residual, r / s.clamp(min=1e-4 / 1e-6), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="atol must be at least 0"):
        fixed_point(f, c, atol=-1.0)


@BACKENDS
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_residual_of_a_gradient_is_relative_to_the_cotangent(rate, size, backend):
    """Picard's u of evaluation k of u = rate u + g lacks rate^k g / (1 - rate): its residual is rate^k."""
    tol, k = 1e-3, math.ceil(math.log(1e-3) / math.log(rate))
    x = torch.ones(2, 3, requires_grad=True)
    with tdeq.backend(backend):
        adjoint = Implicit(tol=tol, max_steps=500)
        solution = fixed_point(lambda z: rate * z + x, torch.ones(2, 3) / (1 - rate), adjoint=adjoint)
        g = size * torch.tensor([[1.0, 2.0, 3.0], [0.1, -1.0, 0.0]])
        (grad,) = torch.autograd.grad(solution.value, x, g)
    assert (solution.adjoint.steps == k).all() and solution.adjoint.converged.all()
    rounding = 4 * torch.finfo(torch.float32).eps / (1 - rate)  # of u, which is 1 / (1 - rate) times g
    torch.testing.assert_close(solution.adjoint.residual, torch.full((2,), rate**k), rtol=0, atol=rounding)
    torch.testing.assert_close(grad / size, (g / size) * (1 - rate**k) / (1 - rate), rtol=1e-4, atol=0)


def test_only_what_counts_sets_the_scale_of_a_gradient():
    mask, x = torch.tensor([[True, False]]), torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x).detach(), mask=mask, tol=1e-3)
    torch.autograd.grad(solution.value, x, torch.tensor([[1.0, 1e6]], dtype=torch.float64))
    assert solution.adjoint.residual.item() == pytest.approx(0.5**10) and solution.adjoint.steps.item() == 10


@BACKENDS
@pytest.mark.parametrize("solver", [Picard(), Anderson(2)], ids=str)
def test_a_norm_that_overflows_is_not_converged(solver, backend):
    """f moves z by nothing, or by little: finite beside a norm of infinity."""
    for f in (lambda z: z, lambda z: 1.0000001 * z):
        with tdeq.backend(backend):
            solution = fixed_point(f, torch.full((1, 4), 1e20), solver=solver, max_steps=30)
        assert solution.status.item() == Status.NONFINITE and not solution.residual.isfinite().any()


def test_a_residual_that_waits_is_not_given_up():
    """A chain of 40 elements, each of which hands on what it gets: the residual stands still until the last has it."""
    chain = torch.diag(torch.ones(39, dtype=torch.float64), -1)
    c = torch.zeros(1, 40, dtype=torch.float64)
    c[0, 0] = 1
    solution = fixed_point(lambda z: z @ chain.T + c, 10 * torch.sign(torch.randn_like(c)), tol=1e-6)
    assert solution.status.item() == Status.CONVERGED and solution.steps.item() == 41


def test_a_plateau_is_not_called_the_floor_of_the_precision():
    assert "precision" not in Status.PLATEAU.sentence and "wider dtype" in Status.PLATEAU.sentence
