"""The affine cell's whole solve: activations, Anderson, W's lagging term, lanes that take new rows, what is refused."""

import pytest
import torch
from affine_ways import counted_products, dense_adjoint, exact, nonfinite, options, problem, restless, true_residual
from close import FLOOR, assert_as_eager, assert_residual, error

from tritondeq.kernels import devices, launch
from tritondeq.kernels.formulas import FAST
from tritondeq.kernels.rows import affine as op
from tritondeq.kernels.rules import CONVERGED


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_every_activation_both_ways(device, activation):
    w, u = problem(9, 20, device)
    settings = options(activation=activation)
    z = op.affine_solve(w, u, **settings)[0]
    fast = 1e-3 if activation in FAST.values() else 0.0  # the hardware's tanh, in a contraction
    assert error(z, exact(w, u, **settings)) <= FLOOR[2] + fast
    pre, g = torch.addmm(u, z, w.T), torch.randn_like(u)
    assert error(op.affine_adjoint(w, pre, g, **settings)[0], dense_adjoint(w, pre, g, activation)) <= FLOOR[2]


@pytest.mark.parametrize("features", [64, 256])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_reported_residual_at_loose_tolerances(device, features, tol):
    """Where W's low term lags most behind z."""
    for norm in (0.15, 0.9):
        w, u = problem(4, features, device, norm)
        settings = options(tol=tol)
        z, steps, residual, status = op.affine_solve(w, u, **settings)
        assert (status == CONVERGED).all()
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), tol)
        assert (steps - op.affine_solve_ref(w, u, **settings)[1]).abs().max() <= 1


def test_lagging_term_stops_no_row(device):
    """z = u + W u in two steps, as W W = 0: by then no lag was pushed, and each residual lacks W's low term."""
    w = torch.zeros(256, 256)
    w[:128, 128:] = 1.003 * torch.eye(128)[torch.randperm(128)]  # 1 in bf16
    w, u = w.to(device), torch.randn(4, 256).to(device)
    z, _, residual, status = op.affine_solve(w, u, **options(activation="identity", tol=1e-2))
    assert (status == CONVERGED).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-2)


def test_empty_batch(device):
    w, u = problem(0, 8, device)
    for z, steps, residual, status in (
        op.affine_solve(w, u, **options()),
        op.affine_adjoint(w, u, u, **options()),
        op.affine_solve_ref(w, u, **options()),
    ):
        assert z.shape == (0, 8) and steps.shape == residual.shape == status.shape == (0,)


@pytest.mark.parametrize("memory", [0, 2])
def test_damping(device, memory):
    w, u = problem(4, 32, device)
    settings = options(damping=0.7, memory=memory)
    z, steps, _, status = op.affine_solve(w, u, **settings)
    eager, eager_steps, *_ = op.affine_solve_ref(w, u, **settings)
    assert (status == CONVERGED).all() and (steps - eager_steps).abs().max() <= 1
    assert_as_eager(z, eager, exact(w, u, **settings), 2)


def slow(kind, device, features=32, batch=5):
    """Returns (W, u) that Picard takes many steps for."""
    a = torch.randn(features, features, dtype=torch.float64)
    a = a + a.T if kind == "symmetric" else a - a.T
    w = (0.93 * a / torch.linalg.matrix_norm(a, 2)).float()
    return w.to(device), 0.3 * torch.randn(batch, features).to(device)


@pytest.mark.parametrize("kind", ["symmetric", pytest.param("skew", marks=pytest.mark.slow)])
def test_anderson(device, kind):
    w, u = slow(kind, device)
    settings = options(tol=1e-5, max_steps=400)
    plain = op.affine_solve(w, u, **settings)[1]
    truth = exact(w, u, **settings)
    for memory in (1, 2, 3, 4):
        z, steps, residual, status = op.affine_solve(w, u, memory=memory, **settings)
        eager, eager_steps, *_ = op.affine_solve_ref(w, u, memory=memory, **settings)
        assert (status == CONVERGED).all() and (steps <= plain).all()
        assert ((steps - eager_steps).abs() <= torch.clamp(eager_steps // 10, min=2)).all()
        assert_as_eager(z, eager, truth, 2)
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), settings["tol"])
    assert (2 * steps < plain).all()


