"""Rows of the affine cell's own steps: when each stops, what it then returns, and what a launch may touch."""

import math

import numpy as np
import pytest
import torch
from close import assert_residual
from own_steps import TILES, adjoint, solve
from test_affine import options, problem, restless, true_residual

from tritondeq.kernels.rows import affine
from tritondeq.kernels.rules import GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW
from tritondeq.kernels.steps import affine as op

nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def test_max_steps(device, tile):
    w, u = problem(18, 40, device)
    for limit in (1, 2, 3):
        z, steps, residual, status = solve(w, u, **options(max_steps=limit))
        eager = affine.affine_solve_ref(w, u, **options(max_steps=limit))[0]
        assert (status == MAX_STEPS).all() and (steps == limit).all()
        torch.testing.assert_close(z, eager, rtol=0, atol=1e-2)  # unconverged: bf16 increments
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), 1e-6)


def test_plateau(device, tile):
    """W = -I keeps a small defect as it is."""
    _, u = problem(4, 40, device)
    w, z0 = -torch.eye(40, device=device), u / 2 + 1e-3
    z, steps, residual, status = solve(w, u, z0, **options(activation="identity"))
    assert (status == PLATEAU).all() and (steps % WINDOW == 0).all() and (steps <= 2 * WINDOW).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-6)


def test_growing(device, tile):
    _, u = problem(3, 40, device)
    w = torch.eye(40, device=device)
    *_, status = solve(w, u, **options(activation="identity", tol=3e-2, max_steps=50))
    assert (status == GROWING).all()


@nonfinite
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_row_stays_alone(device, tile, bad):
    w, u = problem(18, 40, device)
    settings = options(activation="relu")
    pre = torch.ones_like(u)
    clean, clean_adjoint = solve(w, u, **settings), adjoint(w, pre, u, **settings)
    u[3, 5] = bad
    others = torch.arange(18) != 3
    for seen, expected in zip(solve(w, u, **settings), clean, strict=True):
        assert torch.equal(seen[others], expected[others])
    z, steps, _, status = solve(w, u, **settings)
    assert status[3] == NONFINITE and (z[3] == 0).all() and steps[3] == WINDOW
    z0, fine = torch.zeros_like(u), u.clone()
    z0[3, 7], fine[3, 5] = bad, 1.0
    for seen, expected in (
        (adjoint(w, pre, u, **settings), clean_adjoint),
        (solve(w, fine, z0, **settings), clean),
    ):
        assert seen[3][3] == NONFINITE
        assert all(torch.equal(a[others], b[others]) for a, b in zip(seen, expected, strict=True))


@nonfinite
def test_overflow_returns_a_finite_iterate(device, tile):
    _, u = problem(3, 40, device)
    w = 1e6 * torch.eye(40, device=device)
    z, _, residual, status = solve(w, u, **options(activation="identity"))
    assert (status == NONFINITE).all() and z.isfinite().all() and residual.isfinite().all()


def test_best_iterate_is_returned(device, tile):
    """Residuals that rise and fall at every length of a solve: the least of each row is known, and its z returned."""
    w, u = restless(40, device)
    turn = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0].float().to(device)
    for matrix, most in ((w, 20), (w, 13), *((1.02 * turn, n) for n in range(1, 9))):
        settings = options(activation="identity", max_steps=most)
        trace = []
        z, steps, residual, status = solve(matrix, u, trace=trace, **settings)
        assert (status == MAX_STEPS).all() and (steps == most).all()
        assert torch.equal(residual, trace[0].amin(0))
        assert_residual(residual, true_residual(matrix, u, z, "identity", 2), 1e-6)

        u_star, _, residual, _ = adjoint(matrix, u, u, **settings)
        v = torch.linalg.solve(matrix.double(), (u_star - u).double(), left=False)
        true = (u_star - v).norm(dim=1) / u_star.double().norm(dim=1)
        assert_residual(residual, true, 1e-5)


@pytest.mark.parametrize("length", [4, 5])
def test_the_best_iterate_is_returned_whenever_it_was_seen(device, tile, length):
    """Defects that run along a chain of features, one for each row: evaluation k of row r finds a residual of
    1e-3 (1 + (k - r)^2), the least as the last, the one before the last or long overwritten, in either buffer."""
    w = torch.zeros(length * (length + 1), length * (length + 1))
    u, start = torch.zeros(length, len(w)), torch.zeros(length, len(w))
    for row in range(length):
        sizes = [1e-3 * (1 + (k - row) ** 2) for k in range(length)]
        first = row * (length + 1)
        u[row, first] = sizes[0]
        u[row, first + length] = start[row, first + length] = 1.0  # what there is beside the defect
        for k in range(length - 1):
            w[first + k + 1, first + k] = sizes[k + 1] / sizes[k]
    w, u, start = w.to(device), u.to(device), start.to(device)
    path = [start.double()]
    for _ in range(length):
        path.append(path[-1] @ w.double().T + u.double())
    settings = options(activation="identity", tol=1e-9, max_steps=length)

    z, steps, residual, _ = solve(w, u, start, **settings)
    assert (steps == length).all()
    for row in range(length):
        torch.testing.assert_close(z[row].double(), path[row][row], rtol=0, atol=2e-5)
        assert residual[row].item() == pytest.approx(1e-3, rel=2e-2)
    u_star, steps, residual, _ = adjoint(
        w.T, torch.zeros_like(u), u, **settings
    )  # starts at 0, and then goes the same way
    assert (steps == length).all()
    for row in range(1, length):
        torch.testing.assert_close(u_star[row].double(), path[row + 1][row], rtol=0, atol=2e-5)
        assert residual[row].item() == pytest.approx(1e-3, rel=2e-2)


