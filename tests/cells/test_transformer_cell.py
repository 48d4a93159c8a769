"""The transformer cell: its equations written out, gradients, masks, positions, and how it trains."""

import copy
import io

import pytest
import torch
from replays import Recorder
from torch import nn
from torch.nn.utils import parametrizations

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Picard, Status, Unrolled, cuda_graphs
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


def attention(cell, h, seen):
    """Token by token and head by head; `seen` [T, T]."""
    width, tokens = D // cell.heads, len(h)
    q, k, v = linear(h, cell.qkv).split([D, cell.kv_heads * width, cell.kv_heads * width], dim=-1)
    out = torch.zeros(tokens, D, dtype=h.dtype)
    for head in range(cell.heads):
        mine = slice(head * width, (head + 1) * width)
        theirs = head // (cell.heads // cell.kv_heads)
        theirs = slice(theirs * width, (theirs + 1) * width)
        for i in range(tokens):
            others = [j for j in range(tokens) if seen[i, j]]
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
    seen = real.expand(len(z), -1)
    seen = seen & torch.ones_like(seen).tril() if cell.causal else seen
    u = rms(linear(x, cell.input), cell.input_norm)
    a = torch.exp(-torch.exp(cell.log_decay)) if cell.decay else torch.ones(D, dtype=z.dtype)
    y = a * z + (cell.gain if cell.decay else 1) * u
    if cell.wiring == "damped":
        h = rms(y + attention(cell, y, seen), cell.attention_norm)
        return (1 - cell.damping) * z + cell.damping * rms(h + feed_forward(cell, h), cell.ffn_norm)
    first, second = (1, 1) if cell.wiring == "outer" else cell.gamma_max / (1 + torch.exp(-cell.scales))
    h = y + first * attention(cell, rms(y, cell.attention_norm), seen)
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    """By finite differences, and as those of many unrolled steps."""
    cell = double(**options)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    layer = DEQ(cell, tol=1e-12, max_steps=200)
    real = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda x: layer((x, real))[real], x, fast_mode=True)
    direction, grads = torch.randn(2, 3, D).double() * real.unsqueeze(-1), []
    for adjoint in (Implicit(), Unrolled(120)):
        z = DEQ(cell, adjoint=adjoint, tol=1e-13, max_steps=400)((x, real))
        grads.append(torch.autograd.grad((z * direction).sum(), [x, *cell.parameters()]))
    for (name, _), a, b in zip([("x", x), *cell.named_parameters()], *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}")
        assert b.abs().sum() > 0


