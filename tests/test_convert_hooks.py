"""What forward hooks of a converted block see: one call of its place in the model, whatever the solve takes."""

import copy
import pickle
import threading

import pytest
import torch
from replays import Recorder
from stacks import MLP, Causal, DynamicCache, encoder, mlps
from torch import nn

from tritondeq import Picard, backend, cuda_graphs, to_equilibrium


class Seen(list):
    """What a hook was called with."""

    def __call__(self, module, args, *rest):
        self.append((args[0], rest[-1]))

    @property
    def outputs(self):
        return [out for _, out in self]


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("unroll", [None, 4])
@pytest.mark.parametrize("training", [True, False])
def test_one_call_each_time(unroll, training):
    layer = to_equilibrium(mlps(5, dropout=0.2), prelude=1, coda=1, unroll=unroll).train(training)
    block, x = layer.deq.cell.block, torch.randn(4, 6).double()
    torch.manual_seed(1)
    plain = layer(x)
    whole, inner, at_layer = Seen(), Seen(), Seen()
    block.register_forward_hook(whole, with_kwargs=True, always_call=True)
    block.up.register_forward_hook(inner)
    layer.deq.register_forward_hook(at_layer)
    for calls in (1, 2):
        torch.manual_seed(1)
        assert torch.equal(layer(x), plain)
        assert len(whole) == len(inner) == calls
    assert all(torch.equal(a, b) for a, b in zip(whole[1], at_layer[1], strict=True)), "as the layer, from x to z"
    h, z = at_layer[1]
    torch.testing.assert_close(inner.outputs[1], block.up(block.norm((h + z) / 2)))
    layer(x).sum().backward()
    assert len(whole) == 3, "none in the backward pass"
    with torch.no_grad():
        layer.deq.cell(z, layer.deq.cell.inject(h))
    assert len(whole) == 3


def test_what_hooks_take_has_gradients():
    layer = to_equilibrium(mlps(4), prelude=1, tol=1e-10, max_steps=100)
    whole, inner = Seen(), Seen()
    layer.deq.cell.block.register_forward_hook(whole)
    layer.deq.cell.block.up.register_forward_hook(inner)
    x = torch.randn(4, 6).double().requires_grad_()
    runs = []
    for steps in (None, 60):
        layer.unrolled(steps)(x)
        loss = whole.outputs[-1].sin().sum() + inner.outputs[-1].square().sum()
        runs.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    assert len(whole) == len(inner) == 2
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # the compiler's
@pytest.mark.parametrize("compiled", [False, pytest.param({"backend": "eager"}, marks=pytest.mark.slow)])
def test_further_outputs(compiled):
    layer = to_equilibrium(nn.ModuleList([Causal()]), compile=compiled, solver=Picard())
    whole, x = Seen(), torch.randn(2, 5, 8)
    layer.deq.cell.block.register_forward_hook(whole)
    for weights in (True, False, True):
        z = layer(x, weights=weights)
        seen = whole.pop()
        assert not whole and seen[0] is x and type(seen[1]) is type(z)
        torch.testing.assert_close(seen[1], z)


