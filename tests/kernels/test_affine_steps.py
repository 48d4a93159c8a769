"""The affine cell's steps: each evaluation against the loop, what a launch may touch, when a layer takes them."""

import itertools

import pytest
import torch
from affine_ways import Steps, choose_tile, counted_products, options, problem
from close import error
from test_steps import Ops, count_launches

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Picard
from tritondeq.cells import Affine
from tritondeq.kernels import dispatch
from tritondeq.kernels.steps import affine as op

solve, adjoint = Steps.solve, Steps.adjoint


@pytest.fixture(autouse=True)
def small(monkeypatch):
    choose_tile(monkeypatch, "small")


def test_step_by_step(device):
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


def test_a_start_loses_no_bits(device):
    w, u = problem(5, 40, device)
    z0 = torch.randn_like(u)
    steps = op.affine_steps_solve(w, u, z0, terms=3, **options())
    steps.take()
    assert torch.equal(steps.value[1], z0)
    assert error(steps.other, u.double() + z0.double() @ w.double().T) < 3e-7  # 16 bits of z0 would leave 2e-6


@pytest.mark.parametrize("length", [4, 5])
def test_the_best_iterate_is_returned_whenever_it_was_seen(device, length):
    """Defects run along a chain of features: evaluation k of row r finds a residual of 1e-3 (1 + (k - r)^2).

    The least is the last, the one before the last or long overwritten, in either buffer.
    """
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
    # starts at 0, and then goes the same way
    u_star, steps, residual, _ = adjoint(w.T, torch.zeros_like(u), u, **settings)
    assert (steps == length).all()
    for row in range(1, length):
        torch.testing.assert_close(u_star[row].double(), path[row + 1][row], rtol=0, atol=2e-5)
        assert residual[row].item() == pytest.approx(1e-3, rel=2e-2)


def test_the_best_is_not_copied_while_residuals_fall(device):
    w, u = problem(5, 40, device)
    expected = solve(w, u, **options())[0]
    steps = op.affine_steps_solve(w, u, torch.zeros_like(u), **options())
    steps.best.fill_(7.0)
    while int(steps.left()):
        steps.take()
    assert (steps.best == 7.0).all()
    assert torch.equal(steps.finish()[0], expected)


@torch.no_grad()
def test_a_stopped_row_is_stored_no_more(device):
    w, u = problem(20, 40, device)
    z0 = solve(w, u, **options())[0]
    z0[1:] = 0
    steps = op.affine_steps_solve(w, u, z0, **options(tol=1e-5, max_steps=40))
    watched = (steps.value, steps.other, steps.d)
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
def test_tiles_whose_rows_have_all_stopped_return(device, monkeypatch):
    """They multiply no more; nor does the first step from zero."""
    w, u = problem(20, 40, device)
    steps = op.affine_steps_solve(w, u, torch.zeros_like(u), **options())
    while int(steps.left()):
        steps.take()
    before = [x.clone() for x in steps.finish()]
    products = counted_products(monkeypatch)
    steps.take()
    assert not products and all(torch.equal(a, b) for a, b in zip(steps.finish(), before, strict=True))
    steps.reset(torch.zeros_like(u))
    for begun in (steps, op.affine_steps_adjoint(w, u, u, **options())):
        products.clear()
        begun.take()
        assert not products  # a start at zero
        begun.take()
        assert products


