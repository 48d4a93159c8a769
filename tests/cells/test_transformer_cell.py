"""The transformer cell: its equations written out, gradients, padding, positions."""

import pytest
import torch
from replays import Recorder

import tritondeq as tdeq
from tritondeq import DEQ, Status, cuda_graphs
from tritondeq.cells import Transformer
from tritondeq.cells.tokens import attention_mask

WIRINGS = ["outer", "damped", "head"]
ACTIVATIONS = {
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h.clamp_min(0),
    "silu": lambda h: h / (1 + torch.exp(-h)),
}
D, T, B = 12, 5, 3


def double(**options):
    """A cell in float64, and norms and scales that are not all alike."""
    cell = Transformer(D, 7, **({"heads": 2, "hidden": 10} | options)).double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            if p.ndim == 1 or name == "scales":
                p += 0.2 * torch.randn_like(p)
    return cell


def lengths(*counts):
    return torch.arange(T) < torch.tensor(counts).unsqueeze(1)


def rms(h, norm):
    return h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6) * norm.weight


def linear(h, layer):
    return h @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def rotated(vector, position, base):
    """The pairs (i, i + width / 2) of one vector, as complex numbers."""
    half = len(vector) // 2
    pairs = torch.complex(vector[:half], vector[half:])
    turn = torch.exp(1j * position * base ** (-torch.arange(half, dtype=torch.float64) / half))
    return torch.cat([(pairs * turn).real, (pairs * turn).imag])


def attention(cell, h, visible):
    """Token by token and head by head; `visible` [T, T]."""
    width, tokens = D // cell.heads, len(h)
    q, k, v = linear(h, cell.qkv).split([D, cell.kv_heads * width, cell.kv_heads * width], dim=-1)
    out = torch.zeros(tokens, D, dtype=h.dtype)
    for head in range(cell.heads):
        mine = slice(head * width, (head + 1) * width)
        theirs = head // (cell.heads // cell.kv_heads)
        theirs = slice(theirs * width, (theirs + 1) * width)
        for i in range(tokens):
            others = [j for j in range(tokens) if visible[i, j]]
            turn = (lambda t, at: t) if cell.rotary is None else (lambda t, at: rotated(t, at, cell.rotary))
            scores = torch.stack([turn(q[i, mine], i) @ turn(k[j, theirs], j) for j in others]) / width**0.5
            weights = scores.exp() / scores.exp().sum()
            out[i, mine] = sum(w * v[j, theirs] for w, j in zip(weights, others, strict=True))
    return linear(out, cell.output)


def feed_forward(cell, h):
    if cell.activation == "swiglu":
        gate, value = linear(h, cell.up).split([cell.hidden] * 2, dim=-1)
        return linear(ACTIVATIONS["silu"](gate) * value, cell.down)
    return linear(ACTIVATIONS[cell.activation](linear(h, cell.up)), cell.down)


@torch.no_grad()
def reference(cell, z, x, real):
    """f(z) of one sample."""
    visible = real.expand(len(z), -1)
    visible = visible & torch.ones_like(visible).tril() if cell.causal else visible
    u = rms(linear(x, cell.input), cell.input_norm)
    a = torch.exp(-torch.exp(cell.log_decay)) if cell.decay else torch.ones(D, dtype=z.dtype)
    y = a * z + (cell.gain if cell.decay else 1) * u
    if cell.wiring == "damped":
        h = rms(y + attention(cell, y, visible), cell.attention_norm)
        return (1 - cell.damping) * z + cell.damping * rms(h + feed_forward(cell, h), cell.ffn_norm)
    first, second = (1, 1) if cell.wiring == "outer" else cell.gamma_max / (1 + torch.exp(-cell.scales))
    h = y + first * attention(cell, rms(y, cell.attention_norm), visible)
    h = h + second * feed_forward(cell, rms(h, cell.ffn_norm))
    return rms(h, cell.outer_norm) if cell.wiring == "outer" else h - a * z


