"""When a layer takes the affine cell's own steps, what they launch and hold, and its gradients."""

import itertools

import pytest
import torch
from own_steps import solve
from test_affine import options, problem
from test_steps import Ops, _count

import tritondeq as tdeq
from tritondeq import DEQ, Anderson
from tritondeq.cells import Affine
from tritondeq.kernels import costs, dispatch
from tritondeq.kernels.steps import affine as op


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
    here, apart = costs.affine_seconds(rows=1 << 20, features=1024, terms=2, cell="tf32")
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
    assert dispatch.load("steps.affine") is op.affine_steps


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