@pytest.mark.slow
@torch.no_grad()
def test_steps_after_the_last_change_nothing_and_memory_is_used_again(device):
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
            for again in range(2):
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
def test_one_launch_a_step_and_nothing_beside_it(device, monkeypatch):
    w, u = problem(3, 40, device)
    launched, totals, launches = count_launches(monkeypatch), [], []
    for most in (5, 9):
        launched.clear()
        with Ops() as ops:
            solve(w, u, **options(tol=1e-12, max_steps=most))
        totals.append(len(ops.names))
        launches.append(launched.count("_step_kernel"))
    assert launches == [5, 9]
    assert totals[1] - totals[0] == 4  # _local_scalar_dense of the count


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_of_a_solve(device, backward):
    """Four states for z or acc twice, the other and the best, one for two increments in bf16; and W's terms."""
    w, u = torch.zeros(300, 300, device=device), torch.zeros(600, 300, device=device)
    steps = op.AffineSteps(w, u, None if backward else u, u if backward else None, "tanh", 1e-3, 5, 1.0, 2)
    given = {t.untyped_storage().data_ptr() for t in (w, u, steps.stats)}
    tensors = [
        t for name, t in vars(steps).items() if torch.is_tensor(t) and name not in ("stats", "flags", "status", "part")
    ]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    size = sum(nbytes for at, nbytes in held.items() if at not in given)
    wide = steps.d.shape[2]
    assert wide < 300 + 128 and size <= 4 * 4 * u.numel() + 2 * 2 * 600 * wide + 2 * 2 * wide**2 + 100


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"activation": "gelu", "operands": "bf16"}, marks=pytest.mark.slow)], ids=str
)
def test_a_layer_and_its_gradients(device, monkeypatch, options):
    choose_tile(monkeypatch, "split")
    layer = DEQ(Affine(300, 20, **options), tol=1e-5, max_steps=100).to(device)
    x, z0 = torch.randn(2, 2, 20, device=device, requires_grad=True), torch.randn(2, 2, 300, device=device)
    results = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solution = layer.solve(x, z0=z0)
            grads = torch.autograd.grad(solution.value.sin().sum(), [x, *layer.parameters()])
            results.append((solution, grads))
    (eager, expected), (fused, grads) = results
    for path in (fused.why, fused.adjoint.why):
        assert path.startswith("one launch a step and its GEMM")
    assert eager.route is tdeq.Route.TORCH and (fused.steps - eager.steps).abs().max() <= 1
    assert fused.converged.all() and fused.steps.shape == (2, 2)
    torch.testing.assert_close(fused.value, eager.value, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, expected, strict=True):
        # through bf16 operands gradients are bf16 too
        torch.testing.assert_close(a, b, rtol=2**-7 if options else 1e-3, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def test_the_loop_is_the_one_loop(device, monkeypatch):
    """A trace, a group, and a look at the count after every evaluation."""
    choose_tile(monkeypatch, "split")
    x = torch.randn(2, 300, device=device)
    layer = DEQ(Affine(300), trace=True, tol=1e-4).to(device)
    solutions = []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solutions.append(layer.solve(x))
    eager, fused = solutions
    assert fused.route is tdeq.Route.FUSED and len(fused.trace) == fused.steps.max()
    torch.testing.assert_close(fused.trace, eager.trace, rtol=2e-2, atol=1e-6)

    counts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda left, op, group: counts.append((int(left), group)))
    layer.group = "all ranks"
    with tdeq.backend("triton"):
        again = layer.solve(x)
    assert again.why == fused.why and torch.equal(again.value, fused.value)
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
    assert layer.last.route is not tdeq.Route.KERNEL and why in layer.last.why and "its GEMM" not in layer.last.why
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


@pytest.mark.parametrize("cell, terms", [("tf32", 2), ("bf16", 1)])
def test_large_states_are_left_to_cublas_where_it_has_tensor_cores(cell, terms):
    """In float32 without TF32 it has none, and no state is too large."""
    most = {"rows": op.LARGE // 1024, "features": 1024}
    assert op.refuses(**PROBLEM | most | {"cell": cell, "terms": terms}) is None
    assert cell in op.refuses(**PROBLEM | most | {"rows": most["rows"] + 1, "cell": cell, "terms": terms})
    assert op.refuses(**PROBLEM | {"rows": 1 << 24}) is None


@torch.no_grad()
def test_the_cell_names_what_torch_multiplies_in(device, monkeypatch):
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


@torch.no_grad()
def test_no_room_comes_with_what_to_change(monkeypatch):
    def make(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = dispatch.CellOp(make, make, op.refuses, "never")
    layer, x = DEQ(Affine(257)), torch.randn(2, 257)
    with tdeq.backend("triton"), monkeypatch.context() as patch:
        patch.setitem(dispatch._ops, "steps.affine", broken)
        with pytest.raises(torch.OutOfMemoryError, match="split the batch. CUDA out of memory"):
            layer(x)
    assert layer(x).isfinite().all()
