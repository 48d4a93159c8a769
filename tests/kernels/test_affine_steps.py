"""The affine cell's own steps: values against closed forms and the loop, step by step, and what a launch may touch."""

import itertools
import math

import numpy as np
import pytest
import torch
from close import assert_as_eager, assert_residual, error
from test_affine import dense_adjoint, exact, options, problem, restless, true_residual
from test_steps import Ops, _count

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Picard
from tritondeq.cells import Affine
from tritondeq.kernels import affine, dispatch, launch
from tritondeq.kernels import affine_steps as op
from tritondeq.kernels.rules import CONVERGED, GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW
from tritondeq.loop import Settings, drive

TILES = {"small": (16, 32, 32, 2), "split": (64, 64, 64, 2)}  # the latter's epilogue takes two halves
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
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


@pytest.fixture
def tile(monkeypatch):
    """Chooses the tiles of all launches; the interpreter takes the same time for each."""

    def choose(name):
        monkeypatch.setattr(launch, "TILES", {terms: (TILES[name],) * 3 for terms in (1, 2, 3)})

    choose("small")
    return choose


def run(steps, max_steps, trace=None):
    """The loop's result, as affine.py's ops return it."""
    settings = Settings(Picard(), steps.tol, max_steps, None, None)
    value, solution = drive(steps, settings, trace=trace is not None)
    if trace is not None:
        trace.append(solution.trace)
    return value, solution.steps, solution.residual, solution.status


def solve(w, u, z0=None, trace=None, **settings):
    z0 = torch.zeros_like(u) if z0 is None else z0
    return run(op.affine_steps_solve(w, u, z0, **settings), settings["max_steps"], trace)


def adjoint(w, pre, g, **settings):
    return run(op.affine_steps_adjoint(w, pre, g, **settings), settings["max_steps"])


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


def test_a_start_loses_no_bits(device, tile):
    w, u = problem(5, 40, device)
    z0 = torch.randn_like(u)
    steps = op.affine_steps_solve(w, u, z0, terms=3, **options())
    steps.take()
    assert torch.equal(steps.kept[1], z0)
    assert error(steps.other, u.double() + z0.double() @ w.double().T) < 3e-7  # 16 bits of z0 would leave 2e-6


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the count is read every few steps only")
def test_one_launch_a_step_and_nothing_beside_it(device, tile, monkeypatch):
    class Counting:
        def __init__(self, kernel):
            self.kernel, self.launches = kernel, 0

        def __getitem__(self, grid):
            return _count(self, grid)

    counter = Counting(op._step_kernel)
    monkeypatch.setattr(op, "_step_kernel", counter)
    w, u = problem(3, 40, device)
    totals, launches = [], []
    for most in (5, 9):
        counter.launches = 0
        with Ops() as ops:
            solve(w, u, **options(tol=1e-12, max_steps=most))
        totals.append(len(ops.names))
        launches.append(counter.launches)
    assert launches == [5, 9]
    assert totals[1] - totals[0] == 4 * 2  # clone and _local_scalar_dense of the count


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_a_solve(device, backward):
    """Four states for z or acc twice, the other and the best, one for two increments in bf16; and W's terms."""
    w, u = torch.zeros(300, 300, device=device), torch.zeros(600, 300, device=device)
    steps = op.AffineSteps(w, u, None if backward else u, u if backward else None, "tanh", 1e-3, 5, 1.0, 2)
    given = {t.untyped_storage().data_ptr() for t in (w, u)}
    own = {name: t for name, t in vars(steps).items() if torch.is_tensor(t) and name not in ("stats", "flags", "part")}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own.values()}
    size = sum(bytes for at, bytes in held.items() if at not in given | {steps.stats.untyped_storage().data_ptr()})
    wide = steps.d.shape[2]
    assert wide < 300 + 128 and size <= 4 * 4 * u.numel() + 2 * 2 * 600 * wide + 2 * 2 * wide**2 + 100


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "operands": "bf16"}], ids=str)
def test_a_layer_and_its_gradients(device, tile, options):
    tile("split")
    layer = DEQ(Affine(300, 20, **options), tol=1e-5, max_steps=100).to(device)
    x, z0 = torch.randn(2, 2, 20, device=device, requires_grad=True), torch.randn(2, 2, 300, device=device)
    results = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solution = layer.solve(x, z0=z0)
            grads = torch.autograd.grad(solution.value.sin().sum(), [x, *layer.parameters()])
            results.append((solution, grads))
    (eager, expected), (fused, grads) = results
    for path in (fused.path, fused.adjoint.path):
        assert path.startswith("loop, one launch a step and its GEMM")
    assert eager.path.startswith("loop: ") and (fused.steps - eager.steps).abs().max() <= 1
    assert fused.converged.all() and fused.steps.shape == (2, 2)
    torch.testing.assert_close(fused.value, eager.value, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, expected, strict=True):
        # through bf16 operands gradients are bf16 too
        torch.testing.assert_close(a, b, rtol=2**-7 if options else 1e-3, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def test_the_loop_is_the_one_loop(device, tile, monkeypatch):
    """A trace, a group, and a look at the count after every evaluation."""
    tile("split")
    x = torch.randn(2, 300, device=device)
    layer = DEQ(Affine(300), trace=True, tol=1e-4).to(device)
    solutions = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solutions.append(layer.solve(x))
    eager, fused = solutions
    assert fused.path.startswith("loop, one launch") and len(fused.trace) == fused.steps.max()
    torch.testing.assert_close(fused.trace, eager.trace, rtol=2e-2, atol=1e-6)

    counts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda left, op, group: counts.append((int(left), group)))
    layer.group = "all ranks"
    with tdeq.backend("triton"):
        again = layer.solve(x)
    assert again.path == fused.path and torch.equal(again.value, fused.value)
    assert counts[-1] == (0, "all ranks") and len(counts) == fused.steps.max() > 4


