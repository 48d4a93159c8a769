"""The affine cell's solve with a grid barrier: values against closed forms, and programs that meet, or do not."""

import math
import time

import numpy as np
import pytest
import torch
from close import assert_as_eager, assert_residual, error
from programs import InProcesses
from test_affine import dense_adjoint, exact, options, problem, restless, true_residual

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Implicit
from tritondeq.cells import Affine, Monotone
from tritondeq.kernels import affine, dispatch, launch
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
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="programs in processes need the interpreter")
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN
KERNEL = "tritondeq.kernels.affine_grid:grid_kernel"


def shape(block_n=None, groups=2, block_k=16):
    """Launch parameters like those that we ship; None is one program for all features."""

    def parameters(*, batch, features, terms, shared, processors):
        blocks = {"BLOCK_M": 16, "BLOCK_N": block_n or launch.block(features), "BLOCK_K": block_k, "GROUPS": groups}
        return blocks | {"CHUNKS": -(-features // (groups * block_k)), "num_warps": groups, "num_stages": 1}

    return parameters


@pytest.fixture
def alone(monkeypatch):
    """One program to a tile of rows, as the interpreter runs them one after another; on a GPU what we ship."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(launch.SHAPES, "affine_grid", shape())


@pytest.fixture
def together(monkeypatch):
    """A program for each 16 features, in processes of their own."""
    monkeypatch.setitem(launch.SHAPES, "affine_grid", shape(16))

    def start(**how):
        processes = InProcesses(KERNEL, **how)
        monkeypatch.setattr(op, "grid_kernel", processes)
        return processes

    return start


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


def uneven(batch, features, device):
    """Rows that need from few to many steps, and the pre-activation of such an adjoint."""
    w, u = problem(batch, features, device, norm=0.6)
    scales = torch.logspace(-2, 1, batch, device=device)[:, None]
    return w, u * scales, torch.randn_like(u) * scales.sqrt()


def outcomes(w, u, pre, **settings):
    return *op.affine_grid_solve(w, u, **settings), *op.affine_grid_adjoint(w, pre, u, **settings)


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


def laggard(number, builder):
    """Program 1 of three writes only when the others have come to the barrier, and reads what they wrote only when they
    have come to the next one: no earlier than it may, and as late as it can."""
    if number != 1:
        return
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    arrivals, told = [0], []

    def counting(*call):
        told[:] = call
        arrivals[0] += call[0].name == "ADD" and call[2].data.item() == 2
        return atomic(*call)

    def others_come(seconds):
        does, at, two, *rest = told
        nothing = type(two)(np.zeros_like(two.data), two.dtype)
        end = time.monotonic() + seconds
        while atomic(does, at, nothing, *rest).data.item() < 2 * 3 * arrivals[0] + 2 * 2 and time.monotonic() < end:
            pass

    def late_load(ptrs, *call):
        if told and np.ndim(ptrs.data) == 3:
            others_come(0.2)  # after the last evaluation they do not
        return load(ptrs, *call)

    def late_store(*call):
        if told:
            others_come(0.2)
            time.sleep(0.01)
        return store(*call)

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = late_load, late_store, counting


@CPU
def test_programs_meet(device, together):
    """Two tiles of three programs each, both ways, with rows of many depths: right, and the same to the bit again when
    one of them is as late as it can be."""
    w, u, pre = uneven(18, 40, device)
    settings = options(tol=1e-3)
    processes = together()
    seen = outcomes(w, u, pre, **settings)
    assert processes.grids == [6, 6] and processes.options["launch_cooperative_grid"] is True
    for (z, steps, residual, status), eager, truth in (
        (seen[:4], affine.affine_solve_ref(w, u, **settings), exact(w, u, **settings)),
        (seen[4:], affine.affine_adjoint_ref(w, pre, u, **settings), dense_adjoint(w, pre, u, "tanh")),
    ):
        assert steps.unique().numel() > 2 and (steps - eager[1]).abs().max() <= 1
        assert torch.equal(status, eager[3]) and (status == CONVERGED).all()
        assert ((residual <= 1e-3) & (residual > 0)).all()
        assert_as_eager(z, eager[0], truth, 2)
    assert_residual(seen[2], true_residual(w, u, seen[0], "tanh", 2), 1e-3)
    together(before=laggard)
    for again, first in zip(op.affine_grid_solve(w, u[:16], **settings), seen[:4], strict=True):
        assert torch.equal(again, first[:16])


@CPU
def test_programs_meet_from_a_start_and_at_a_limit(device, together):
    together()
    w, u = problem(3, 40, device)
    z0 = exact(w, u, **options()).float() + 1e-3 * torch.randn_like(u)
    z, steps, residual, status = op.affine_grid_solve(w, u, z0, terms=3, **options())
    assert (status == CONVERGED).all() and error(z, exact(w, u, **options())) < 1e-6
    assert (steps < affine.affine_solve_ref(w, u, **options())[1]).all()
    *_, residual, status = op.affine_grid_solve(w, u, z0, terms=3, **options(max_steps=1))
    assert (status == MAX_STEPS).all()
    assert_residual(residual, true_residual(w, u, z0, "tanh", 3), 1e-6)


def assert_lost(result, rows=slice(None)):
    z, _, residual, status = (each[rows] for each in result)
    assert z.isnan().any(1).all() and residual.isinf().all() and (status == NONFINITE).all()


@CPU
@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["absent", "late"])
def test_none_waits_for_ever(device, together, monkeypatch, how, who):
    """Whoever does not come, or comes when the others have given up: every row says so."""
    monkeypatch.setattr(op, "POLLS", 20)
    together(**{how: [who]})
    w, u = problem(5, 40, device)
    result = op.affine_grid_solve(w, u, **options())
    assert_lost(result)
    assert (result[1] == 0).all()
    others = torch.arange(40) // 16 != who
    assert result[0][:, others if how == "absent" else slice(None)].isnan().all()


def deaf(number, builder):
    """From its fourth arrival on program 1 sees none of the others, who see it, and go on."""
    atomic, arrivals, seen = builder.create_atomic_rmw, [0], [None]

    def blind(*told):
        arrives = told[0].name == "ADD" and told[2].data.item() == 2
        arrivals[0] += arrives
        poll = told[0].name == "ADD" and told[2].data.item() == 0
        if number != 1 or arrivals[0] < 4 or not (arrives or poll):
            return atomic(*told)
        if arrives:
            time.sleep(0.001)
            seen[0] = atomic(*told)
            seen[0].data[...] = 2 * 3 * (arrivals[0] - 1)
        return type(seen[0])(seen[0].data.copy(), seen[0].dtype)

    builder.create_atomic_rmw = blind


def pausing(number, builder):
    """Program 1 pauses before its fourth arrival until one of the others has given up."""
    atomic, arrivals = builder.create_atomic_rmw, [0]

    def late(*told):
        arrives = told[0].name == "ADD" and told[2].data.item() == 2
        arrivals[0] += arrives
        if number == 1 and arrives and arrivals[0] == 4:
            does, at, two, *rest = told
            nothing = type(two)(np.zeros_like(two.data), two.dtype)
            while not atomic(does, at, nothing, *rest).data.item() & 1:
                time.sleep(1e-3)
        return atomic(*told)

    builder.create_atomic_rmw = late


@CPU
@pytest.mark.parametrize(
    "before, work",
    [(pausing, op.affine_grid_solve), (deaf, op.affine_grid_solve), (deaf, op.affine_grid_adjoint)],
)
def test_rows_that_all_have_stopped_before_are_right(device, together, monkeypatch, before, work):
    """Where the others found at the fourth evaluation that a row had converged, one that is deaf never does."""
    factors = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], device=device)
    w = torch.diag(factors.repeat(5))
    u = torch.randn(8, 40).to(device) * torch.eye(8, device=device).repeat(1, 5)  # a row has one factor
    settings = options(activation="identity", tol=1e-2)
    operands = (w, u) if work is op.affine_grid_solve else (w, u, u)
    together()
    z, steps, residual, status = whole = work(*operands, **settings)
    early = steps < 4
    assert steps.tolist() == [3, 3, 3, 4, 5, 6, 7, 9] and (status == CONVERGED).all()
    torch.testing.assert_close(z, u / (1 - factors)[:, None], rtol=2e-2, atol=1e-6)
    monkeypatch.setattr(op, "POLLS", 2000)
    together(before=before)
    result = work(*operands, **settings)
    assert_lost(result, ~early)
    assert all(torch.equal(a[early], b[early]) for a, b in zip(result, whole, strict=True))


@pytest.fixture
def asked(monkeypatch):
    """As where a GPU has enough multiprocessors; on a CPU with one program to a tile."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
        monkeypatch.setitem(launch.SHAPES, "affine_grid", shape(None, 8, 64))
    with tdeq.backend("triton", barriers=True):
        yield


@pytest.mark.parametrize("how", [{}, {"activation": "gelu", "operands": "bf16"}], ids=str)
def test_a_layer_and_its_gradients(device, asked, how):
    layer = DEQ(Affine(300, 20, **how), tol=1e-5, max_steps=100).to(device)
    x, z0 = torch.randn(2, 2, 20, device=device, requires_grad=True), torch.randn(2, 2, 300, device=device)
    results = []
    for name in ("torch", "triton"):
        with tdeq.backend(name, barriers=True):
            solution = layer.solve(x, z0=z0)
            grads = torch.autograd.grad(solution.value.sin().sum(), [x, *layer.parameters()])
            results.append((solution, grads))
    (eager, expected), (fused, grads) = results
    for path in (fused.path, fused.adjoint.path):
        assert path.startswith("one Triton launch with a grid barrier a step")
    assert eager.path.startswith("loop: ") and (fused.steps - eager.steps).abs().max() <= 1
    assert fused.converged.all() and fused.steps.shape == (2, 2)
    torch.testing.assert_close(fused.value, eager.value, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, expected, strict=True):
        # through bf16 operands gradients are bf16 too
        torch.testing.assert_close(a, b, rtol=2**-7 if how else 1e-3, atol=1e-4 * b.abs().max().item())


def test_a_monotone_cell_takes_it(device, asked):
    layer, x = DEQ(Monotone(300), solver=tdeq.ForwardBackward(), tol=1e-4).to(device), torch.randn(2, 300).to(device)
    solution = layer.solve(x)
    assert solution.path.startswith("one Triton launch with a grid barrier") and solution.converged.all()
    with tdeq.backend("torch"):
        torch.testing.assert_close(layer(x), solution.value, rtol=1e-3, atol=1e-3)


def test_only_where_it_is_asked_for(device, asked):
    layer, x = DEQ(Affine(300)).to(device), torch.randn(2, 300, device=device)
    with tdeq.backend("triton"):
        layer(x)
    assert layer.last.path.startswith("loop, one launch a step and its GEMM")
    assert "barrier" not in layer.last.path
    layer(x)
    assert layer.last.path.startswith("one Triton launch with a grid barrier")


@pytest.mark.parametrize(
    "make, call, path, why",
    [
        (lambda: DEQ(Affine(300), solver=Anderson(2)), {}, "loop", "a grid barrier is Picard's"),
        (lambda: DEQ(Affine(300).double()), {}, "loop", "float64"),
        (lambda: DEQ(Affine(300)), {"mask": True}, "loop", "no mask"),
        (lambda: DEQ(Affine(300), trace=True), {}, "loop", "no group or trace"),
        (lambda: DEQ(Affine(300)), {"rows": 0}, "loop", "empty batch"),
        (lambda: DEQ(Affine(20)), {}, "one Triton launch", ""),
    ],
    ids=["anderson", "float64", "mask", "trace", "empty", "narrow"],
)
def test_what_is_left_to_others_and_why(device, asked, make, call, path, why):
    layer = make().to(device)
    rows, features = call.get("rows", 2), layer.cell.features
    x = torch.randn(rows, features, device=device, dtype=layer.cell.weight.dtype)
    z = layer(x, mask=torch.ones(rows, features, dtype=torch.bool, device=device) if "mask" in call else None)
    assert layer.last.path.startswith(path) and why in layer.last.path
    assert not layer.last.path.startswith("one Triton launch with a grid barrier")
    assert z.isfinite().all() and layer.last.converged.all()


def test_a_backward_solver_of_its_own(device, asked):
    layer = DEQ(Affine(300), adjoint=Implicit(solver=Anderson(2))).to(device)
    layer(torch.randn(2, 300, device=device)).sum().backward()
    assert layer.last.path.startswith("one Triton launch with a grid barrier")
    assert layer.last.adjoint.path.startswith("loop")


PROBLEM = {"rows": 16, "features": 1024, "dtype": torch.float32, "terms": 2, "cell": "fp32"}


def test_refuses(monkeypatch):
    def why(**changed):
        return op.refuses(**PROBLEM | changed)

    assert why() is None and why(features=257, rows=1) is None and why(rows=64) is None
    assert "empty" in why(rows=0)
    assert "65 rows" in why(rows=65)
    assert "256 features" in why(features=256) and "2049 features" in why(features=2049)
    assert "float64" in why(dtype=torch.float64)
    assert "memory 5" in why(solver_memory=5)
    assert "'elu'" in why(activation="elu")
    assert "do not fit on 132 multiprocessors" in why(rows=64, features=2048)
    assert "on 1 multiprocessors" in why(device=torch.device("cpu"))
    monkeypatch.setattr(launch, "grid_seconds", lambda **_: (2.0, 1.0))
    assert "16 x 1024: " in why()


def test_the_op_is_registered():
    assert dispatch.load("affine_grid") is op.affine_grid


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs as many programs at once as a GPU runs")
@pytest.mark.parametrize("features", [257, 512, 1024, 2048])
@pytest.mark.parametrize("batch", [1, 17, 64])
def test_on_a_gpu(device, batch, features):
    """With the launch parameters that we ship, a hundred times over: right, and the same to the bit."""
    terms = 2
    of = {"shared": launch.shared_memory(device), "processors": launch.multiprocessors(device)}
    if launch.parameters("affine_grid", batch=batch, features=features, terms=terms, **of) is None:
        pytest.skip("does not fit")
    w, u, pre = uneven(batch, features, device)
    seen = outcomes(w, u, pre, **options())
    for (z, steps, _, status), eager, truth in (
        (seen[:4], affine.affine_solve_ref(w, u, **options()), exact(w, u, **options())),
        (seen[4:], affine.affine_adjoint_ref(w, pre, u, **options()), dense_adjoint(w, pre, u, "tanh")),
    ):
        assert (status == CONVERGED).all() and (steps - eager[1]).abs().max() <= 1
        assert_as_eager(z, eager[0], truth, terms)
    for _ in range(100):
        for again, first in zip(outcomes(w, u, pre, **options()), seen, strict=True):
            assert torch.equal(again, first)