def test_captured(monkeypatch):
    """A replay notes nothing of the block: further outputs and what hooks see are those of this call all the same."""
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    options = {"tol": 1e-4, "max_steps": 20}
    plain = to_equilibrium(nn.ModuleList([Causal()]), **options)
    layer, seen = to_equilibrium(nn.ModuleList([Causal()]), cell=plain.deq.cell.block, graph=True, **options), Seen()
    plain.deq.cell.block.register_forward_hook(seen)
    for _ in range(3):
        x = torch.randn(2, 5, 8)
        with backend("triton"):
            for weights in (True, False):
                z = layer(x, weights=weights)
                torch.testing.assert_close(z, plain(x, weights=weights), rtol=1e-3, atol=1e-3)
    assert len(layer.deq._graphs.solves) == 2 and len(seen) == 12, "two layers have the block"
    torch.testing.assert_close(seen.outputs[-2:], [z, z], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("watch", [False, True])
def test_a_hook_that_changes_the_block_is_part_of_the_equation(watch):
    stack = nn.ModuleList(Causal(layer_idx=i) for i in range(4)).double()
    layer = to_equilibrium(stack, prelude=1, tol=1e-9, max_steps=100).eval()
    want, block, seen = copy.deepcopy(layer), layer.deq.cell.block, Seen()
    with torch.no_grad():
        for parameter in want.deq.cell.block.out.parameters():
            parameter.mul_(0.5)
    if watch:
        block.out.register_forward_hook(seen)
    handle = block.out.register_forward_hook(lambda module, args, out: out / 2)
    x, caches = torch.randn(2, 6, 8).double(), [DynamicCache(), DynamicCache()]
    for part in x.split([3, 3], dim=1):
        outs = [net(part, cache=cache) for net, cache in zip((layer, want), caches, strict=True)]
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(*(c.layers[1].keys for c in caches), rtol=1e-10, atol=1e-11)
    seen.clear()
    outs = [torch.autograd.grad(net(x).sin().sum(), list(net.parameters())[:-2]) for net in (layer, want)]
    torch.testing.assert_close(*outs, rtol=1e-8, atol=1e-10)
    assert len(seen) == watch
    handle.remove()
    assert (layer(x) - want(x)).abs().max() > 1e-3


def test_within_another_equilibrium():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.scale = to_equilibrium(mlps(3)), 0.5

        def forward(self, h):
            return h + self.scale * self.inside(h).tanh()

    layer, seen = to_equilibrium(nn.ModuleList([Outer()])), Seen()
    layer.deq.cell.block.inside.deq.cell.block.register_forward_hook(seen)
    layer(torch.randn(3, 6).double())
    assert layer.last.steps.max() > 1 and len(seen) == 1


@torch.no_grad()
def test_hooks_of_copies():
    layer, x = to_equilibrium(nn.ModuleList([MLP(dropout=0.1)])), torch.randn(3, 6)
    layer.deq.cell.block.register_forward_hook(Seen())
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(x)
        (hook,) = twin.deq.cell.block._forward_hooks.values()
        assert len(hook.hook) == 2


def test_the_block_alone_in_another_thread_meanwhile():
    layer, x, seen = to_equilibrium(nn.ModuleList([MLP()])), torch.randn(3, 6), Seen()
    block, other = layer.deq.cell.block, torch.randn(1, 6)
    block.register_forward_hook(seen)
    started = []

    def meanwhile(module, args):
        if not started:
            started.append(True)
            in_thread(lambda: block(other))

    block.up.register_forward_pre_hook(meanwhile)
    z = layer(x)
    assert [a.shape[0] for a, _ in seen] == [1, 3]
    torch.testing.assert_close(seen.outputs[1], z)


@pytest.mark.parametrize("batched_first", [True, False])
def test_threads_with_inputs_of_other_kinds(monkeypatch, batched_first):
    """Each call has the shape of outcomes, and the further outputs, that it has alone."""
    net, x = encoder(), torch.randn(3, 7, 8).double()
    mine, other = (x, x[0]) if batched_first else (x[0], x)
    cell, started = net.layers.deq.cell, []

    def initial(x, injection):
        if not started:
            started.append(True)
            in_thread(lambda: net(other))
        return injection.x

    monkeypatch.setattr(cell, "initial", initial)
    net(mine)
    assert net.layers.last.steps.shape == mine.shape[:-2]


@pytest.mark.parametrize("weights", [True, False])
def test_threads_that_ask_for_other_outputs(weights):
    layer, x, started = to_equilibrium(nn.ModuleList([Causal()])), torch.randn(2, 5, 8), []

    def meanwhile(*_):
        if not started:
            started.append(True)
            in_thread(lambda: layer(x, weights=not weights))
            started.clear()

    layer.deq.cell.register_forward_hook(meanwhile)
    assert isinstance(layer(x, weights=weights), tuple) == weights
