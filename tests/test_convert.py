"""Stacks of residual blocks as equilibria: the equation, its gradients, arguments, further outputs and caches."""

import pytest
import torch
from stacks import MLP, TIGHT, Causal, DynamicCache, DynamicLayer, assert_as_the_loop, encoder, images, mlps, rms
from torch import nn

from tritondeq import Implicit, to_equilibrium


@pytest.mark.parametrize(("cell", "norm"), [("mean", nn.LayerNorm), ("first", lambda width: nn.Identity())])
def test_rows(cell, norm):
    stack = mlps(norm=norm)
    layer = to_equilibrium(stack, cell=cell, prelude=1, coda=1, gain=0.8, **TIGHT)
    x = torch.randn(5, 3, 6).double()
    assert_as_the_loop(layer, layer, x)
    h = layer[0](x)
    z, block = layer[1](h), layer.deq.cell.block
    y = (h + z) / 2
    v = h + 0.8 * (block(y) - y)
    torch.testing.assert_close(z, v * rms(h) / rms(v), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer(x), stack[-1](z), rtol=1e-12, atol=1e-12)
    w = y + 0.4 * (block(y) - y)  # the block with an outer norm has the same equilibrium
    torch.testing.assert_close(z, w * rms(h) / rms(w), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("batch_norm", ["group", "frozen"])
def test_images(batch_norm):
    layer, x = images(batch_norm=batch_norm, **TIGHT)
    x = x.contiguous(memory_format=torch.channels_last)
    layer[0].eval()  # the block that stays explicit keeps its BatchNorm
    assert_as_the_loop(layer, layer, x)
    h = layer[0](x)
    z = layer[1](h)
    y = (h + z) / 2
    v = h + layer.deq.cell.block(y) - y
    torch.testing.assert_close(z, v * rms(h, (1, 2, 3)) / rms(v, (1, 2, 3)), rtol=1e-10, atol=1e-11)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(layer(x), alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("norm_first", "batch_first"), [(True, True), (False, False)])
def test_encoders(norm_first, batch_first):
    net = encoder(norm_first, batch_first, **TIGHT)
    x = torch.randn(3, 7, 8).double()
    mask = torch.randn(7 if batch_first else 3, 7 if batch_first else 3).double()
    assert_as_the_loop(net, net.layers, x, mask)
    assert net.layers.last.steps.shape == ((3,) if batch_first else ())
    assert net(x[0]).shape == x[0].shape and net.layers.last.steps.shape == ()  # tokens of one sample
    padding = torch.zeros(x.shape[:2] if batch_first else x.shape[:2][::-1], dtype=torch.bool)
    padding[0, -1] = True
    for mode in (True, False):
        net.train(mode)
        a, b = net(x, src_key_padding_mask=padding), net(x)
        assert (a - b).abs().max() > 1e-3
        with torch.no_grad():  # torch's fused path, in eval
            torch.testing.assert_close(net(x, src_key_padding_mask=padding), a, rtol=1e-6, atol=1e-7)


def test_arguments_reach_the_block_and_get_gradients():
    stack = nn.ModuleList(Causal(layer_idx=i) for i in range(4)).double()
    layer = to_equilibrium(stack, prelude=1, **TIGHT)
    x, bias = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 5).double()
    assert_as_the_loop(layer, layer, x, bias)

    def looped(x, bias):  # as a model with the list does
        for block in layer:
            x = block(x, bias)
        return x

    torch.testing.assert_close(looped(x, bias), layer(x, bias))
    assert (layer(x, bias) - layer(x, bias=0 * bias)).abs().max() > 1e-2


def test_further_outputs_are_those_at_the_solution():
    layer = to_equilibrium(nn.ModuleList([Causal().double()]), **TIGHT)
    x = torch.randn(2, 5, 8).double().requires_grad_()
    z, a = layer(x, weights=True)
    assert torch.equal(z, layer(x))
    again = layer.deq.cell.block((x + z) / 2, weights=True)[1]
    torch.testing.assert_close(a, again, rtol=1e-10, atol=1e-11)
    (grad,) = torch.autograd.grad(a.square().sum(), x)
    layer.unrolled(150)
    (want,) = torch.autograd.grad(layer(x, weights=True)[1].square().sum(), x)
    torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)


