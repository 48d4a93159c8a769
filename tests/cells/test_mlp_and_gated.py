"""The MLP and the gated cell: equations, gradients, options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ
from tritondeq.cells import MLP, Gated, Monotone

MLPS = [(form, activation) for form in ("post", "pre") for activation in ("relu", "gelu", "silu", "swiglu")]
MAKE = {
    f"{form} {act}": lambda form=form, act=act, **o: MLP(6, 4, form=form, activation=act, **o) for form, act in MLPS
}
MAKE |= {"no bias": lambda **o: MLP(6, 4, hidden=3, bias=False, **o), "gated": lambda **o: Gated(6, 4, **o)}
MAKE |= {"gated, no bias": lambda **o: Gated(6, 4, bias=False, **o)}


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def equation(cell, z, x):
    """f as the docstrings have it."""
    w = dict(cell.named_parameters())

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    if isinstance(cell, Gated):
        ur, us, uc = linear("input", x).split(cell.features, -1)
        wr, ws, wc = cell.weight_r, cell.weight_s, cell.weight_c
        r, s = torch.sigmoid(z @ wr.T + ur), 0.5 + torch.sigmoid(z @ ws.T + us) / 2
        return (1 - s) * z + s * torch.tanh((r * z) @ wc.T + uc)
    u = rms(linear("input", x)) * w["norm.weight"]
    n = z + u if cell.form == "post" else rms(z)
    if cell.activation == "swiglu":
        h = F.silu(linear("gate", n)) * linear("up", n)
    else:
        h = getattr(F, cell.activation)(linear("up", n))
    out = u + linear("down", h)
    return rms(z + out) * w["outer"] if cell.form == "post" else torch.sigmoid(w["decay"]) * z + out


@pytest.fixture(params=MAKE)
def cell(request):
    cell = MAKE[request.param](dtype=torch.float64)
    with torch.no_grad():
        for p in cell.parameters():  # no parameter is at a special value
            p += 0.05 * torch.randn_like(p)
    return cell


def test_the_equation_and_its_gradients(cell):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = DEQ(cell, tol=1e-13, max_steps=500)
    z = layer(x)
    assert z.shape == (2, 3, 6) and layer.last.converged.all()
    torch.testing.assert_close(z, equation(cell, z, x), rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(lambda x: layer(x), x)


@pytest.mark.kernels
def test_the_tolerance_decides_how_many_terms_must_fit():
    """32,768 weights: two terms of them fit, three do not."""
    with tdeq.backend("triton"), torch.no_grad():
        for tol, route in ((1e-3, tdeq.Route.KERNEL), (1e-6, tdeq.Route.FUSED)):
            layer = DEQ(MLP(64, hidden=256), tol=tol, max_steps=2)
            layer(torch.randn(2, 64))
            assert layer.last.route is route
        assert "196608 bytes of weights in 3 bf16 terms" in layer.last.why


def test_the_gate_has_no_gradient_at_an_equilibrium():
    cell = Gated(6, dtype=torch.float64)
    z = DEQ(cell, tol=1e-13, max_steps=500)(torch.randn(5, 6, dtype=torch.float64))
    grads = torch.autograd.grad(z.sum(), [cell.weight_s, cell.weight_r])
    assert grads[0].abs().max() < 1e-11 < 1e-3 < grads[1].abs().max()


def test_contraction_of_the_gated_cell_holds():
    cell = Gated(8, contraction=0.9, dtype=torch.float64)
    with torch.no_grad():
        cell.parametrizations.weight_c.original.mul_(20)
        cell.parametrizations.weight_r.original.mul_(20)
    layer, x = DEQ(cell, tol=1e-9, max_steps=1000), torch.randn(50, 8, dtype=torch.float64)
    z = layer(x)
    u, w = cell.inject(x)
    starts = torch.rand(50, 8, dtype=torch.float64) * 2 - 1
    assert layer.last.converged.all() and torch.allclose(layer(x, starts), z, atol=1e-7)
    gru = torch.func.vmap(torch.func.jacrev(lambda z, u: tdeq.kernels.formulas.gru(w, u.chunk(3), z[None])[2][0]))
    norms = torch.linalg.matrix_norm(gru(starts, u), 2)
    assert norms.max() <= 0.9 and torch.linalg.matrix_norm(cell.weight_c, 2) > 0.7


class LowRank(nn.Module):
    """A linear layer and a trainable product of low rank beside it, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(0.2 * torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(0.2 * torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("form", ["post", "pre"])
@pytest.mark.parametrize("names", [("up",), ("down",), ("up", "gate", "down")], ids="-".join)
def test_layers_that_were_replaced_are_called(form, names):
    """The solution and its gradients are those of the cell into which the product is merged."""
    cell = MLP(6, 4, form=form, activation="swiglu", dtype=torch.float64)
    merged = copy.deepcopy(cell)
    for name in names:
        adapter = LowRank(getattr(cell, name))
        setattr(cell, name, adapter)
        with torch.no_grad():
            getattr(merged, name).weight.add_(adapter.b @ adapter.a)
    x, layers = torch.randn(3, 4, dtype=torch.float64), [DEQ(c, tol=1e-13, max_steps=500) for c in (cell, merged)]
    values = [layer(x) for layer in layers]
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)
    for z in values:
        z.square().sum().backward()
    for name in names:
        adapter, g = getattr(cell, name), getattr(merged, name).weight.grad
        torch.testing.assert_close((adapter.b.grad, adapter.a.grad), (g @ adapter.a.T, adapter.b.T @ g))


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["post", "pre"])
def test_hooks_on_layers_are_called_by_either_backend(form, device):
    cell, x = MLP(6, 4, form=form).to(device), torch.randn(3, 4, device=device)
    cell.up.register_forward_hook(lambda layer, args, out: 0.5 * out)
    halved = copy.deepcopy(cell)
    halved.up._forward_hooks.clear()
    with torch.no_grad():
        for p in halved.up.parameters():
            p *= 0.5
    found = [DEQ(halved, tol=1e-5)(x)]
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            found.append(DEQ(cell, tol=1e-5)(x))
            torch.testing.assert_close(found[-1], found[0], rtol=0, atol=1e-4)


def test_a_bound_is_not_made_of_an_input_layer_that_was_replaced():
    cell = Monotone(4)
    assert cell.lipschitz() > 0
    cell.input = LowRank(cell.input)
    with pytest.raises(ValueError, match="the norm of input is not known.*LowRank"):
        cell.lipschitz()
