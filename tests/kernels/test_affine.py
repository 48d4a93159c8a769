import math

import numpy as np
import pytest
import torch
from close import FLOOR, assert_as_eager, assert_residual, error

from tritondeq.kernels import launch
from tritondeq.kernels.formulas import FAST
from tritondeq.kernels.rows import affine as op
from tritondeq.kernels.rows.skeleton import bf16_terms
from tritondeq.kernels.rules import CONVERGED, GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW

# B, D, activation, terms: every size, activation and count of terms, not their product
CASES = [
    (5, 1, "tanh", 2),
    (15, 7, "relu", 2),
    (16, 16, "gelu", 1),
    (33, 17, "sin", 2),
    (17, 64, "identity", 3),
    (1, 65, "gelu", 2),
    (16, 128, "tanh", 2),
    (3, 128, "sin", 3),
    (2, 256, "relu", 1),
    (17, 256, "tanh", 2),
    (3, 256, "identity", 3),
]
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def problem(batch, features, device, norm=0.6, terms=2):
    w = torch.randn(features, features, dtype=torch.float64)
    w = (w * norm / torch.linalg.matrix_norm(w, 2)).float()
    if terms == 1:
        w = w.bfloat16().float()
    return w.to(device), torch.randn(batch, features).to(device)


def options(**changed):
    return {"activation": "tanh", "tol": 1e-6, "max_steps": 60} | changed


def exact(w, u, **settings):
    settings = settings | {"tol": 1e-14, "max_steps": 5000, "memory": 0, "damping": 1.0}
    return op.affine_solve_ref(w.double(), u.double(), **settings)[0]


def dense_adjoint(w, pre, g, activation):
    jacobian = op.SLOPES[activation](pre.double())[:, :, None] * w.double()
    eye = torch.eye(w.shape[0], dtype=torch.float64, device=w.device)
    return torch.stack([torch.linalg.solve(eye - j.T, row) for j, row in zip(jacobian, g.double(), strict=True)])


def true_residual(w, u, z, activation, terms):
    w = bf16_terms(w, terms).double().sum(0)  # the W that the kernel solves for
    f = op.ACTIVATIONS[activation](u.double() + z.double() @ w.T)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-30)


@pytest.mark.parametrize("batch, features, activation, terms", CASES)
def test_solve(device, batch, features, activation, terms):
    w, u = problem(batch, features, device, terms=terms)
    settings = options(activation=activation)
    z, steps, residual, status = op.affine_solve(w, u, terms=terms, **settings)
    eager, eager_steps, *_ = op.affine_solve_ref(w, u, **settings)
    assert_as_eager(z, eager, exact(w, u, **settings), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()
    assert_residual(residual, true_residual(w, u, z, activation, terms), settings["tol"])
    assert (z.dtype, steps.dtype, residual.dtype, status.dtype) == (*[torch.float32, torch.int32] * 2,)


@pytest.mark.parametrize("batch, features, activation, terms", CASES)
def test_adjoint(device, batch, features, activation, terms):
    w, pre = problem(batch, features, device, terms=terms)
    g = torch.randn_like(pre)
    settings = options(activation=activation)
    u, steps, residual, status = op.affine_adjoint(w, pre, g, terms=terms, **settings)
    eager, eager_steps, *_ = op.affine_adjoint_ref(w, pre, g, **settings)
    assert_as_eager(u, eager, dense_adjoint(w, pre, g, activation), terms)
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= settings["tol"]).all()


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


def test_strides_do_not_matter(device):
    w, u = problem(18, 24, device)
    z0, pre = torch.randn_like(u), torch.randn_like(u)

    def strided(t):
        return t.repeat_interleave(2, 1)[:, ::2]

    for z, same in zip(
        (op.affine_solve(w, u, z0, **options())[0], op.affine_adjoint(w, pre, u, **options())[0]),
        (
            op.affine_solve(w.T.contiguous().T, u.T.contiguous().T, strided(z0), **options())[0],
            op.affine_adjoint(strided(w), strided(pre), strided(u), **options())[0],
        ),
        strict=True,
    ):
        assert torch.equal(z, same)


