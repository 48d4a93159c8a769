"""The affine cell in one launch and step by step: values, stops and independence of rows, the same for both."""

import math

import pytest
import torch
from affine_ways import (
    WAYS,
    Steps,
    Whole,
    choose_tile,
    dense_adjoint,
    exact,
    nonfinite,
    options,
    problem,
    restless,
    true_residual,
)
from close import FLOOR, assert_as_eager, assert_residual, error

from tritondeq.kernels.rows import affine as rows
from tritondeq.kernels.rules import CONVERGED, GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW

# B, D, activation, terms: every size, activation and count of terms, not their product; for steps with their tile
CASES = [(Whole, "small", *case) for case in [(5, 1, "tanh", 2), (15, 7, "relu", 2), (33, 17, "sin", 2)]]
CASES += [(Whole, "small", *case) for case in [(17, 64, "identity", 3), (1, 65, "gelu", 2), (3, 128, "sin", 3)]]
CASES += [(Whole, "small", *case) for case in [(2, 256, "relu", 1), (17, 256, "tanh", 2), (3, 256, "identity", 3)]]
CASES += [(Steps, "small", *case) for case in [(5, 1, "tanh", 2), (15, 7, "relu", 2), (17, 33, "gelu", 1)]]
CASES += [(Steps, "small", *case) for case in [(33, 64, "sin", 2), (16, 65, "identity", 3)]]
CASES += [(Steps, "split", *case) for case in [(1, 129, "gelu", 2), (2, 257, "sin", 1)]]
LONG = [(Steps, "small", 150, 33, "tanh", 2), (Steps, "split", 65, 70, "tanh", 2)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LONG]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    choose_tile(monkeypatch, "small")
    return WAYS[request.param]


@pytest.fixture(params=["whole", "steps"])
def small(request, monkeypatch):
    """The ways that hold W."""
    choose_tile(monkeypatch, "small")
    return WAYS[request.param]


@pytest.mark.parametrize("kind, tile, batch, features, activation, terms", CASES)
def test_solve_and_adjoint(device, monkeypatch, kind, tile, batch, features, activation, terms):
    choose_tile(monkeypatch, tile)
    w, u = problem(batch, features, device, terms=terms)
    settings = options(activation=activation)
    z, steps, residual, status = kind.solve(w, u, terms=terms, **settings)
    eager, eager_steps, *_ = rows.affine_solve_ref(w, u, **settings)
    assert_as_eager(z, eager, exact(w, u, **settings), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()
    assert_residual(residual, true_residual(w, u, z, activation, terms), settings["tol"])
    assert (z.dtype, steps.dtype, residual.dtype, status.dtype) == (*[torch.float32, torch.int32] * 2,)

    pre, g = u, torch.randn_like(u)
    u_star, steps, residual, status = kind.adjoint(w, pre, g, terms=terms, **settings)
    eager, eager_steps, *_ = rows.affine_adjoint_ref(w, pre, g, **settings)
    assert_as_eager(u_star, eager, dense_adjoint(w, pre, g, activation), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()


def test_strides_do_not_matter(device, small):
    w, u = problem(18, small.features, device)
    z0, pre = torch.randn_like(u), torch.randn_like(u)

    def strided(t):
        return t.repeat_interleave(2, 1)[:, ::2]

    for z, same in zip(
        (small.solve(w, u, z0, **options())[0], small.adjoint(w, pre, u, **options())[0]),
        (
            small.solve(w.T.contiguous().T, u.T.contiguous().T, strided(z0), **options())[0],
            small.adjoint(strided(w), strided(pre), strided(u), **options())[0],
        ),
        strict=True,
    ):
        assert torch.equal(z, same)


@pytest.mark.parametrize("activation, scale", [("relu", 1e6), ("identity", 1e6), ("tanh", 1e-6), ("gelu", 1e-6)])
def test_scales(device, small, activation, scale):
    w, u = problem(7, small.features, device)
    u = u * scale
    settings = options(activation=activation)
    z, _, _, status = small.solve(w, u, **settings)
    assert (status == CONVERGED).all()
    assert_as_eager(z, rows.affine_solve_ref(w, u, **settings)[0], exact(w, u, **settings), 2)


@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_adjoint_is_homogeneous(device, small, scale):
    w, pre = problem(6, small.features, device)
    g = torch.randn_like(pre)
    u, steps, *_ = small.adjoint(w, pre, g, **options(tol=1e-4))
    scaled, scaled_steps, *_ = small.adjoint(w, pre, g * scale, **options(tol=1e-4))
    assert error(scaled / scale, u.double()) < 1e-5
    assert (steps - scaled_steps).abs().max() <= 1


def test_increments_converge_where_a_state_in_bfloat16_does_not(device, way):
    """One mode of -0.9, along which all elements are rounded alike: it gives each step's rounding back in the next."""
    features = way.features
    w = (torch.ones(features, features, device=device) * -0.9 / features).bfloat16().float()
    u = torch.rand(8, 1, device=device).expand(8, features).contiguous()
    settings = options(activation="identity", tol=1e-2, terms=1)
    z, _, residual, status = way.solve(w, u, **settings)
    assert (status == CONVERGED).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 1), 1e-2)
    best, state = torch.full((8,), math.inf, device=device), torch.zeros_like(u)
    for _ in range(500):
        y = torch.addmm(u, state, w.T)
        best = torch.minimum(best, (y - state).norm(dim=1) / y.norm(dim=1))
        state = y.bfloat16().float()
    assert best.max() > 2e-2


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_warm_start(device, way, scale):
    w, u = problem(5, way.features, device)
    u *= scale
    cold, steps, *_ = way.solve(w, u, **options())
    again, one, *_ = way.solve(w, u, cold, **options(tol=1e-5))
    assert torch.equal(again, cold) and (one == 1).all()
    near = cold + 1e-3 * scale * torch.randn_like(cold)
    warm, fewer, *_ = way.solve(w, u, near, **options())
    assert (fewer < steps).all() and error(warm, exact(w, u, **options())) < FLOOR[2]
    assert (fewer - rows.affine_solve_ref(w, u, near, **options())[1]).abs().max() <= 1