@pytest.mark.parametrize("features, batch", [(32, 5), (256, 2)])
def test_anderson_adjoint(device, features, batch):
    w, pre = slow("skew", device, features, batch)
    g = torch.randn_like(pre)
    settings = options(tol=1e-5, max_steps=400, memory=3)
    u, steps, _, status = op.affine_adjoint(w, pre, g, **settings)
    eager, eager_steps, *_ = op.affine_adjoint_ref(w, pre, g, **settings)
    assert (status == CONVERGED).all()
    assert_as_eager(u, eager, dense_adjoint(w, pre, g, "tanh"), 2)
    assert (steps - eager_steps).abs().max() <= 2


@nonfinite
@pytest.mark.parametrize("memory", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_lanes_take_new_rows(device, monkeypatch, memory):
    """Rows of many depths, of which some are solved again, leave nothing of that to the row that takes their lane."""
    w, u = restless(16, device, batch=50)
    u[::7] *= 1e-3
    u[2, 3], u[9, 5] = torch.nan, torch.inf
    z0, pre = torch.randn_like(u), torch.randn_like(u)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 1)
    settings = options(activation="identity", max_steps=20, memory=memory)

    def outcome():
        cold, warm = op.affine_solve(w, u, **settings), op.affine_solve(w, u, z0, **settings)
        return *cold, *warm, *op.affine_adjoint(w, pre, u, **settings)

    whole = outcome()
    for programs, refill in ((1, 0), (1, 15), (2, 8)):
        with launch.override("rows.affine", {"programs": programs, "REFILL": refill}):
            for seen, expected in zip(outcome(), whole, strict=True):
                torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


def test_cost_follows_the_mean_number_of_steps(device, monkeypatch):
    """In products with W, of which a program makes one a step: 6 of 64 rows need 66 steps, the others 5."""
    if device.type != "cpu":
        pytest.skip("counts what the interpreter does")
    w = torch.diag(torch.tensor([0.9] + 15 * [0.05]))
    u = torch.rand(64, 16) + 0.1
    u[:, 0] = torch.where(torch.arange(64) % 11 == 5, 1.0, 0.0)
    products = counted_products(monkeypatch)

    def cost(refill):
        products.clear()
        with launch.override("rows.affine", {"programs": 1, "REFILL": refill}):
            steps = op.affine_solve(w, u, **options(activation="identity", terms=1, tol=1e-4, max_steps=200))[1]
        return len(products), steps

    lockstep, steps = cost(0)
    refilled, same = cost(8)
    assert torch.equal(steps, same) and steps.min() <= 6 and steps.max() >= 60
    assert lockstep >= 4 * steps.max()
    assert refilled <= 1.6 * steps.max(), (refilled, lockstep)


def test_refuses(monkeypatch):
    takes = {"features": 128, "dtype": torch.float32}
    assert op.refuses(**takes) is None
    assert op.refuses(**takes | {"features": 256}, solver_memory=4) is None
    assert "257 features" in op.refuses(**takes | {"features": 257})
    assert "float64" in op.refuses(**takes | {"dtype": torch.float64})
    assert "memory 5" in op.refuses(**takes, solver_memory=5)
    assert "'elu'" in op.refuses(**takes, activation="elu")
    monkeypatch.setattr(devices, "shared_memory", lambda device: 101376)
    assert "101376 bytes" in op.refuses(**takes | {"features": 256})
    assert op.refuses(**takes) is None


def test_what_triton_3_4_does_not_compile(monkeypatch):
    """W whose second term is read from memory; the interpreter compiles nothing."""
    wide = {"features": 256, "dtype": torch.float32}
    for interpreted, version, refused in ((False, (3, 4), True), (True, (3, 4), False), (False, (3, 5), False)):
        monkeypatch.setattr(launch, "interpreting", lambda interpreted=interpreted: interpreted)
        monkeypatch.setattr(launch, "triton_version", lambda version=version: version)
        assert ("Triton 3.4" in (op.refuses(**wide, terms=2) or "")) == refused
        assert op.refuses(**wide, terms=1) is None and op.refuses(**wide | {"features": 128}) is None