@pytest.mark.parametrize("activation, scale", [("relu", 1e6), ("identity", 1e6), ("tanh", 1e-6), ("gelu", 1e-6)])
def test_scales(device, activation, scale):
    w, u = problem(7, 32, device)
    u = u * scale
    settings = options(activation=activation)
    z, _, _, status = op.affine_solve(w, u, **settings)
    assert (status == CONVERGED).all()
    assert_as_eager(z, op.affine_solve_ref(w, u, **settings)[0], exact(w, u, **settings), 2)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e5])
def test_adjoint_is_homogeneous(device, scale):
    w, pre = problem(6, 40, device)
    g = torch.randn_like(pre)
    u, steps, *_ = op.affine_adjoint(w, pre, g, **options(tol=1e-4))
    scaled, scaled_steps, *_ = op.affine_adjoint(w, pre, g * scale, **options(tol=1e-4))
    assert error(scaled / scale, u.double()) < 1e-5
    assert (steps - scaled_steps).abs().max() <= 1


@pytest.mark.parametrize("features", [24, 256])
def test_warm_start(device, features):
    w, u = problem(5, features, device)
    cold, steps, *_ = op.affine_solve(w, u, **options())
    again, one, *_ = op.affine_solve(w, u, cold, **options(tol=1e-5))
    assert torch.equal(again, cold) and (one == 1).all()
    near = cold + 1e-3 * torch.randn_like(cold)
    warm, fewer, *_ = op.affine_solve(w, u, near, **options())
    assert (fewer < steps).all()
    assert error(warm, cold.double()) < FLOOR[2]
    assert (fewer - op.affine_solve_ref(w, u, near, **options())[1]).abs().max() <= 1


@pytest.mark.parametrize("memory", [0, 2])
def test_damping(device, memory):
    w, u = problem(4, 32, device)
    settings = options(damping=0.7, memory=memory)
    z, steps, _, status = op.affine_solve(w, u, **settings)
    eager, eager_steps, *_ = op.affine_solve_ref(w, u, **settings)
    assert (status == CONVERGED).all() and (steps - eager_steps).abs().max() <= 1
    assert_as_eager(z, eager, exact(w, u, **settings), 2)


def slow(kind, device, features=32, batch=5):
    a = torch.randn(features, features, dtype=torch.float64)
    a = a + a.T if kind == "symmetric" else a - a.T
    w = (0.93 * a / torch.linalg.matrix_norm(a, 2)).float()
    return w.to(device), 0.3 * torch.randn(batch, features).to(device)


@pytest.mark.parametrize("kind", ["symmetric", "skew"])
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


@pytest.mark.parametrize("features", [24, 256])
def test_plateau(device, features):
    """W = -I keeps a small defect as it is."""
    _, u = problem(4, features, device)
    w = -torch.eye(features, device=device)
    z0 = u / 2 + 1e-3
    z, steps, residual, status = op.affine_solve(w, u, z0, **options(activation="identity"))
    assert (status == PLATEAU).all() and (steps % WINDOW == 0).all() and (steps <= 2 * WINDOW).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-6)
    *_, status = op.affine_solve_ref(w, u, z0, **options(activation="identity"))
    assert (status == PLATEAU).all()


def test_max_steps(device):
    w, u = problem(18, 24, device)
    for limit in (1, 3):
        z, steps, residual, status = op.affine_solve(w, u, **options(max_steps=limit))
        eager, _, eager_residual, _ = op.affine_solve_ref(w, u, **options(max_steps=limit))
        assert (status == MAX_STEPS).all() and (steps == limit).all()
        torch.testing.assert_close(z, eager, rtol=0, atol=1e-2)  # unconverged: bf16 increments
        assert_residual(residual, true_residual(w, u, z, "tanh", 2), 1e-6)


@pytest.mark.parametrize("memory", [0, 1])
def test_growing(device, memory):
    """z_k = k u: the relative residual falls as 1 / k and there is no fixed point."""
    _, u = problem(3, 16, device)
    w = torch.eye(16, device=device)
    settings = options(activation="identity", tol=3e-2, max_steps=50)
    *_, status = op.affine_solve(w, u, memory=memory, **settings)
    assert (status == GROWING).all()
    *_, status = op.affine_solve_ref(w, u, memory=memory, **settings)
    assert (status == GROWING).all()