def test_plateau(device, way):
    """W = -I keeps a small defect as it is."""
    _, u = problem(4, way.features, device)
    w, z0 = -torch.eye(way.features, device=device), u / 2 + 1e-3
    z, steps, residual, status = way.solve(w, u, z0, **options(activation="identity"))
    assert (status == PLATEAU).all() and (steps % WINDOW == 0).all() and (steps <= 2 * WINDOW).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-6)
    *_, status = rows.affine_solve_ref(w, u, z0, **options(activation="identity"))
    assert (status == PLATEAU).all()


def test_what_residuals_are_relative_to(device, way):
    """An absolute tolerance, a decay to 0, and an adjoint whose residual is relative to a cotangent of norm 1."""
    w, u = problem(5, way.features, device)
    half, none = 0.5 * torch.eye(way.features, device=device), torch.zeros_like(u)
    absolute, linear = options(tol=1e-3, scale=30.0), options(tol=1e-3, relative=0.0, scale=1.0)
    g = torch.nn.functional.normalize(u, dim=1)
    for made, right in (
        (way.solve(w, u, **absolute), rows.affine_solve_ref(w, u, **absolute)),
        (way.solve(half, none, u, **options()), rows.affine_solve_ref(half, none, u, **options())),
        (way.adjoint(w, u, g, **linear), rows.affine_adjoint_ref(w, u, g, **linear)),
    ):
        assert (made[3] == CONVERGED).all() and (made[1] - right[1]).abs().max() <= 1
        same = made[1] == right[1]
        assert same.any()
        torch.testing.assert_close(made[0][same], right[0][same], rtol=0, atol=1e-3)
        torch.testing.assert_close(made[2][same], right[2][same], rtol=0.1, atol=0)


def test_max_steps(device, small):
    w, u = problem(18, small.features, device)
    for limit in (1, 2, 3):
        z, steps, residual, status = small.solve(w, u, **options(max_steps=limit))
        eager = rows.affine_solve_ref(w, u, **options(max_steps=limit))[0]
        assert (status == MAX_STEPS).all() and (steps == limit).all()
        torch.testing.assert_close(z, eager, rtol=0, atol=1e-2)  # unconverged: bf16 increments
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), 1e-6)


def test_growing(device, small):
    """z_k = k u: the relative residual falls as 1 / k and there is no fixed point."""
    _, u = problem(3, small.features, device)
    w = torch.eye(small.features, device=device)
    settings = options(activation="identity", tol=3e-2, max_steps=50)
    solves = [small.solve, rows.affine_solve_ref]
    outcomes = [solve(w, u, **settings)[3] for solve in solves]
    if small is Whole:
        outcomes += [solve(w, u, memory=1, **settings)[3] for solve in solves]
    assert all((status == GROWING).all() for status in outcomes)