def test_second_derivatives_need_attention_that_has_them():
    cell = double(causal=True)
    x = torch.randn(1, 3, 7, dtype=torch.float64, requires_grad=True)

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), (x, *cell.parameters()))

    exact = DEQ(cell, tol=1e-13, max_steps=400)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for a, b in zip(second(exact), second(DEQ(cell, adjoint=Unrolled(80))), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("features, tokens", [(16, 1), (16, 100), (64, 17), (256, 32), (1024, 3)])
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
    seen = attention_mask(0, T, real, True, real.device).squeeze(1)
    others = ~torch.eye(T, dtype=torch.bool)
    assert seen.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(seen & others, others & real.unsqueeze(1) & torch.ones(T, T, dtype=torch.bool).tril())
    free = attention_mask(0, T, real, False, real.device)[:, 0, 0]
    assert torch.equal(free[:2], real[:2]) and free[2].all()


def test_a_mask_of_the_caller_comes_first():
    layer = DEQ(double(), tol=1e-6)
    x, real = torch.randn(B, T, 7).double(), lengths(5, 3, 1)
    first = torch.zeros(B, T, 1, dtype=torch.bool)
    first[:, 0] = True
    steps = [layer.solve((x, real), mask=mask).residual for mask in (None, real, first)]
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


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


@torch.no_grad()
@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_solver_and_backend(wiring):
    cell = Transformer(D, heads=2, wiring=wiring, causal=True)
    x = torch.randn(B, T, D)
    exact = DEQ(copy.deepcopy(cell).double(), tol=1e-12, max_steps=300)(x.double())
    for solver in (Picard(), Picard(damping=0.8), Anderson(memory=3), Broyden(memory=5)):
        for name in ("torch", "triton"):
            with tdeq.backend(name):
                solution = DEQ(cell, solver=solver, tol=1e-5, max_steps=100).solve(x)
            assert solution.converged.all()
            torch.testing.assert_close(solution.value.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_autocast_keeps_the_state_wide(wiring):
    cell = Transformer(D, heads=6, kv_heads=2, wiring=wiring, rotary=1e4, decay=wiring == "head", bias=True)
    layer, x = DEQ(cell), torch.randn(B, T, D)
    wide = layer(x)
    seen = []
    cell.qkv.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    cell.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, inputs[1].u.dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        z.square().sum().backward()
    assert set(seen) == {torch.bfloat16, (torch.float32,) * 3} and z.dtype == torch.float32
    assert layer.last.residual.max() <= 1e-2
    torch.testing.assert_close(z, wide, rtol=5e-2, atol=5e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in cell.parameters())


@torch.no_grad()
def test_a_cell_of_bfloat16():
    layer = DEQ(Transformer(D, heads=2, rotary=1e4).bfloat16())
    x = torch.randn(B, T, D).bfloat16()
    z = layer(x)
    assert z.dtype == torch.bfloat16 and layer.last.converged.all()
    torch.testing.assert_close(z.float(), layer.float()(x.float()), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_state_dict(wiring):
    cell = double(wiring=wiring, decay=True, bias=True)
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    other = Transformer(D, 7, heads=2, hidden=10, wiring=wiring, decay=True, bias=True).double()
    x = torch.randn(B, T, 7).double()
    assert not torch.equal(DEQ(cell)(x), DEQ(other)(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(DEQ(cell)(x), DEQ(other)(x))


def test_reset_parameters():
    torch.manual_seed(3)
    cell = Transformer(D, heads=2, wiring="head", decay=True)
    with torch.no_grad():
        for p in cell.parameters():
            p.fill_(7.0)
    cell.reset_parameters()
    assert not any((p == 7).any() for p in cell.parameters())
    torch.testing.assert_close(torch.exp(-torch.exp(cell.log_decay)), torch.full((D,), 0.45))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("wiring", WIRINGS)
def test_compiled(wiring):
    torch.compiler.reset()
    cell = Transformer(D, heads=6, kv_heads=2, wiring=wiring, causal=True, rotary=1e4, decay=True)
    x, results = torch.randn(B, T, D), []
    for compile in (False, {"backend": "aot_eager", "fullgraph": True}):
        z = DEQ(cell, compile=compile, tol=1e-5)((x, lengths(5, 3, 4)))
        results.append([z, *torch.autograd.grad(z[:, :3].sin().sum(), list(cell.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_captured(monkeypatch, wiring):
    """As in test_cuda_graphs, the work itself in place of a replay: other inputs and lengths, nothing captured anew."""
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell = Transformer(D, heads=6, kv_heads=2, wiring=wiring, causal=True, rotary=1e4, decay=True, dropout=0.2)
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
    assert len(layers[0]._graphs.solves) == 1 and "graphs" in layers[0].last.path


def test_spectral_norm_of_its_linears():
    cell = Transformer(D, heads=2)
    for name in ("qkv", "output", "up", "down"):
        parametrizations.spectral_norm(getattr(cell, name))
    calls = []
    cell.up.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(None))
    layer = DEQ(cell)
    layer(torch.randn(B, T, D)).square().sum().backward()
    assert len(calls) == 1 and layer.last.converged.all()
    assert cell.up.parametrizations.weight.original.grad.abs().sum() > 0


def test_dropout_is_held_for_a_solve_and_gone_in_eval():
    cell = Transformer(D, heads=2, dropout=0.5)
    layer, x = DEQ(cell, tol=1e-5, max_steps=100), torch.randn(B, T, D)
    a, b = layer(x), layer(x)
    assert layer.last.converged.all() and not torch.allclose(a, b, atol=1e-3)
    plain = Transformer(D, heads=2)
    plain.load_state_dict(cell.state_dict())
    assert torch.equal(layer.eval()(x), DEQ(plain, tol=1e-5, max_steps=100)(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_few_tokens(shape, padded):
    x = torch.randn(*shape, D)
    for causal in (False, True):
        layer = DEQ(Transformer(D, heads=6, kv_heads=2, rotary=1e4, causal=causal))
        z = layer((x, torch.ones(shape, dtype=torch.bool)) if padded else x)
        assert z.shape == x.shape and layer.last.converged.all() and layer.last.steps.shape == shape[:1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_it_learns_to_copy(wiring, autocast):
    """Each token's answer is the token before it. Every solve of 300 training steps ends well, in few steps at last."""
    words = 4
    cell = Transformer(16, heads=2, hidden=32, wiring=wiring, causal=True, rotary=100.0, decay=autocast)
    net = nn.ModuleDict({"embed": nn.Embedding(words, 16), "deq": DEQ(cell), "head": nn.Linear(16, words)})
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses, steps = [], []
    for _ in range(300):
        x = torch.randint(words, (32, 6))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = net["head"](net["deq"](net["embed"](x))[:, 1:])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, :-1].flatten())
        assert set(net["deq"].last.status.tolist()) <= {Status.CONVERGED, Status.PLATEAU}
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        steps.append(net["deq"].last.steps.max().item())
    assert sum(losses[:10]) > 10 and sum(losses[-10:]) < 0.5, losses[::20]
    assert max(steps[-50:]) <= 20


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"features": 0}, ValueError, "features"),
        ({"features": 8.0}, TypeError, "features"),
        ({"heads": 5}, ValueError, "heads=5.*features=12"),
        ({"heads": 4, "kv_heads": 3}, ValueError, "kv_heads=3.*heads=4"),
        ({"heads": 0}, ValueError, "heads"),
        ({"heads": 4, "rotary": 1e4}, ValueError, "even width, got 3: features=12, heads=4"),
        ({"rotary": 0}, ValueError, "rotary"),
        ({"rotary": True}, TypeError, "rotary"),
        ({"hidden": 0}, ValueError, "hidden"),
        ({"wiring": "pre"}, ValueError, "wiring.*outer, damped, head.*'pre'"),
        ({"activation": "tanh"}, ValueError, "activation.*swiglu.*'tanh'"),
        ({"causal": 1}, TypeError, "causal"),
        ({"wiring": "damped", "damping": 1.5}, ValueError, "damping.*1.5"),
        ({"wiring": "damped", "damping": 0}, ValueError, "damping"),
        ({"damping": 0.5}, ValueError, "damping is for wiring='damped'.*'outer'"),
        ({"wiring": "damped", "gamma_max": 0.5}, ValueError, "gamma_max is for wiring='head'.*'damped'"),
        ({"wiring": "head", "gamma_max": -1}, ValueError, "gamma_max"),
        ({"dropout": 1.0}, ValueError, "p must be"),
        ({"layers": 2}, TypeError, "layers"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, says):
    with pytest.raises(error, match=says):
        Transformer(**({"features": 12, "heads": 2} | options))


@pytest.mark.parametrize(
    "x, error, says",
    [
        (torch.zeros(2, 3, 5), ValueError, r"12 features.*\(2, 3, 5\)"),
        (torch.zeros(3, 12), ValueError, r"\[batch, tokens, 12\].*\(3, 12\)"),
        (torch.zeros(2, 3, 12).long(), TypeError, "int64"),
        ((torch.zeros(2, 3, 12), torch.ones(2, 4, dtype=torch.bool)), ValueError, r"\(2, 3\).*\(2, 4\)"),
        ((torch.zeros(2, 3, 12), torch.ones(2, 3)), TypeError, "mask.*float32"),
        ((torch.zeros(2, 3, 12),) * 3, TypeError, "tuple"),
    ],
)
def test_bad_input_is_named(x, error, says):
    with pytest.raises(error, match=says):
        DEQ(Transformer(12, heads=2))(x)


def test_repr_names_the_options():
    assert "wiring='damped'" in repr(Transformer(4, heads=2, wiring="damped")) and "damping=0.95" in repr(
        Transformer(4, heads=2, wiring="damped")
    )