@nonfinite
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("memory", [0, 2])
def test_nonfinite_row_stays_alone(device, bad, memory):
    w, u = problem(18, 24, device)
    settings = options(memory=memory, activation="relu")
    clean = op.affine_solve(w, u, **settings)
    u[3, 5] = bad
    z, steps, residual, status = op.affine_solve(w, u, **settings)
    others = torch.arange(18) != 3
    for seen, expected in zip((z, steps, residual, status), clean, strict=True):
        assert torch.equal(seen[others], expected[others])
    assert status[3] == NONFINITE and (z[3] == 0).all() and steps[3] == WINDOW
    u, _, _, status = op.affine_adjoint(w, torch.ones_like(u), u, **settings)
    assert status[3] == NONFINITE and u[others].isfinite().all() and (status[others] == CONVERGED).all()


@nonfinite
def test_overflow_returns_a_finite_iterate(device):
    _, u = problem(3, 16, device)
    w = 1e6 * torch.eye(16, device=device)
    z, _, residual, status = op.affine_solve(w, u, **options(activation="identity"))
    assert (status == NONFINITE).all() and z.isfinite().all() and residual.isfinite().all()


def restless(features, device, batch=4):
    """W with one mode that grows: residuals fall, and rise again before 20 steps are done."""
    q = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    modes = torch.full((features,), 0.3, dtype=torch.float64)
    modes[-1] = -1.2
    u = torch.randn(batch, features, dtype=torch.float64)
    u[:, -1] = torch.logspace(-2, 0, batch, dtype=torch.float64)
    return ((q * modes) @ q.T).float().to(device), (u @ q.T).float().to(device)


@pytest.mark.parametrize("features", [24, 256])
def test_best_iterate_is_returned(device, features):
    w, u = restless(features, device)
    settings = options(activation="identity", max_steps=20)
    z, steps, residual, status = op.affine_solve(w, u, **settings)
    *_, best, _ = op.affine_solve_ref(w.double(), u.double(), **settings)
    assert (status == MAX_STEPS).all() and (steps == 20).all()
    assert_residual(residual, true_residual(w, u, z, "identity", 2), 1e-6)
    torch.testing.assert_close(residual.double(), best, rtol=0.2, atol=1e-6)
    last = op.affine_solve(w, u, z, **settings | {"max_steps": 1})[2]
    torch.testing.assert_close(last, residual, rtol=0.05, atol=1e-6)

    u_star, _, residual, _ = op.affine_adjoint(w, u, u, **settings)
    *_, best, _ = op.affine_adjoint_ref(w.double(), u.double(), u.double(), **settings)
    torch.testing.assert_close(residual.double(), best, rtol=0.2, atol=1e-6)
    v = torch.linalg.solve(w.double(), (u_star - u).double(), left=False)
    true = (u_star - v).norm(dim=1) / u_star.double().norm(dim=1)
    assert_residual(residual, true, 1e-5)


def outcomes(w, u, pre, **settings):
    return *op.affine_solve(w, u, **settings), *op.affine_adjoint(w, pre, u, **settings)