@nonfinite
@pytest.mark.parametrize(
    "kind, memory, bad",
    [
        *((Whole, memory, bad) for memory in (0, 2) for bad in (math.nan, math.inf)),
        (Steps, 0, math.nan),
        pytest.param(Steps, 0, math.inf, marks=pytest.mark.slow),
    ],
)
def test_nonfinite_row_stays_alone(device, monkeypatch, kind, memory, bad):
    choose_tile(monkeypatch, "small")
    w, u = problem(18, kind.features, device)
    settings = options(activation="relu", memory=memory)
    pre = torch.ones_like(u)
    clean, clean_adjoint = kind.solve(w, u, **settings), kind.adjoint(w, pre, u, **settings)
    u[3, 5] = bad
    z0, fine = torch.zeros_like(u), u.clone()
    z0[3, 7], fine[3, 5] = bad, 1.0
    others = torch.arange(18) != 3
    z, steps, *_ = whole = kind.solve(w, u, **settings)
    assert (z[3] == 0).all() and steps[3] == WINDOW
    for seen, expected in (
        (whole, clean),
        (kind.solve(w, fine, z0, **settings), clean),
        (kind.adjoint(w, pre, u, **settings), clean_adjoint),
    ):
        assert seen[3][3] == NONFINITE
        assert all(torch.equal(a[others], b[others]) for a, b in zip(seen, expected, strict=True))


@nonfinite
def test_overflow_returns_a_finite_iterate(device, small):
    _, u = problem(3, small.features, device)
    w = 1e6 * torch.eye(small.features, device=device)
    z, _, residual, status = small.solve(w, u, **options(activation="identity"))
    assert (status == NONFINITE).all() and z.isfinite().all() and residual.isfinite().all()


def test_best_iterate_is_returned(device, way):
    w, u = restless(way.features, device)
    settings = options(activation="identity", max_steps=20)
    z, steps, residual, status = way.solve(w, u, **settings)
    *_, best, _ = rows.affine_solve_ref(w.double(), u.double(), **settings)
    assert (status == MAX_STEPS).all() and (steps == 20).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-6)
    torch.testing.assert_close(residual.double(), best, rtol=0.2, atol=1e-6)

    u_star, _, residual, _ = way.adjoint(w, u, u, **settings)
    *_, best, _ = rows.affine_adjoint_ref(w.double(), u.double(), u.double(), **settings)
    torch.testing.assert_close(residual.double(), best, rtol=0.2, atol=1e-6)
    v = torch.linalg.solve(w.double(), (u_star - u).double(), left=False)
    true = (u_star - v).norm(dim=1) / u_star.double().norm(dim=1)
    assert_residual(residual, true, 1e-5)


@pytest.mark.parametrize(
    "kind, tile, features, batch, memory, max_steps",
    [
        (Whole, "small", 17, 37, 0, 60),
        (Whole, "small", 17, 37, 2, 60),
        pytest.param(Whole, "small", 256, 18, 0, 8, marks=pytest.mark.slow),
        pytest.param(Steps, "small", 70, 37, 0, 10, marks=pytest.mark.slow),
        pytest.param(Steps, "split", 70, 37, 0, 60, marks=pytest.mark.slow),
    ],
)
def test_rows_do_not_depend_on_their_batch(device, monkeypatch, kind, tile, features, batch, memory, max_steps):
    """Not on the order of rows, nor on how many there are."""
    choose_tile(monkeypatch, tile)
    w, u = problem(batch, features, device)
    u[: batch // 2] *= torch.logspace(-3, 1, batch // 2, device=device)[:, None]  # a spread of depths
    pre = torch.randn_like(u)
    settings = options(memory=memory, tol=1e-5, max_steps=max_steps)

    def outcomes(u, pre):
        return *kind.solve(w, u, **settings), *kind.adjoint(w, pre, u, **settings)

    whole = outcomes(u, pre)
    assert max_steps == 8 or whole[1].unique().numel() > 2
    order = torch.randperm(batch).to(device)
    for seen, expected in zip(outcomes(u[order], pre[order]), whole, strict=True):
        assert torch.equal(seen, expected[order])
    parts = (outcomes(u[a:b], pre[a:b]) for a, b in ((0, batch - 15), (batch - 15, batch)))
    for *both, expected in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat(both), expected)
