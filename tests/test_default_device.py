"""A default device that is not that of the tensors changes nothing: "meta" stands in for a GPU, and has no values."""

import types

import pytest
import torch
import torch._dynamo  # by torch 2.6 while the default device has values, for it computes some
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Phantom, Picard, Unrolled, cells, guards, loop

CELLS = {
    "affine": (lambda **o: cells.Affine(6, **o), (3, 6)),
    "affine, bounded": (lambda **o: cells.Affine(6, contraction=0.8, **o), (3, 6)),
    "monotone": (lambda **o: cells.Monotone(6, **o), (3, 6)),
    "mlp": (lambda **o: cells.MLP(6, **o), (3, 6)),
    "mlp, pre-norm": (lambda **o: cells.MLP(6, form="pre", activation="swiglu", **o), (3, 6)),
    "gated": (lambda **o: cells.Gated(6, contraction=0.8, **o), (3, 6)),
    "transformer": (lambda **o: cells.Transformer(8, heads=2, causal=True, **o), (2, 3, 8)),
    "transformer, decay": (lambda **o: cells.Transformer(8, heads=2, wiring="head", decay=True, **o), (2, 3, 8)),
    "conv": (lambda **o: cells.Conv(8, **o), (2, 8, 4, 4)),
}


@pytest.fixture(autouse=True)
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def normal(*shape):
    return torch.randn(shape, device="cpu")


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_made_where_they_are_asked_for(name):
    make, _ = CELLS[name]
    assert {p.device.type for p in make().parameters()} == {"meta"}
    cell = make(device="cpu")
    assert {p.device.type for p in cell.parameters()} == {"cpu"}
    assert all(p.isfinite().all() for p in cell.parameters())


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CELLS)
def test_solves_and_gradients(name, backend):
    make, shape = CELLS[name]
    cell = make(device="cpu")
    with tdeq.backend(backend):
        for solver in (Anderson(), Broyden()) if name != "monotone" else (None, tdeq.ForwardBackward()):
            layer, x = DEQ(cell, solver=solver, tol=1e-3, max_steps=100), normal(*shape).requires_grad_()
            z = layer(x)
            z.square().sum().backward()
            assert x.grad.isfinite().all() and z.device.type == "cpu" and layer.last.converged.all()


ADJOINTS = [Implicit(), Implicit(reuse=True), Phantom(3, 0.8), Unrolled(4), Unrolled(4, checkpoint=True)]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_adjoints_and_options(adjoint):
    solver = Broyden() if adjoint.exact else Picard()
    layer = DEQ(cells.Affine(6, device="cpu"), solver=solver, adjoint=adjoint, trace=True)
    x, mask = normal(3, 6).requires_grad_(), torch.ones(3, 6, dtype=torch.bool, device="cpu")
    z = layer(x, mask=mask)
    (g,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
    if adjoint.exact or isinstance(adjoint, Unrolled):
        torch.autograd.grad(g.square().sum(), list(layer.parameters()))


def test_a_function_with_dropout_and_autocast():
    block = nn.Sequential(nn.Linear(6, 6, device="cpu"), tdeq.FixedDropout(0.5), nn.Tanh())
    x = normal(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = tdeq.fixed_point(lambda z: {"a": 0.3 * block(z["a"]) + x}, {"a": x})
    solution.value["a"].sum().backward()
    assert block[0].weight.grad.isfinite().all()


class Constant(nn.Module):
    def forward(self, z, x):
        return 0.5 * z + x.view(-1, 1)


def test_what_looks_inside():
    layer, x = DEQ(cells.Affine(6, device="cpu")), normal(4, 6)
    z = layer(x)
    assert tdeq.spectral_radius(layer, z, x).isfinite().all()
    tdeq.jacobian_penalty(layer, z, x).mean().backward()
    assert "all is well" in str(tdeq.diagnose(layer, x))
    number = DEQ(Constant(), adjoint=Phantom(3, 0.8))  # nothing in it has a gradient
    z0, index = torch.zeros(4, 6, device="cpu"), torch.ones(4, dtype=torch.long, device="cpu")
    assert tdeq.diagnose(number, index, z0=z0).solution.converged.all()
    watch = tdeq.Watch(layer, every=1, radius=True)
    layer(x).sum().backward()
    assert watch.step()["CONVERGED"] == 1


def test_tokens_one_by_one():
    layer = DEQ(cells.Transformer(8, heads=2, causal=True, rotary=100.0, device="cpu"), tol=1e-3)
    x, cache = normal(2, 5, 8), None
    for at in range(5):
        z, cache = layer.step(x[:, at : at + 1], cache)
    torch.testing.assert_close(z[:, 0], layer(x)[:, -1], rtol=1e-2, atol=1e-2)


def test_a_stack_and_an_unrolled_layer():
    blocks = nn.Sequential(*[nn.Linear(6, 6, device="cpu") for _ in range(4)])
    model = tdeq.to_equilibrium(blocks, prelude=1, coda=1, adjoint=Phantom(3, 0.8))
    model(normal(2, 6)).sum().backward()
    DEQ(cells.Affine(6, device="cpu"), solver=Picard()).unrolled(3)(normal(2, 6)).sum().backward()


def test_numbers_that_a_gpu_is_asked_for_lie_on_the_host(monkeypatch):
    """The loop's flag, a warning that is put off, a generator's state: what is asked of torch, without a GPU."""
    monkeypatch.setattr(guards.devices, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "default_generators", (types.SimpleNamespace(get_offset=lambda: 4),))
    assert guards.generator_state(torch.device("cuda", 0)).device.type == "cpu"
    made = []
    for name in ("ones", "empty"):
        real = getattr(torch, name)
        made_by = lambda *a, pin_memory, real=real, **o: made.append(real(*a, **o)) or made[-1]  # noqa: E731
        monkeypatch.setattr(torch, name, made_by)
    loop.Look(torch.device("cuda", 0), None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: types.SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    is_bad = torch.tensor(True, device="cpu")
    bad = types.SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: 1, any=lambda: is_bad)
    monkeypatch.setattr(guards, "_later", guards.deque())
    guards.warn_if(bad, "words")
    assert [tensor.device.type for tensor in made] == ["cpu", "cpu"] and len(guards._later) == 1
