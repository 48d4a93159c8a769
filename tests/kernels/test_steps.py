"""The fused steps against the same steps in torch: iterates, values, steps, status, and what they launch."""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tanh_problem
from torch.utils._python_dispatch import TorchDispatchMode

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Picard, Status
from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.steps import anderson, base, picard
from tritondeq.kernels.tails import PLAIN

SOLVERS = [Picard(), Picard(damping=0.7), Anderson(memory=1), Anderson(memory=3, damping=0.8), Anderson(memory=8)]
SOLVERS += [Broyden(memory=1), Broyden(memory=4), Anderson(memory=3, half=True)]
FUSED = [Picard(), Anderson(memory=3), Broyden(memory=3)]
DTYPES = [torch.float32, torch.float64]
SPLIT = 2 * 2048 + 1  # three programs a sample in float32, five in float64
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def elementwise(rows, width, dtype, device, least=-0.9, most=0.8):
    """f(z) = a sin z + c, each element by itself, so that torch's result does not depend on the batch."""
    a = torch.linspace(least, most, width, dtype=dtype, device=device)
    c = torch.randn(rows, width, dtype=torch.float64).to(device, dtype)
    return lambda z: torch.addcmul(c[: z.shape[0]], a, torch.sin(z))


def both(f, z0, **options):
    """(torch's solution, the kernels' solution)."""
    solutions = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solutions.append(tdeq.fixed_point(f, z0, **options))
    assert solutions[0].route is tdeq.Route.TORCH and "launch" in solutions[1].why
    return solutions


def assert_same(f, eager, fused, tight, off=0):
    """Values to `tight`, status, steps but for `off`; and each residual is that of the value that it stands beside."""
    assert fused.status.tolist() == eager.status.tolist() and (fused.steps - eager.steps).abs().max() <= off
    torch.testing.assert_close(fused.value, eager.value, rtol=tight, atol=tight)
    y = f(fused.value)
    residual = (y - fused.value).norm(dim=1) / y.norm(dim=1)
    torch.testing.assert_close(fused.residual, residual.to(fused.residual.dtype), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "solver, dtype, width",
    [(solver, torch.float32, width) for solver in SOLVERS for width in (1, 7, 129)]
    + [(solver, torch.float64, width) for solver in FUSED for width in (7, 129)],
    ids=str,
)
def test_same_values_steps_and_status(solver, dtype, width, device):
    """Where a history spans the whole state, the last step of the solve is made of rounding errors."""
    f = elementwise(3, width, dtype, device, least=-0.8)
    tol = 1e-4 if dtype == torch.float32 else 1e-6
    eager, fused = both(f, torch.zeros(3, width, dtype=dtype, device=device), solver=solver, tol=tol, max_steps=60)
    off = int(width <= getattr(solver, "memory", 0))
    assert_same(f, eager, fused, 3 * tol if off else 2e-5 if dtype == torch.float32 else 1e-11, off)
    assert (eager.status == Status.CONVERGED).any()


