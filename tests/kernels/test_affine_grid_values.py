"""The affine cell's solve with a grid barrier, one program to a tile of rows: values against closed forms."""

import math

import numpy as np
import pytest
import torch
from close import assert_as_eager, assert_residual, error
from grids import outcomes, shape, uneven
from test_affine import dense_adjoint, exact, options, problem, restless, true_residual

from tritondeq.kernels import affine, launch
from tritondeq.kernels import affine_grid as op
from tritondeq.kernels.rules import CONVERGED, GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW

# B, D, activation, terms: every activation, count of terms, edge of a tile and of the depth of a product
CASES = [
    (5, 1, "tanh", 2),
    (15, 7, "relu", 2),
    (17, 33, "gelu", 1),
    (33, 32, "sin", 2),
    (16, 65, "identity", 3),
    (64, 31, "tanh", 2),
    (1, 129, "gelu", 2),
    (2, 257, "sin", 1),
]
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


@pytest.fixture
def alone(monkeypatch):
    """One program to a tile of rows, as the interpreter runs them one after another; on a GPU what we ship."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(launch.SHAPES, "affine_grid", shape())


@pytest.mark.parametrize("batch, features, activation, terms", CASES)
def test_solve(device, alone, batch, features, activation, terms):
    w, u = problem(batch, features, device, terms=terms)
    settings = options(activation=activation)
    z, steps, residual, status = op.affine_grid_solve(w, u, terms=terms, **settings)
    eager, eager_steps, *_ = affine.affine_solve_ref(w, u, **settings)
    assert_as_eager(z, eager, exact(w, u, **settings), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()
    assert_residual(residual, true_residual(w, u, z, activation, terms), settings["tol"])
    assert (z.dtype, steps.dtype, residual.dtype, status.dtype) == (*[torch.float32, torch.int32] * 2,)


@pytest.mark.parametrize("batch, features, activation, terms", CASES)
def test_adjoint(device, alone, batch, features, activation, terms):
    w, pre = problem(batch, features, device, terms=terms)
    g = torch.randn_like(pre)
    settings = options(activation=activation)
    u, steps, residual, status = op.affine_grid_adjoint(w, pre, g, terms=terms, **settings)
    eager, eager_steps, *_ = affine.affine_adjoint_ref(w, pre, g, **settings)
    assert_as_eager(u, eager, dense_adjoint(w, pre, g, activation), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()


@pytest.mark.parametrize("damping", [0.7, 1.3])
def test_damping(device, alone, damping):
    w, u = problem(5, 40, device)
    pre, settings = torch.randn_like(u), options(damping=damping, tol=1e-5)
    z, steps, *_ = op.affine_grid_solve(w, u, **settings)
    assert error(z, exact(w, u, **settings)) < 5e-5
    assert (steps - affine.affine_solve_ref(w, u, **settings)[1]).abs().max() <= 1
    v, steps, *_ = op.affine_grid_adjoint(w, pre, u, **settings)
    assert error(v, dense_adjoint(w, pre, u, "tanh")) < 5e-5
    assert (steps - affine.affine_adjoint_ref(w, pre, u, **settings)[1]).abs().max() <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_warm_start(device, alone, scale):
    w, u = problem(5, 40, device)
    u *= scale
    cold, steps, *_ = op.affine_grid_solve(w, u, **options())
    again, one, *_ = op.affine_grid_solve(w, u, cold, **options(tol=1e-5))
    assert torch.equal(again, cold) and (one == 1).all()
    near = cold + 1e-3 * scale * torch.randn_like(cold)
    warm, fewer, *_ = op.affine_grid_solve(w, u, near, **options())
    assert (fewer < steps).all() and (fewer - affine.affine_solve_ref(w, u, near, **options())[1]).abs().max() <= 1
    assert_as_eager(warm, cold, exact(w, u, **options()), 2)


def test_a_start_loses_no_bits(device, alone):
    """After one evaluation the start is returned, with its true residual: 16 bits of it would be off by 4e-6 or so."""
    w, u = problem(5, 40, device)
    z0 = exact(w, u, **options()).float() + 1e-5 * torch.randn_like(u)
    z, _, residual, _ = op.affine_grid_solve(w, u, z0, terms=3, **options(max_steps=1))
    assert torch.equal(z, z0)
    assert (residual / true_residual(w, u, z0, "tanh", 3) - 1).abs().max() < 1e-2


def test_strides_do_not_matter(device, alone):
    w, u = problem(5, 40, device)
    z0, pre = torch.randn_like(u), torch.randn_like(u)

    def strided(t):
        return t.repeat_interleave(2, 1)[:, ::2]

    for z, same in zip(
        (op.affine_grid_solve(w, u, z0, **options())[0], op.affine_grid_adjoint(w, pre, u, **options())[0]),
        (
            op.affine_grid_solve(w.T.contiguous().T, u.T.contiguous().T, strided(z0), **options())[0],
            op.affine_grid_adjoint(strided(w), strided(pre), strided(u), **options())[0],
        ),
        strict=True,
    ):
        assert torch.equal(z, same)


def test_what_lies_behind_w_is_not_read(device, alone):
    w, u = problem(3, 7, device)
    inside = torch.full((4096,), math.nan, device=device)
    inside[: w.numel()] = w.flatten()
    inside = inside[: w.numel()].view_as(w)
    assert torch.equal(op.affine_grid_solve(inside, u, **options())[0], op.affine_grid_solve(w, u, **options())[0])
    adjoints = [op.affine_grid_adjoint(each, u, u, **options())[0] for each in (inside, w)]
    assert torch.equal(*adjoints)


def test_empty_batch(device, alone):
    w, u = problem(0, 8, device)
    for work in (op.affine_grid_solve, op.affine_grid_adjoint):
        z, steps, residual, status = work(w, u, u, **options())
        assert z.shape == (0, 8) and steps.shape == residual.shape == status.shape == (0,)


@pytest.mark.parametrize("activation, scale", [("relu", 1e6), ("identity", 1e6), ("tanh", 1e-6), ("gelu", 1e-6)])
def test_scales(device, alone, activation, scale):
    w, u = problem(7, 40, device)
    u = u * scale
    settings = options(activation=activation)
    z, _, _, status = op.affine_grid_solve(w, u, **settings)
    assert (status == CONVERGED).all()
    assert_as_eager(z, affine.affine_solve_ref(w, u, **settings)[0], exact(w, u, **settings), 2)


def test_max_steps(device, alone):
    w, u = problem(18, 40, device)
    for limit in (1, 2, 3):
        z, steps, residual, status = op.affine_grid_solve(w, u, **options(max_steps=limit))
        assert (status == MAX_STEPS).all() and (steps == limit).all()
        eager = affine.affine_solve_ref(w, u, **options(max_steps=limit))[0]
        torch.testing.assert_close(z, eager, rtol=0, atol=1e-2)  # unconverged: bf16 increments
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), 1e-6)


def test_plateau_and_growing(device, alone):
    """W = -I keeps a small defect as it is; W = I lets the norm run away."""
    eye, u = torch.eye(40, device=device), torch.randn(4, 40).to(device)
    settings = options(activation="identity")
    z, steps, residual, status = op.affine_grid_solve(-eye, u, u / 2 + 1e-3, **settings)
    assert (status == PLATEAU).all() and (steps % WINDOW == 0).all() and (steps <= 2 * WINDOW).all()
    assert_residual(residual, true_residual(-eye, u, z, "identity", 2), 1e-6)
    *_, status = op.affine_grid_solve(eye, u, **settings | {"tol": 3e-2, "max_steps": 50})
    assert (status == GROWING).all()


@nonfinite
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_row_stays_alone(device, alone, bad):
    w, u = problem(7, 40, device)
    settings = options(activation="relu", tol=1e-5)
    pre, others = torch.ones_like(u), torch.arange(7) != 3
    clean = op.affine_grid_solve(w, u, **settings), op.affine_grid_adjoint(w, pre, u, **settings)
    broken, z0 = u.clone(), torch.zeros_like(u)
    broken[3, 5], z0[3, 7] = bad, bad
    z, steps, *_ = op.affine_grid_solve(w, broken, **settings)
    assert (z[3] == 0).all() and steps[3] == WINDOW
    for seen, expected in (
        (op.affine_grid_solve(w, broken, **settings), clean[0]),
        (op.affine_grid_solve(w, u, z0, **settings), clean[0]),
        (op.affine_grid_adjoint(w, pre, broken, **settings), clean[1]),
    ):
        assert seen[3][3] == NONFINITE
        assert all(torch.equal(a[others], b[others]) for a, b in zip(seen, expected, strict=True))


@nonfinite
def test_overflow_returns_a_finite_iterate(device, alone):
    u, w = torch.randn(3, 40).to(device), 1e6 * torch.eye(40, device=device)
    z, _, residual, status = op.affine_grid_solve(w, u, **options(activation="identity"))
    assert (status == NONFINITE).all() and z.isfinite().all() and residual.isfinite().all()


def test_best_iterate_is_returned(device, alone):
    """Residuals that rise and fall: what is returned has the residual that is said to be the least."""
    w, u = restless(40, device)
    turn = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0].float().to(device)
    for matrix, most in ((w, 20), (w, 13), *((1.02 * turn, n) for n in range(1, 6))):
        settings = options(activation="identity", max_steps=most)
        z, steps, residual, status = op.affine_grid_solve(matrix, u, **settings)
        assert (status == MAX_STEPS).all() and (steps == most).all()
        assert_residual(residual, true_residual(matrix, u, z, "identity", 2), 1e-6)
        u_star, _, residual, _ = op.affine_grid_adjoint(matrix, u, u, **settings)
        v = torch.linalg.solve(matrix.double(), (u_star - u).double(), left=False)
        assert_residual(residual, (u_star - v).norm(dim=1) / u_star.double().norm(dim=1), 1e-5)


def test_rows_do_not_depend_on_their_batch(device, alone, monkeypatch):
    # the interpreter's BLAS treats the rows of small matrices differently; a tensor core does not
    monkeypatch.setattr("numpy.matmul", lambda a, b, dtype: np.einsum("gik,gkj->gij", a, b, dtype=dtype))
    w, u, pre = uneven(37, 40, device)
    settings = options(tol=1e-4)
    whole = outcomes(w, u, pre, **settings)
    assert whole[1].unique().numel() > 2
    order = torch.randperm(37).to(device)
    for seen, expected in zip(outcomes(w, u[order], pre[order], **settings), whole, strict=True):
        assert torch.equal(seen, expected[order])
    parts = (outcomes(w, u[a:b], pre[a:b], **settings) for a, b in ((0, 22), (22, 37)))
    for *both, expected in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat(both), expected)