def test_the_best_is_not_copied_while_residuals_fall(device, tile):
    w, u = problem(5, 40, device)
    expected = solve(w, u, **options())[0]
    steps = op.affine_steps_solve(w, u, torch.zeros_like(u), **options())
    steps.best.fill_(7.0)
    while int(steps.left()):
        steps.take()
    assert (steps.best == 7.0).all()
    assert torch.equal(steps.finish()[0], expected)


def outcomes(w, u, pre, **settings):
    return *solve(w, u, **settings), *adjoint(w, pre, u, **settings)


@pytest.mark.parametrize("name", TILES)
def test_rows_do_not_depend_on_their_batch(device, tile, monkeypatch, name):
    # the interpreter's BLAS treats the rows of small matrices differently; a tensor core does not
    monkeypatch.setattr("numpy.matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    tile(name)
    w, u = problem(37, 70, device)
    u[:18] *= torch.logspace(-3, 1, 18, device=device)[:, None]  # a spread of depths
    pre = torch.randn_like(u)
    settings = options(tol=1e-5)
    whole = outcomes(w, u, pre, **settings)
    assert whole[1].unique().numel() > 2
    order = torch.randperm(37).to(device)
    for seen, expected in zip(outcomes(w, u[order], pre[order], **settings), whole, strict=True):
        assert torch.equal(seen, expected[order])
    parts = (outcomes(w, u[a:b], pre[a:b], **settings) for a, b in ((0, 22), (22, 37)))
    for *both, expected in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat(both), expected)


@torch.no_grad()
def test_a_stopped_row_is_stored_no_more(device, tile):
    w, u = problem(20, 40, device)
    z0 = solve(w, u, **options())[0]
    z0[1:] = 0
    steps = op.affine_steps_solve(w, u, z0, **options(tol=1e-5, max_steps=40))
    watched = (steps.kept, steps.other, steps.d)
    steps.take()
    assert int(steps.left()) == 19
    held = [t[..., 0, :].clone() for t in watched]
    for _ in range(4):
        steps.take()
    assert all(torch.equal(t[..., 0, :], old) for t, old in zip(watched, held, strict=True))
    value, _, count, _ = steps.finish()
    assert torch.equal(value[0], z0[0]) and count[0] == 1 and (count[1:] == 5).all()


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
def test_tiles_whose_rows_have_all_stopped_return(device, tile, monkeypatch):
    """They multiply no more; nor does the first step from zero."""
    w, u = problem(20, 40, device)
    steps = op.affine_steps_solve(w, u, torch.zeros_like(u), **options())
    while int(steps.left()):
        steps.take()
    before = [x.clone() for x in steps.finish()]
    products, matmul = [], np.matmul
    monkeypatch.setattr("numpy.matmul", lambda *args, **options: products.append(None) or matmul(*args, **options))
    steps.take()
    assert not products and all(torch.equal(a, b) for a, b in zip(steps.finish(), before, strict=True))
    steps.reset(torch.zeros_like(u))
    steps.take()
    assert not products  # a start at zero
    steps.take()
    assert products
    products.clear()
    steps = op.affine_steps_adjoint(w, u, u, **options())
    steps.take()
    assert not products
    steps.take()
    assert products


@torch.no_grad()
def test_steps_after_the_last_change_nothing_and_memory_is_used_again(device, tile):
    """As a captured chunk of steps does it; and W and u are read again."""
    w, u = problem(7, 40, device)
    pre, z0 = torch.randn_like(u), torch.randn_like(u)
    expected = solve(w, u, z0, **options(max_steps=8)), adjoint(w, pre, u, **options(max_steps=8))
    for extra in (0, 5):
        other_w, other_u = 0.5 * w, u + 1
        forward = op.affine_steps_solve(other_w, other_u, torch.full_like(u, 7.0), **options(max_steps=8))
        backward = op.affine_steps_adjoint(other_w, pre, other_u, **options(max_steps=8))
        for steps, start, (value, count, residual, status) in (
            (forward, z0, expected[0]),
            (backward, None, expected[1]),
        ):
            for again in range(3):
                if again == 1:
                    other_w.copy_(w)
                    other_u.copy_(u)
                steps.reset(start)
                for _ in range(8 + extra):
                    steps.take()
                    steps.onward()
                result = [x.clone() for x in steps.finish()]
            assert int(steps.left()) == 0
            assert all(torch.equal(a, b) for a, b in zip(result, (value, status, count, residual), strict=True))
            other_w.mul_(0.5)
            other_u.add_(1)