@pytest.mark.parametrize(
    "solver, dtype",
    [(solver, DTYPES[0]) for solver in FUSED]
    + [(FUSED[0], dtype) for dtype in DTYPES[1:]]
    + [pytest.param(solver, dtype, marks=pytest.mark.slow) for solver in FUSED[1:] for dtype in DTYPES[1:]],
    ids=str,
)
def test_samples_that_several_programs_share(solver, dtype, device):
    f = elementwise(2, SPLIT, dtype, device)
    config = launch.parameters(solver.fused_steps, width=SPLIT, itemsize=dtype.itemsize)
    assert config["SPLITS"] >= 3
    z0 = torch.zeros(2, SPLIT, dtype=dtype, device=device)
    for mask in (None, torch.rand(2, SPLIT, device=device) > 0.2):
        eager, fused = both(f, z0, solver=solver, tol=1e-3, max_steps=25, mask=mask)
        assert fused.status.tolist() == eager.status.tolist() and fused.steps.tolist() == eager.steps.tolist()
        torch.testing.assert_close(fused.value, eager.value, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(fused.residual, eager.residual, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", FUSED, ids=str)
def test_iterates_and_trace(solver, dtype, device):
    """f is shown the same iterates, and a frozen sample where it stopped."""
    f = elementwise(3, 40, dtype, device, least=-0.97)
    z0 = torch.zeros(3, 40, dtype=dtype, device=device)
    z0[1] = tdeq.fixed_point(f, z0, tol=1e-12, max_steps=500, solver=Anderson()).value[1]  # stops at once
    seen = []

    def watched(z):
        seen.append(z.clone())
        return f(z)

    eager, fused = both(watched, z0, solver=solver, tol=1e-4, max_steps=60, trace=True)
    half = len(seen) // 2
    assert len(seen) == 2 * half == 2 * int(eager.steps.max()) and eager.steps[1] == 1
    tight = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(torch.stack(seen[half:]), torch.stack(seen[:half]), rtol=tight, atol=tight)
    assert all(torch.equal(z[1], z0[1]) for z in seen)
    torch.testing.assert_close(fused.trace[:8], eager.trace[:8], rtol=1e-2, atol=1e-6)
    assert fused.trace.shape == eager.trace.shape


@torch.no_grad()
@pytest.mark.parametrize(
    "solver, width",
    [
        *((solver, 16) for solver in (*FUSED, Anderson(1), Broyden(1), Anderson(2, half=True))),
        *((s, SPLIT) for s in FUSED),
    ],
    ids=str,
)
def test_the_best_iterate_is_returned_whenever_it_was_seen(solver, width, device):
    """Residuals from a list: every position of the least among the evaluations."""
    for best in range(5):
        residuals = [1e-2 * (1 + (k - best) ** 2) for k in range(5)]
        shown = []

        def f(z, residuals=residuals, shown=shown):
            shown.append(z.clone())
            step = residuals[len(shown) - 1]
            y = torch.ones_like(z)
            return z + step * y / math.sqrt(z.shape[1])

        with tdeq.backend("triton"):
            z0 = torch.ones(1, width, device=device)
            solution = tdeq.fixed_point(f, z0, solver=solver, tol=1e-12, max_steps=5)
        assert torch.equal(solution.value, shown[best]), best


@nonfinite
@torch.no_grad()
@pytest.mark.parametrize(
    "solver, width",
    [*((solver, 8) for solver in FUSED), (FUSED[0], SPLIT)]
    + [pytest.param(solver, SPLIT, marks=pytest.mark.slow) for solver in FUSED[1:]],
    ids=str,
)
def test_each_sample_ends_as_it_must(solver, width, device):
    """Converged at once, converged, not moving at a floor, growing, NaN from the third evaluation, NaN at once."""
    gain = torch.tensor([0.0, 0.5, -1.0, 1.0, 0.5, 0.5], device=device)[:, None]
    calls = []

    def f(z):
        calls.append(None)
        y = gain * z + 1 - gain
        y[3] += 1
        if len(calls) >= 3:
            y[4] = math.nan
        y[5, 0] = math.nan
        return y

    solutions = []
    for name in ("torch", "triton"):
        calls.clear()
        with tdeq.backend(name):
            z0 = torch.zeros(6, width, device=device)
            z0[2] = 1.001  # then 0.999, and so on
            solutions.append(tdeq.fixed_point(f, z0, solver=solver, tol=1e-5, max_steps=39))
    eager, fused = solutions
    assert fused.status.tolist() == eager.status.tolist() and fused.steps.tolist() == eager.steps.tolist()
    assert fused.status[0] == Status.CONVERGED and (fused.status[4:] == Status.NONFINITE).all()
    if isinstance(solver, Picard):
        assert fused.status.tolist() == [0, 0, int(Status.PLATEAU), int(Status.GROWING), 4, 4]
    torch.testing.assert_close(fused.value, eager.value, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(fused.value).all()


@pytest.mark.parametrize("solver", [Picard(damping=0.9), Anderson(memory=4), Broyden(memory=2)], ids=str)
@pytest.mark.parametrize("width", [100, pytest.param(SPLIT, marks=pytest.mark.slow)])
def test_batch_mates_change_no_bit(solver, width, device):
    f = elementwise(3, width, torch.float32, device)
    c = f(torch.zeros(3, width, device=device))
    a = torch.linspace(-0.9, 0.8, width, device=device)
    with tdeq.backend("triton"):
        options = {"solver": solver, "tol": 1e-4, "max_steps": 25}
        together = tdeq.fixed_point(f, torch.zeros(3, width, device=device), **options)
        for i in range(3):
            alone = tdeq.fixed_point(
                lambda z, i=i: torch.addcmul(c[i : i + 1], a, torch.sin(z)),
                torch.zeros(1, width, device=device),
                **options,
            )
            assert torch.equal(alone.value[0], together.value[i])
            assert alone.steps[0] == together.steps[i] and alone.residual[0] == together.residual[i]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("solver", FUSED, ids=str)
def test_the_path_does_not_change_with_the_scale(solver, scale, device):
    with tdeq.backend("triton"):
        counts = []
        for s in (1.0, scale):
            f, _, u = tanh_problem(4, 16, 0.45, scale=s)
            counts.append(tdeq.fixed_point(f, torch.zeros_like(u), solver=solver, tol=1e-4).steps)
    assert (counts[0] - counts[1]).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", FUSED, ids=str)
def test_halves(solver, dtype, device):
    """A cell in half precision: state, norms and history are float32."""
    f = elementwise(2, 33, torch.float32, device)
    z0 = torch.zeros(2, 33, dtype=dtype, device=device)
    eager, fused = both(lambda z: f(z.float()).to(dtype), z0, solver=solver, tol=1e-2)
    assert fused.value.dtype == dtype and fused.residual.dtype == torch.float32
    assert fused.steps.tolist() == eager.steps.tolist() and (fused.status == Status.CONVERGED).all()
    torch.testing.assert_close(fused.value, eager.value, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@settings(max_examples=10)
@given(data=st.data())
def test_any_state(data):
    """Random structures, dtypes, batch dims, masks and solvers."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    batch = data.draw(st.sampled_from([(2,), (1,), (2, 2), ()]))
    dtype = data.draw(st.sampled_from(DTYPES))
    leaf = st.lists(st.integers(1, 5), max_size=2)
    shapes = data.draw(st.recursive(leaf.map(tuple), lambda s: st.dictionaries(st.sampled_from("abc"), s, min_size=1)))

    def make(s):
        return {k: make(v) for k, v in s.items()} if isinstance(s, dict) else torch.randn((*batch, *s)).to(dtype)

    def f(z, c):
        return {k: f(z[k], c[k]) for k in z} if isinstance(z, dict) else 0.5 * torch.cos(z) + c

    c, z0 = make(shapes), make(shapes)
    solver = data.draw(st.sampled_from(SOLVERS))
    eager, fused = both(lambda z: f(z, c), z0, solver=solver, tol=1e-3, max_steps=12, batch_dims=len(batch))
    assert fused.steps.shape == batch and (fused.steps - eager.steps).abs().max() <= 1
    both_ended = (fused.status == Status.CONVERGED) & (eager.status == Status.CONVERGED)
    assert both_ended.all() or torch.equal(fused.status, eager.status)
    flat = [torch.utils._pytree.tree_leaves(s.value) for s in (eager, fused)]
    for a, b in zip(*flat, strict=True):
        # f contracts by a half, so that each is within 2 tol of the fixed point
        assert (b - a).norm() <= 4e-3 * (1 + a.norm())


@pytest.mark.parametrize(
    "solver", [FUSED[0], *(pytest.param(one, marks=pytest.mark.slow) for one in FUSED[1:])], ids=str
)
def test_gradients(solver, device):
    """The adjoint's steps are fused as well; second derivatives too."""
    grads = []
    for name in ("torch", "triton"):
        _, w, u = tanh_problem(3, 12, 0.4, dtype=torch.float64)
        w, u = w.to(device).requires_grad_(), u.to(device).requires_grad_()
        with tdeq.backend(name):
            solution = tdeq.fixed_point(
                lambda z, w=w, u=u: torch.tanh(z @ w.T + u), torch.zeros_like(u), solver=solver, tol=1e-10
            )
            first = torch.autograd.grad(solution.value.square().sum(), (w, u), create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), (w, u))
        if name == "triton":
            assert "launch" in solution.adjoint.why
        grads.append((*first, *second))
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-7, atol=1e-8)


def count_launches(monkeypatch):
    """Returns a list that grows by the name of every kernel that steps launch, out of sight of `Ops`."""
    launched, launch_kernel = [], base.Samples.launch_kernel

    def spy(self, kernel, grid, **known):
        launched.append(kernel.__name__)
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter copies tensors
            return launch_kernel(self, kernel, grid, **known)

    def again(self, kind, kernel, grid, turning, **known):  # without what was bound before, which is launched unseen
        self.launch_kernel(kernel, grid, **known, **turning)

    monkeypatch.setattr(base.Samples, "launch_kernel", spy)
    monkeypatch.setattr(base.Samples, "launch_again", again)
    return launched


class Ops(TorchDispatchMode):
    """Notes the names of all torch operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the count is read every few steps only")
@pytest.mark.parametrize(
    "solver, width, dtype, kernels",
    [
        (Picard(damping=0.5), 40, torch.float32, 1),
        (Picard(), 2049, torch.float32, 1),
        (Anderson(memory=5), 40, torch.float32, 1),
        (Anderson(memory=5), 2049, torch.float32, 2),
        (Anderson(memory=6), 40, torch.float32, 2),
        (Anderson(memory=5), 40, torch.float64, 2),
        (Broyden(memory=10), 40, torch.float32, 1),
        (Broyden(memory=3), 2049, torch.float32, 2),
        (Broyden(memory=3), 40, torch.float64, 2),
    ],
    ids=str,
)
def test_launches_of_a_step(solver, width, dtype, kernels, monkeypatch):
    """Beside the cell: one launch, two of Anderson and Broyden where several programs share a sample or registers would
    spill; and, on a CPU, the read of how many samples go on."""
    launched, totals, launches = count_launches(monkeypatch), [], []
    c, a = torch.randn(2, width, dtype=dtype), torch.linspace(-0.9, 0.8, width, dtype=dtype)
    for steps in (5, 9):
        launched.clear()
        with tdeq.backend("triton"), Ops() as ops:
            options = {"solver": solver, "tol": 1e-12, "max_steps": steps}
            tdeq.fixed_point(lambda z: torch.addcmul(c, a, z.sin()), torch.zeros_like(c), **options)
        totals.append([n for n in ops.names if not n.startswith(("view", "alias", "detach"))])
        launches.append(len(launched) - 2)  # and what begins and ends a solve
    assert launches == [5 * kernels, 9 * kernels]
    beside = len(totals[1]) - len(totals[0]) - 4 * 2  # the cell is sin, addcmul
    assert beside == 4, totals[1]  # _local_scalar_dense of the count


def test_what_is_refused():
    assert "empty" in picard.refuses(width=0, dtype=torch.float32)
    assert picard.refuses(width=1 << 24, dtype=torch.float64) is None
    assert "memory 9" in anderson.refuses(width=4, dtype=torch.float32, memory=9)
    with tdeq.backend("triton"):
        for z0 in (torch.zeros(2, 0), torch.zeros(0, 3)):
            solution = tdeq.fixed_point(lambda z: z, z0)
            assert solution.value.shape == z0.shape and solution.route is tdeq.Route.TORCH


def test_a_sample_is_shared_by_its_width_alone():
    for width in (1, 127, 4097, 8192, 8193, 1 << 20):
        for itemsize in (4, 8):
            config = launch.parameters("steps.picard", width=width, itemsize=itemsize)
            assert config["BLOCK_N"] * (config["SPLITS"] - 1) < width <= config["BLOCK_N"] * config["SPLITS"]


@pytest.mark.parametrize("solver", FUSED, ids=str)
def test_strides_do_not_matter(solver, device):
    f = elementwise(4, 6, torch.float32, device)
    z0 = torch.randn(4, 6, device=device)
    with tdeq.backend("triton"):
        straight = tdeq.fixed_point(f, z0, solver=solver, tol=1e-4)
        turned = tdeq.fixed_point(lambda z: f(z).T.contiguous().T, z0.T.contiguous().T, solver=solver, tol=1e-4)
    assert torch.equal(straight.value, turned.value) and torch.equal(straight.steps, turned.steps)


@torch.no_grad()
@pytest.mark.parametrize("solver", FUSED, ids=str)
def test_steps_after_the_last_change_nothing_and_memory_is_used_again(solver, device):
    """As a captured chunk of steps does it."""
    f, z0 = elementwise(3, 20, torch.float32, device), torch.randn(3, 20, device=device)
    op = dispatch.load(solver.fused_steps)
    ends = []
    for extra in (0, 5):
        steps = op.start(torch.full_like(z0, 7.0), None, 1e-4, 8, PLAIN, **asdict(solver))
        for start in (z0 + 1, z0):
            steps.reset(start)
            z = steps.z
            for _ in range(9 + extra):
                steps.take(f(z))
                z = steps.onward()
        ends.append([x.clone() for x in steps.finish()])
        assert int(steps.left()) == 0 and (steps.flags[1] <= 8).all()
    with tdeq.backend("triton"):
        solution = tdeq.fixed_point(f, z0, solver=solver, tol=1e-4, max_steps=8)
    for a, b, c in zip(*ends, (solution.value, solution.status, solution.steps, solution.residual), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@torch.no_grad()
@pytest.mark.parametrize("solver", [*FUSED, Anderson(memory=6), Broyden(memory=1)], ids=str)
def test_a_caller_may_stop_before_the_samples_do(solver, device):
    """After any evaluation the best so far is handed out; no sample has stopped."""
    residuals, z0 = [3e-2, 1e-2, 2e-2, 4e-2, 5e-3, 6e-3], torch.ones(2, 16, device=device)
    for evaluations in range(1, len(residuals) + 1):
        steps, shown = dispatch.load(solver.fused_steps).start(z0, None, 1e-9, 99, PLAIN, **asdict(solver)), []
        for residual in residuals[:evaluations]:
            z = steps.onward() if shown else steps.z
            shown.append(z.clone())
            steps.take(z + residual / 4)
        best, _, count, _ = steps.finish()
        assert torch.equal(best, shown[min(range(evaluations), key=residuals.__getitem__)]), evaluations
        assert count.tolist() == [evaluations] * 2 and int(steps.left()) == 2


@pytest.mark.parametrize(
    "solver, states",
    [
        (Picard(), 4),
        (Anderson(memory=3), 2 * 3 + 3),
        (Anderson(memory=1), 2 * 1 + 3),
        (Anderson(memory=4, half=True), (1.5 if torch.cuda.is_available() else 2) * 4 + 4),
        (Broyden(memory=3), 2 * 3 + 3),
    ],
    ids=str,
)
def test_memory_of_a_solve(solver, states, device):
    """In states beside the cell's output, as in the README; vectors with a number for each sample do not count."""
    z0 = torch.zeros(2, 1 << 12, device=device)
    steps = dispatch.load(solver.fused_steps).start(z0, None, 1e-3, 5, PLAIN, **asdict(solver))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in vars(steps).values() if torch.is_tensor(t)}
    size = z0.untyped_storage().nbytes()
    assert states * size <= sum(storage.nbytes() for storage in held.values()) <= states * size + 0.02 * size
