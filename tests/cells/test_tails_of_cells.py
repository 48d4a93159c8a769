"""Cells that leave their last sum and norm to the fused step: transformers, and MLPs too wide for one launch."""

import pytest
import torch
from replays import Recorder

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Picard, Status, cuda_graphs
from tritondeq.cells import MLP, Transformer
from tritondeq.kernels import launch

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
    monkeypatch.setattr(launch, "too_large", lambda op, *of: "too wide here" if op == "rows.mlp" else real(op, *of))


def forwards(cell):
    """A list that grows whenever the cell's own forward is called."""
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize(
    "name, solver",
    [
        *((name, Picard()) for name in CELLS),
        ("outer", Anderson(memory=3)),
        ("damped", Broyden(10)),
        ("pre", Anderson(2)),
    ],
    ids=str,
)
def test_solutions_and_gradients(name, solver, device):
    """As torch has them; f itself is called once, at the solution, for the gradient."""
    cell = made(name, device)
    layer, calls = DEQ(cell, solver=solver, tol=1e-6, max_steps=80), forwards(cell)
    x, found = torch.randn(2, 3, 12, device=device, requires_grad=True), []
    for backend in ("torch", "triton"):
        calls.clear()
        with tdeq.backend(backend):
            z = layer(x)
            found.append([z, *torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()])])
        assert (layer.last.status == Status.CONVERGED).all()
    assert len(calls) == 1, "the block was evaluated apart from the steps"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CELLS)
def test_no_further_from_float64_than_eager(name, device):
    """One evaluation of the cell, by the first step of Picard."""
    cell = made(name, device)
    x, z = torch.randn(2, 3, 5, 12, device=device)
    found = []
    for backend in ("torch", "triton"):
        with tdeq.backend(backend):
            injection = cell.inject(x)
            if backend == "torch":
                found.append(cell(z, injection))
            else:
                parts, tail = cell.tail(injection)
                found.append(tail(z, *parts(z, injection)))
    wide = cell.double()
    exact = wide(z.double(), wide.inject(x.double()))
    errors = [(y.double() - exact).norm() / exact.norm() for y in found]
    assert errors[1] <= 2 * errors[0] + 1e-6 and errors[0] < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", CELLS)
def test_half_precision(name, device):
    """A cell in bfloat16, whose state is float32 between the steps."""
    cell = made(name, device, torch.bfloat16)
    x, found = torch.randn(3, 5, 12, device=device).bfloat16(), []
    for backend in ("torch", "triton"):
        with tdeq.backend(backend):
            layer = DEQ(cell, tol=1e-2)
            found.append(layer(x).float())
        assert (layer.last.status == Status.CONVERGED).all()
    assert (found[0] - found[1]).norm() <= 3e-2 * found[0].norm()


@torch.no_grad()
def test_padding_and_per_sample_stops(device):
    """What is padding counts in no norm of the residual, and does not keep a sample going."""
    cell = made("outer", device)
    x, real = torch.randn(3, 5, 12, device=device), torch.arange(5, device=device) < torch.tensor([[5], [2], [1]])
    with tdeq.backend("triton"):
        together = DEQ(cell, tol=1e-5).solve((x, real))
        alone = DEQ(cell, tol=1e-5).solve((x[1:2, :2], real[1:2, :2]))
    assert together.steps[1] == alone.steps[0]
    torch.testing.assert_close(together.value[1, :2], alone.value[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_norm_that_somebody_listens_to_is_called(hook, device):
    cell, seen = made("outer", device), []
    getattr(cell.outer_norm, hook)(lambda *_: seen.append(None))
    with tdeq.backend("triton"):
        layer = DEQ(cell)
        layer(torch.randn(2, 3, 12, device=device))
    assert len(seen) == layer.last.steps.max()


@pytest.mark.parametrize("name", CELLS)
def test_captured(name, monkeypatch, device):
    """A replay sees the norm's weight and the scales of today, and the gradient's right side of the call."""
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell = made(name, device)
    layers = [DEQ(cell, tol=1e-5, max_steps=60, graph=graph) for graph in (True, False)]
    with tdeq.backend("triton"):
        for scale in (1.0, 0.5):
            x = scale * torch.randn(2, 2, 12, device=device)
            found = []
            for layer in layers:
                z = layer(x)
                found.append([z, *torch.autograd.grad(z.sin().sum(), list(cell.parameters()))])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            assert ["graph" in layer.last.path for layer in layers] == [True, False]
            with torch.no_grad():
                for path, p in cell.named_parameters():
                    if p.ndim == 1 or path == "scales":
                        p += 0.3 * torch.randn_like(p)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_steps_end_the_block_too(autocast, monkeypatch, device):
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell, seen = made("outer", device), set()
    cell.down.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    layer, x = DEQ(cell, graph=True), torch.randn(2, 3, 12, device=device)
    layer(x)  # draws masks, for which it evaluates the cell
    calls = forwards(cell)
    seen.clear()
    with tdeq.backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        layer(x)
    assert "graph" in layer.last.path and len(calls) <= 1
    assert seen == {torch.bfloat16 if autocast else torch.float32}