OPTIONS = [
    {"wiring": "outer"},
    {"wiring": "damped", "causal": True, "activation": "gelu", "bias": True},
    {"wiring": "head", "rotary": 100.0, "activation": "relu", "gamma_max": 0.9},
    {"wiring": "outer", "causal": True, "rotary": 100.0, "heads": 6, "kv_heads": 2, "decay": True},
    {"wiring": "damped", "heads": 6, "kv_heads": 1, "decay": True, "damping": 0.5, "activation": "silu"},
    {"wiring": "head", "causal": True, "heads": 3, "kv_heads": 1, "decay": True, "bias": True},
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equation(options, padded):
    cell = double(**options)
    x, z = torch.randn(B, T, 7).double(), torch.randn(B, T, D).double()
    real = lengths(5, 3, 1) if padded else torch.ones(B, T, dtype=torch.bool)
    value = cell(z, cell.inject((x, real) if padded else x))
    for i in range(B):
        n = int(real[i].sum())
        torch.testing.assert_close(
            value[i, :n], reference(cell, z[i, :n], x[i, :n], real[i, :n]), rtol=1e-11, atol=1e-12
        )
    solution = DEQ(cell, tol=1e-12, max_steps=300).solve((x, real) if padded else x)
    assert solution.converged.all() and solution.steps.min() > 2
    for i in range(B):
        z, n = solution.value[i], int(real[i].sum())
        torch.testing.assert_close(z[:n], reference(cell, z[:n], x[i, :n], real[i, :n]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("features, tokens", [(16, 1), (16, 100), (64, 17), (256, 8)])
def test_contractive_at_initialisation(features, tokens, wiring, decay):
    activation, causal = ("gelu", False) if decay else ("swiglu", True)
    cell = Transformer(features, heads=4, wiring=wiring, decay=decay, activation=activation, causal=causal, rotary=1e4)
    x = torch.randn(2, tokens, features)
    layer = DEQ(cell, tol=1e-3)
    with torch.no_grad():
        z = layer(x)
    assert layer.last.converged.all() and layer.last.steps.max() <= 10
    assert tdeq.spectral_radius(layer, z, x).max() < {"outer": 0.6, "damped": 0.7, "head": 0.15}[wiring]


@torch.no_grad()
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "heads": 4, "kv_heads": 2}, {"rotary": 100.0}], ids=str)
def test_padding_changes_nothing(options, side, wiring):
    """Values, steps and residuals of real tokens are those of the sample alone, whatever the padding holds."""
    cell = double(wiring=wiring, **options)
    layer, counts = DEQ(cell, tol=1e-6, max_steps=100), (5, 3, 1)
    real = lengths(*counts) if side == "right" else lengths(*counts).flip(1)
    x = torch.randn(B, T, 7).double()
    for junk in (0.0, 1e3, float("nan")):
        together = layer.solve((x.masked_fill(~real.unsqueeze(-1), junk), real))
        for i in range(B):
            alone = layer.solve(x[i : i + 1, real[i]])
            assert alone.steps[0] == together.steps[i] and alone.status[0] == together.status[i] == Status.CONVERGED
            torch.testing.assert_close(together.value[i, real[i]], alone.value[0], rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(together.residual[i], alone.residual[0], rtol=1e-6, atol=1e-12)


def test_padding_has_no_gradient_and_no_nan():
    layer = DEQ(double(bias=True))
    x = torch.randn(B, T, 7).double()
    real = lengths(5, 3, 0)
    x = x.masked_fill(~real.unsqueeze(-1), float("nan")).requires_grad_()
    layer((x, real))[real].sum().backward()
    assert x.grad[~real].eq(0).all() and x.grad[real].ne(0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_no_token_is_left_without_any_to_attend_to():
    """Not all of torch's attention gives such tokens a finite value and gradient."""
    real = lengths(5, 2, 0)
    visible = attention_mask(0, T, real, True, real.device).squeeze(1)
    others = ~torch.eye(T, dtype=torch.bool)
    assert visible.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(visible & others, others & real.unsqueeze(1) & torch.ones(T, T, dtype=torch.bool).tril())
    free = attention_mask(0, T, real, False, real.device)[:, 0, 0]
    assert torch.equal(free[:2], real[:2]) and free[2].all()


def test_a_mask_of_the_caller_is_padding():
    layer = DEQ(double(), tol=1e-6)
    x, real = torch.randn(B, T, 7).double(), lengths(5, 3, 1)
    one, two = layer.solve((x, real)), layer.solve(x, mask=real)
    assert torch.equal(one.value, two.value) and torch.equal(one.residual, two.residual)


@torch.no_grad()
@pytest.mark.parametrize("wiring", WIRINGS)
def test_later_tokens_change_nothing_before(wiring):
    """To the tolerance of a solve; in one evaluation, to rounding."""
    cell = double(wiring=wiring, causal=True, rotary=100.0)
    layer = DEQ(cell, tol=1e-12, max_steps=300)
    x = torch.randn(B, T, 7).double()
    other = x.clone()
    other[:, 3:] += 1
    a, b = layer(x), layer(other)
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=1e-9, atol=1e-10)
    assert (a[:, 3:] - b[:, 3:]).abs().amin(dim=1).max() > 1e-2
    free = DEQ(double(wiring=wiring), tol=1e-12, max_steps=300)
    assert (free(x) - free(other))[:, :3].abs().max() > 1e-4


@torch.no_grad()
def test_rotary_positions_are_relative():
    """Attention does not see where a sequence begins, and does see its order."""
    cell = double(causal=True, rotary=100.0)
    x = torch.randn(1, T, 7).double()
    layer = DEQ(cell, tol=1e-12, max_steps=300)
    shifted = torch.cat([torch.randn(1, 4, 7).double(), x], dim=1)
    real = torch.arange(T + 4).unsqueeze(0) >= 4
    torch.testing.assert_close(layer((shifted, real))[:, 4:], layer(x), rtol=1e-9, atol=1e-10)
    order = torch.tensor([1, 0, 2, 3, 4])
    for rotary, same in ((100.0, False), (None, True)):
        cell = double(rotary=rotary)
        layer = DEQ(cell, tol=1e-12, max_steps=300)
        assert torch.allclose(layer(x)[:, order], layer(x[:, order]), rtol=1e-9, atol=1e-10) == same


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_residuals_of_tokens(padded):
    cell = double()
    x, real = torch.randn(B, T, 7).double(), lengths(5, 3, 1)
    x = (x, real) if padded else x
    solution = DEQ(cell, max_steps=3).solve(x)
    injection = cell.inject(x)
    residuals, y = cell.residuals(solution.value, injection), cell(solution.value, injection)
    expected = (y - solution.value).norm(dim=-1) / y.norm(dim=-1)
    if padded:
        assert residuals[~real].eq(0).all()
        expected, y = expected * real, y * real.unsqueeze(-1)
    torch.testing.assert_close(residuals, expected)
    norms = y.norm(dim=-1)
    of_samples = (residuals * norms).norm(dim=-1) / norms.norm(dim=-1)
    torch.testing.assert_close(of_samples, solution.residual, rtol=1e-9, atol=1e-12)


@pytest.mark.kernels
def test_captured_with_padding(monkeypatch):
    """The work itself in place of a replay: other inputs and lengths, nothing captured anew."""
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell = Transformer(D, heads=6, kv_heads=2, wiring="head", causal=True, rotary=1e4, decay=True, dropout=0.2)
    layers = DEQ(cell, graph=True, tol=1e-5), DEQ(cell, tol=1e-5)
    for counts in ((5, 3, 4), (1, 5, 2)):
        x, real, results = torch.randn(B, T, D), lengths(*counts), []
        for layer in layers:
            torch.manual_seed(1)
            with tdeq.backend("triton"):
                z = layer((x, real))
                results.append([z[real], *torch.autograd.grad(z[real].sin().sum(), list(cell.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(layers[0]._graphs.solves) == 1 and layers[0].last.route is tdeq.Route.GRAPH


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_few_tokens(shape, padded):
    x = torch.randn(*shape, D)
    for causal in (False, True):
        layer = DEQ(Transformer(D, heads=6, kv_heads=2, rotary=1e4, causal=causal))
        z = layer((x, torch.ones(shape, dtype=torch.bool)) if padded else x)
        assert z.shape == x.shape and layer.last.converged.all() and layer.last.steps.shape == shape[:1]