@pytest.fixture
def rows_alone(monkeypatch):
    """The interpreter's BLAS treats the rows of small matrices differently; a tensor core does not."""
    monkeypatch.setattr("numpy.matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))


@pytest.mark.usefixtures("rows_alone")
@pytest.mark.parametrize("features, batch, memory", [(17, 37, 0), (17, 37, 2), (256, 18, 0)])
def test_rows_do_not_depend_on_their_batch(device, features, batch, memory):
    w, u = problem(batch, features, device)
    u[: batch // 2] *= torch.logspace(-3, 1, batch // 2, device=device)[:, None]  # a spread of depths
    pre = torch.randn_like(u)
    settings = options(memory=memory, tol=1e-5, max_steps=8 if features == 256 else 60)
    whole = outcomes(w, u, pre, **settings)
    order = torch.randperm(batch).to(device)
    for seen, expected in zip(outcomes(w, u[order], pre[order], **settings), whole, strict=True):
        assert torch.equal(seen, expected[order])
    cut = batch - 15
    parts = (outcomes(w, u[a:b], pre[a:b], **settings) for a, b in ((0, cut), (cut, batch)))
    for *both, expected in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat(both), expected)
    pad = torch.zeros(14, features, device=device)
    for seen, expected in zip(outcomes(w, torch.cat([u, pad]), torch.cat([pre, pad]), **settings), whole, strict=True):
        assert torch.equal(seen[:batch], expected)


@nonfinite
@pytest.mark.usefixtures("rows_alone")
@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("programs, refill", [(1, 0), (1, 8), (1, 15), (2, 8)])
def test_lanes_take_new_rows(device, monkeypatch, programs, refill, memory):
    """Rows of many depths, of which some are solved again, leave nothing of that to the row that takes their lane."""
    w, u = restless(16, device, batch=50)
    u[::7] *= 1e-3
    u[2, 3], u[9, 5] = torch.nan, torch.inf
    z0, pre = torch.randn_like(u), torch.randn_like(u)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    settings = options(activation="identity", max_steps=20, memory=memory)

    def outcome():
        return outcomes(w, u, pre, **settings) + op.affine_solve(w, u, z0, **settings)

    whole = outcome()
    rows, configured = launch.rows, []

    def sharing(**shape):
        configured.append(rows(**shape) | {"programs": programs, "REFILL": refill})
        return configured[-1].copy()

    monkeypatch.setitem(launch.SHAPES, "affine", sharing)
    for seen, expected in zip(outcome(), whole, strict=True):
        torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)
    assert len(configured) == 3


def test_cost_follows_the_mean_number_of_steps(device, monkeypatch):
    """In products with W, of which a program makes one a step: 6 of 64 rows need 66 steps, the others 5."""
    if device.type != "cpu":
        pytest.skip("counts what the interpreter does")
    w = torch.diag(torch.tensor([0.9] + 15 * [0.05]))
    u = torch.rand(64, 16) + 0.1
    u[:, 0] = torch.where(torch.arange(64) % 11 == 5, 1.0, 0.0)
    products = []
    product = np.matmul
    monkeypatch.setattr("numpy.matmul", lambda a, b, dtype: products.append(1) or product(a, b, dtype=dtype))

    def cost(refill):
        rows = launch.rows
        monkeypatch.setitem(launch.SHAPES, "affine", lambda **shape: rows(**shape) | {"programs": 1, "REFILL": refill})
        products.clear()
        steps = op.affine_solve(w, u, **options(activation="identity", terms=1, tol=1e-4, max_steps=200))[1]
        return len(products), steps

    lockstep, steps = cost(0)
    refilled, same = cost(8)
    assert torch.equal(steps, same) and steps.min() <= 6 and steps.max() >= 60
    assert lockstep >= 4 * steps.max()
    assert refilled <= 1.6 * steps.max(), (refilled, lockstep)


def test_terms_of_w():
    w = torch.randn(31, 31)
    for terms, bound in ((1, 2**-8), (2, 2**-16), (3, 2**-23)):
        parts = bf16_terms(w, terms)
        assert parts.dtype == torch.bfloat16
        assert ((parts.double().sum(0) - w).abs() <= bound * w.abs()).all()


def test_references_keep_float64(device):
    w, u = problem(3, 12, device)
    for memory in (0, 3):
        z, _, residual, status = op.affine_solve_ref(w.double(), u.double(), **options(tol=1e-13, memory=memory))
        assert z.dtype == residual.dtype == torch.float64 and (status == CONVERGED).all()
        assert true_residual(w, u, z, "tanh", 3).max() < 1e-7


def test_refuses():
    takes = {"features": 128, "dtype": torch.float32}
    assert op.refuses(**takes) is None
    assert op.refuses(**takes | {"features": 256}, solver_memory=4) is None
    assert "257 features" in op.refuses(**takes | {"features": 257})
    assert "float64" in op.refuses(**takes | {"dtype": torch.float64})
    assert "memory 5" in op.refuses(**takes, solver_memory=5)
    assert "'elu'" in op.refuses(**takes, activation="elu")


def test_refuses_what_shared_memory_cannot_hold(monkeypatch):
    monkeypatch.setattr(launch, "shared_memory", lambda device: 101376)
    assert "101376 bytes" in op.refuses(features=256, dtype=torch.float32)
    assert op.refuses(features=128, dtype=torch.float32) is None