def test_a_cache_is_filled_once_at_the_solution():
    stack = nn.ModuleList(Causal(layer_idx=i) for i in range(4)).double()
    layer = to_equilibrium(stack, prelude=1, coda=1, **TIGHT).eval()
    x, cache = torch.randn(2, 6, 8).double(), DynamicCache()
    whole = layer(x)
    parts = [layer(part, cache=cache) for part in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
    assert [c.keys is None or c.keys.shape[2] for c in cache.layers] == [6, 6, True, 6]
    with torch.no_grad():
        positional = DynamicCache()
        to_equilibrium(stack[1:2])(x, None, cache=positional)
        assert positional.layers[1].keys.shape[2] == 6


def test_caches_that_are_refused():
    class StaticLayer(DynamicLayer):
        pass

    x, empty = torch.randn(2, 3, 8), DynamicCache()
    empty.layers = None
    for cache, options, message in (
        (DynamicCache(kind=StaticLayer), {}, "DynamicCache of transformers.*StaticLayer.*use_cache=False"),
        (empty, {}, "no list of layers"),
        (DynamicCache(), {"graph": True}, "graph=True takes no cache"),
    ):
        with pytest.raises(ValueError, match=message):
            to_equilibrium(nn.ModuleList([Causal()]), **options)(x, cache=cache)


class Adapter(nn.Linear):
    def forward(self, z, x):
        return super().forward(torch.cat([z, x], -1))


@pytest.mark.parametrize(
    "options",
    [{"norm": None, "gain": 0.7}, {"norm": nn.LayerNorm(6)}, {"norm": "sample"}, {"injection": Adapter(12, 6)}],
)
def test_norms_and_injections(options):
    x = torch.randn(4, 3, 6).double()
    layer = to_equilibrium(mlps(), **options, **TIGHT).double()
    assert_as_the_loop(layer, layer, x)
    cell, z = layer.deq.cell, layer(x)
    y = cell.injection(z, x) if "injection" in options else (x + z) / 2
    v = x + options.get("gain", 1.0) * (cell.block(y) - y)
    dims, norm = (1, 2) if options.get("norm") == "sample" else -1, options.get("norm", "outer")
    want = v if norm is None else cell.norm(v) if isinstance(norm, nn.Module) else v * rms(x, dims) / rms(v, dims)
    torch.testing.assert_close(z, want, rtol=1e-10, atol=1e-11)


def test_an_image_of_tokens_is_normed_by_token():
    """As no convolution takes it: channels last."""
    x = torch.randn(2, 3, 3, 6).double()
    torch.testing.assert_close(rms(to_equilibrium(mlps(), **TIGHT)(x)), rms(x))


@pytest.mark.slow
def test_second_derivatives():
    layer = to_equilibrium(mlps(3, 2), adjoint=Implicit(), **TIGHT)
    x = torch.randn(2, 2).double().requires_grad_()
    weight = layer.deq.cell.block.up.weight

    def f(x, w):
        return torch.func.functional_call(layer, {"0.cell.block.up.weight": w}, (x,))

    assert torch.autograd.gradcheck(f, (x, weight)) and torch.autograd.gradgradcheck(f, (x, weight))


def test_zeros_stay_zeros():
    """Padding by zeros has an rms of 0."""
    x = torch.randn(2, 3, 6)
    x[:, 1] = 0
    layer = to_equilibrium(nn.Sequential(MLP()))
    z = layer(x.requires_grad_())
    z.sum().backward()
    assert z[:, 1].abs().max() < 1e-5 and x.grad.isfinite().all() and layer(x[:0]).shape == (0, 3, 6)
