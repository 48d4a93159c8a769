"""The affine cell's own steps: values against closed forms and the loop, step by step."""

import itertools

import pytest
import torch
from close import assert_as_eager, assert_residual, error
from own_steps import adjoint, solve
from test_affine import dense_adjoint, exact, options, problem, true_residual

import tritondeq as tdeq
from tritondeq import Picard
from tritondeq.kernels.rows import affine
from tritondeq.kernels.rules import CONVERGED
from tritondeq.kernels.steps import affine as op

# B, D, activation, terms, tile: every activation, count of terms, edge of a tile and of a row of tiles
CASES = [
    (5, 1, "tanh", 2, "small"),
    (15, 7, "relu", 2, "small"),
    (17, 33, "gelu", 1, "small"),
    (33, 64, "sin", 2, "small"),
    (16, 65, "identity", 3, "small"),
    (150, 33, "tanh", 2, "small"),  # more row tiles than share columns of W
    (65, 70, "tanh", 2, "split"),
    (1, 129, "gelu", 2, "split"),
    (3, 300, "tanh", 2, "split"),
    (2, 257, "sin", 1, "split"),
]


@pytest.mark.parametrize("batch, features, activation, terms, name", CASES)
def test_solve(device, tile, batch, features, activation, terms, name):
    tile(name)
    w, u = problem(batch, features, device, terms=terms)
    settings = options(activation=activation)
    z, steps, residual, status = solve(w, u, terms=terms, **settings)
    eager, eager_steps, *_ = affine.affine_solve_ref(w, u, **settings)
    assert_as_eager(z, eager, exact(w, u, **settings), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()
    assert_residual(residual, true_residual(w, u, z, activation, terms), settings["tol"])
    assert (z.dtype, steps.dtype, residual.dtype, status.dtype) == (*[torch.float32, torch.int32] * 2,)


@pytest.mark.parametrize("batch, features, activation, terms, name", CASES)
def test_adjoint(device, tile, batch, features, activation, terms, name):
    tile(name)
    w, pre = problem(batch, features, device, terms=terms)
    g = torch.randn_like(pre)
    settings = options(activation=activation)
    u, steps, residual, status = adjoint(w, pre, g, terms=terms, **settings)
    eager, eager_steps, *_ = affine.affine_adjoint_ref(w, pre, g, **settings)
    assert_as_eager(u, eager, dense_adjoint(w, pre, g, activation), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()


def test_step_by_step(device, tile):
    """Each evaluation's residual is that of the torch loop, damped or not, from a start that is not zero too."""
    w, u = problem(5, 40, device)
    for damping, z0 in itertools.product((1.0, 0.7), (torch.zeros_like(u), torch.randn_like(u))):
        trace = []
        solution = tdeq.fixed_point(
            lambda z: torch.tanh(torch.addmm(u, z, w.T)), z0, solver=Picard(damping), tol=1e-5, max_steps=40, trace=True
        )
        _, steps, *_ = solve(w, u, z0, trace, **options(damping=damping, tol=1e-5, max_steps=40))
        (mine,) = trace
        assert (steps - solution.steps).abs().max() <= 1 and len(mine) == steps.max()
        both = int(torch.minimum(steps, solution.steps).min())
        assert both > 5
        # an increment d is rounded by up to 2^-9 |d|, which moves the next defect, some 0.4 |d|, by 1.6 times that
        off = (mine[:both] / solution.trace[:both] - 1).abs().amax(1)
        assert (off <= 1e-4 + 4 * 2**-9 * torch.arange(both, device=device)).all(), off


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_warm_start(device, tile, scale):
    w, u = problem(5, 40, device)
    u *= scale
    cold, steps, *_ = solve(w, u, **options())
    again, one, *_ = solve(w, u, cold, **options(tol=1e-5))
    assert torch.equal(again, cold) and (one == 1).all()
    near = cold + 1e-3 * scale * torch.randn_like(cold)
    warm, fewer, *_ = solve(w, u, near, **options())
    assert (fewer < steps).all() and (fewer - affine.affine_solve_ref(w, u, near, **options())[1]).abs().max() <= 1
    assert_as_eager(warm, cold, exact(w, u, **options()), 2)


def test_strides_do_not_matter(device, tile):
    w, u = problem(18, 40, device)
    z0, pre = torch.randn_like(u), torch.randn_like(u)

    def strided(t):
        return t.repeat_interleave(2, 1)[:, ::2]

    for z, same in zip(
        (solve(w, u, z0, **options())[0], adjoint(w, pre, u, **options())[0]),
        (
            solve(w.T.contiguous().T, u.T.contiguous().T, strided(z0), **options())[0],
            adjoint(strided(w), strided(pre), strided(u), **options())[0],
        ),
        strict=True,
    ):
        assert torch.equal(z, same)


@pytest.mark.parametrize("activation, scale", [("relu", 1e6), ("identity", 1e6), ("tanh", 1e-6), ("gelu", 1e-6)])
def test_scales(device, tile, activation, scale):
    w, u = problem(7, 40, device)
    u = u * scale
    settings = options(activation=activation)
    z, _, _, status = solve(w, u, **settings)
    assert (status == CONVERGED).all()
    assert_as_eager(z, affine.affine_solve_ref(w, u, **settings)[0], exact(w, u, **settings), 2)


@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_adjoint_is_homogeneous(device, tile, scale):
    w, pre = problem(6, 40, device)
    g = torch.randn_like(pre)
    u, steps, *_ = adjoint(w, pre, g, **options(tol=1e-4))
    scaled, scaled_steps, *_ = adjoint(w, pre, g * scale, **options(tol=1e-4))
    assert error(scaled / scale, u.double()) < 1e-5
    assert (steps - scaled_steps).abs().max() <= 1


def test_a_start_loses_no_bits(device, tile):
    w, u = problem(5, 40, device)
    z0 = torch.randn_like(u)
    steps = op.affine_steps_solve(w, u, z0, terms=3, **options())
    steps.take()
    assert torch.equal(steps.kept[1], z0)
    assert error(steps.other, u.double() + z0.double() @ w.double().T) < 3e-7  # 16 bits of z0 would leave 2e-6