@pytest.mark.parametrize(
    "make, call, why",
    [
        (lambda: DEQ(Affine(300), solver=Anderson(2)), {}, "Anderson memory 2"),
        (lambda: DEQ(Affine(300).double()), {}, "float64"),
        (lambda: DEQ(Affine(300)), {"mask": True}, "no mask"),
        (lambda: DEQ(Affine(300)), {"rows": 0}, "empty batch"),
    ],
    ids=["anderson", "float64", "mask", "empty"],
)
def test_what_is_left_to_the_loop_and_why(device, make, call, why):
    layer = make().to(device)
    rows = call.get("rows", 2)
    x = torch.randn(rows, 300, device=device, dtype=layer.cell.weight.dtype)
    with tdeq.backend("triton"):
        z = layer(x, mask=torch.ones(rows, 300, dtype=torch.bool, device=device) if "mask" in call else None)
    assert layer.last.path.startswith("loop") and why in layer.last.path and "GEMM" not in layer.last.path.split(":")[0]
    assert z.isfinite().all() and layer.last.converged.all()


PROBLEM = {"rows": 4096, "features": 1024, "dtype": torch.float32, "terms": 2, "cell": "fp32"}


def test_refuses():
    assert op.refuses(**PROBLEM) is None and op.refuses(**PROBLEM | {"features": 4096}) is None
    assert "empty" in op.refuses(**PROBLEM | {"rows": 0})
    assert "256 features" in op.refuses(**PROBLEM | {"features": 256})
    assert "4097 features" in op.refuses(**PROBLEM | {"features": 4097})
    assert "float64" in op.refuses(**PROBLEM | {"dtype": torch.float64})
    assert "memory 5" in op.refuses(**PROBLEM, solver_memory=5)
    assert "'elu'" in op.refuses(**PROBLEM, activation="elu")


def test_the_rule():
    """In float32 without TF32 cuBLAS leaves the tensor cores idle: never. With them it is ahead where its share of the
    time is large."""
    sizes = [*itertools.product((1, 64, 4096, 1 << 20), (257, 512, 1024, 2048, 4096))]

    def refused(**changed):
        return {size for size in sizes if op.refuses(**PROBLEM | {"rows": size[0], "features": size[1]} | changed)}

    assert not refused() and refused(terms=3) == {(1, 4096)}  # whose time is that of reading W
    by_tf32, by_bf16 = refused(cell="tf32"), refused(cell="bf16", terms=1)
    assert (1 << 20, 4096) in by_tf32 and (1 << 20, 4096) in by_bf16
    assert not {(rows, features) for rows, features in by_tf32 | by_bf16 if rows * features <= 64 * 2048}
    assert "tf32" in op.refuses(**PROBLEM | {"features": 4096, "cell": "tf32"})
    here, apart = launch.affine_seconds(rows=1 << 20, features=1024, terms=2, cell="tf32")
    element = (1 << 20) * 1024
    assert here == pytest.approx(2e-6 + element * (2 * 1024 * 2 / (0.7 * 790e12) + 22 / 4.3e12), rel=1e-2)
    assert apart == pytest.approx(4e-6 + element * (2 * 1024 / 395e12 + 24 / 4.3e12), rel=1e-2)


@torch.no_grad()
def test_the_cell_says_what_torch_multiplies_in(device, monkeypatch):
    def asks(cell, **autocast):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(autocast)):
            whole = cell.whole_solve(cell.inject(torch.zeros(3, cell.features)))
            return whole.problem | {"terms": whole.options(1e-3)["terms"]}

    wide = Affine(257)
    problem = PROBLEM | {"rows": 3, "features": 257, "activation": "tanh"}
    assert asks(wide) == problem
    assert asks(Affine(257, operands="bf16")) == problem | {"terms": 1}
    assert asks(wide, autocast=True) == problem | {"terms": 1, "cell": "bf16"}
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert asks(wide)["cell"] == "tf32"
    assert asks(Affine(256)) == {"features": 256, "dtype": torch.float32, "activation": "tanh", "terms": 2}


def test_the_op_is_registered():
    assert dispatch.load("affine_steps") is op.affine_steps


@torch.no_grad()
def test_no_room_says_what_to_change(monkeypatch):
    def make(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = dispatch.CellOp(make, make, op.refuses, "never")
    layer, x = DEQ(Affine(257)), torch.randn(2, 257)
    with tdeq.backend("triton"), monkeypatch.context() as patch:
        patch.setitem(dispatch._ops, "affine_steps", broken)
        with pytest.raises(torch.OutOfMemoryError, match="split the batch. CUDA out of memory"):
            layer(x)
    assert layer(x).isfinite().all()
