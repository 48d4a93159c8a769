"""Cells that leave their last activation, or their last sum and norm, to the fused step."""

import pytest
import torch
from replays import Recorder

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Picard, Status, cuda_graphs
from tritondeq.cells import MLP, Affine, Transformer
from tritondeq.kernels import launch

pytestmark = pytest.mark.kernels
CELLS = {
    "outer": (Transformer, {"heads": 2}),
    "damped": (Transformer, {"heads": 2, "wiring": "damped", "damping": 0.7}),
    "head": (Transformer, {"heads": 2, "wiring": "head"}),
    "post": (MLP, {"form": "post"}),
    "pre": (MLP, {"form": "pre", "activation": "swiglu"}),
}


def made(name, device, dtype=torch.float32):
    """A cell none of whose scales are all alike."""
    kind, options = CELLS[name]
    cell = kind(12, **options).to(device)
    with torch.no_grad():
        for path, p in cell.named_parameters():
            if p.ndim == 1 or path == "scales":
                p += 0.2 * torch.randn_like(p)
    return cell.to(dtype)


@pytest.fixture(autouse=True)
def none_fits(monkeypatch):
    """No MLP fits in one launch."""
    real = launch.too_large
    monkeypatch.setattr(launch, "too_large", lambda op, *a: "too wide here" if op == "rows.mlp" else real(op, *a))


@pytest.fixture
def forwards(monkeypatch):
    """A function of a cell that returns a list, which grows whenever the cell is called."""

    def calls_of(cell):
        calls = []
        # Not a hook: kernels leave a cell that has hooks to torch.
        monkeypatch.setattr(
            type(cell), "__call__", lambda self, *a: calls.append(None) or torch.nn.Module.__call__(self, *a)
        )
        return calls

    return calls_of


@torch.no_grad()
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "sin", "identity"])
@pytest.mark.parametrize(
    "solver", [Picard(damping=0.8), pytest.param(Anderson(memory=5), marks=pytest.mark.slow)], ids=repr
)
def test_activations_are_applied_by_the_step(solver, activation, forwards):
    cell, x, results = Affine(12, activation=activation), torch.randn(5, 12), []
    calls, mask = forwards(cell), torch.rand(5, 12) > 0.2 if isinstance(solver, Picard) else None
    for name in ("torch", "triton"):
        calls.clear()
        with tdeq.backend(name):
            solution = DEQ(cell, solver=solver, tol=1e-5, max_steps=200, trace=True).solve(x, mask=mask)
        assert bool(calls) == (name == "torch") and solution.converged.all()
        results.append(solution)
    assert (results[0].steps - results[1].steps).abs().max() <= 1
    torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, solver",
    [
        *(pytest.param(n, Picard(), marks=[pytest.mark.slow] * (n in ("post", "damped"))) for n in CELLS),
        ("outer", Anderson(memory=3)),
        pytest.param("damped", Broyden(10), marks=pytest.mark.slow),
        ("pre", Anderson(2)),
    ],
    ids=str,
)
def test_solutions_and_gradients(name, solver, device, forwards):
    """As torch has them; f itself is called once, at the solution, for the gradient."""
    cell = made(name, device)
    layer, calls = DEQ(cell, solver=solver, tol=1e-6, max_steps=80), forwards(cell)
    x, results = torch.randn(2, 3, 12, device=device, requires_grad=True), []
    for backend in ("torch", "triton"):
        calls.clear()
        with tdeq.backend(backend):
            z = layer(x)
            results.append([z, *torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()])])
        assert (layer.last.status == Status.CONVERGED).all()
    assert len(calls) == 1 and layer.last.route is not tdeq.Route.KERNEL, "the block was evaluated apart from the steps"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CELLS)
def test_no_further_from_float64_than_eager(name, device):
    """One evaluation of the cell, by the first step of Picard."""
    cell = made(name, device)
    x, z = torch.randn(2, 3, 5, 12, device=device)
    with tdeq.backend("torch"):
        eager = cell(z, cell.inject(x))
    with tdeq.backend("triton"):
        injection = cell.inject(x)
        parts, tail = cell.tail(injection)
        fused = tail(z, *parts(z, injection))
    wide = cell.double()
    exact = wide(z.double(), wide.inject(x.double()))
    errors = [(y.double() - exact).norm() / exact.norm() for y in (eager, fused)]
    assert errors[1] <= 2 * errors[0] + 1e-6 and errors[0] < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", CELLS)
def test_half_precision(name, device):
    """A cell in bfloat16, whose state is float32 between the steps."""
    layer, values = DEQ(made(name, device, torch.bfloat16), tol=1e-2), []
    x = torch.randn(3, 5, 12, device=device).bfloat16()
    for backend in ("torch", "triton"):
        with tdeq.backend(backend):
            values.append(layer(x).float())
        assert (layer.last.status == Status.CONVERGED).all()
    assert (values[0] - values[1]).norm() <= 3e-2 * values[0].norm()


@torch.no_grad()
def test_float64_calls_the_activation(forwards):
    cell = Affine(6, dtype=torch.float64)
    calls = forwards(cell)
    with tdeq.backend("triton"):
        solution = DEQ(cell, tol=1e-12, max_steps=300).solve(torch.randn(3, 6, dtype=torch.float64))
    assert calls and solution.converged.all()


@torch.no_grad()
def test_padding_and_per_sample_stops(device):
    """Padding counts in no norm of the residual, and does not prolong a sample's solve."""
    cell = made("outer", device)
    x, real = torch.randn(3, 5, 12, device=device), torch.arange(5, device=device) < torch.tensor([[5], [2], [1]])
    with tdeq.backend("triton"):
        together = DEQ(cell, tol=1e-5).solve((x, real))
        alone = DEQ(cell, tol=1e-5).solve((x[1:2, :2], real[1:2, :2]))
    assert together.steps[1] == alone.steps[0]
    torch.testing.assert_close(together.value[1, :2], alone.value[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_norm_with_hooks_is_called(hook, device):
    cell, calls = made("outer", device), []
    getattr(cell.outer_norm, hook)(lambda *_: calls.append(None))
    with tdeq.backend("triton"):
        layer = DEQ(cell)
        layer(torch.randn(2, 3, 12, device=device))
    assert len(calls) == layer.last.steps.max()


@torch.no_grad()
@pytest.mark.parametrize("trace", [False, True])
def test_a_forward_that_was_overridden_is_called(trace):
    """In a subclass, or on the instance."""

    class Shifted(Affine):
        def forward(self, z, injection):
            return super().forward(z, injection) + 1.0

    x = torch.randn(3, 6)
    layer = DEQ(Shifted(6), tol=1e-5, max_steps=200, trace=trace)
    patched = DEQ(Affine(6), tol=1e-5, max_steps=200, trace=trace)
    patched.load_state_dict(layer.state_dict())
    patched.cell.forward = lambda z, injection: Affine.forward(patched.cell, z, injection) + 1.0
    for deq in (layer, patched):
        with tdeq.backend("triton"):
            z = deq(x)
        assert torch.allclose(layer.cell(z, layer.cell.inject(x)), z, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_steps_end_the_block_too(autocast, monkeypatch, device, forwards):
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell, dtypes = made("outer", device), set()
    cell.down.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    layer, x = DEQ(cell, graph=True), torch.randn(2, 3, 12, device=device)
    layer(x)  # draws masks, for which it evaluates the cell
    calls = forwards(cell)
    dtypes.clear()
    with tdeq.backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        layer(x)
    assert layer.last.route is tdeq.Route.GRAPH and len(calls) <= 1
    assert dtypes == {torch.bfloat16 if autocast else torch.float32}
