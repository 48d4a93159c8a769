"""When a layer takes the affine cell's solve with a grid barrier, and its gradients."""

import pytest
import torch
from grids import shape

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Implicit
from tritondeq.cells import Affine, Monotone
from tritondeq.kernels import affine_grid as op
from tritondeq.kernels import costs, dispatch, launch


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
    monkeypatch.setattr(costs, "grid_seconds", lambda **_: (2.0, 1.0))
    assert "16 x 1024: " in why()


def test_the_op_is_registered():
    assert dispatch.load("affine_grid") is op.affine_grid
