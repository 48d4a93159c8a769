"""The Jacobian at a fixed point against torch.func.jacrev and torch.linalg.eigvals in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn.utils.parametrizations import spectral_norm

import tritondeq as tdeq
from tritondeq import jacobian_penalty, spectral_radius


def dense(f, z):
    """[B, N, N] of rows z [B, N] that f treats one by one."""
    return vmap(jacrev(lambda row: f(row[None])[0]))(z.detach())


def matrices(kind: str, n: int, batch: int = 5):
    gauss = torch.randn(batch, n, n, dtype=torch.float64) / math.sqrt(n)
    if kind == "symmetric":
        return (gauss + gauss.mT) / 2
    if kind == "rotation":  # all eigenvalues of one size
        return 0.9 * torch.linalg.qr(gauss)[0]
    if kind == "opposite":
        values = [0.9] + [0.1] * (n - 2) + [-0.9]
        return torch.tensor(values[-n:], dtype=torch.float64).diag().expand(batch, n, n)
    if kind == "shifted":  # of a residual block
        return 0.5 * torch.eye(n, dtype=torch.float64) + 0.4 * gauss
    return gauss


def radii(j):
    return torch.linalg.eigvals(j).abs().amax(-1)


def times(j):
    return lambda z: torch.einsum("bij,bj->bi", j.to(z), z)


# The rows of a Hadamard matrix of 4.
SIGNS = torch.tensor([[1.0, 1.0, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
KINDS = ["gauss", "symmetric", "rotation", "opposite", "shifted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_radius_is_exact_where_the_space_is_exhausted(kind, n):
    j, z = matrices(kind, n), torch.randn(5, n, dtype=torch.float64)
    true = radii(j)
    torch.testing.assert_close(spectral_radius(times(j), z), true, rtol=2e-5, atol=0)
    torch.testing.assert_close(spectral_radius(times(j), z.float()), true.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_radius_of_wide_states(kind):
    j = matrices(kind, 256, batch=3)
    torch.testing.assert_close(spectral_radius(times(j), torch.randn(3, 256)), radii(j).float(), rtol=0.12, atol=0)


def test_radius_of_jacobians_that_are_degenerate():
    z = torch.randn(3, 4)
    assert (spectral_radius(lambda z: torch.ones_like(z), z) == 0).all()
    assert (spectral_radius(lambda z: 0 * z, z) == 0).all()
    scale = torch.tensor([[math.nan], [1.0], [math.inf]])
    assert spectral_radius(lambda z: z * scale, z).isnan().tolist() == [True, False, True]
    assert spectral_radius(lambda z: z.tanh(), z[:0]).shape == (0,)
    assert (spectral_radius(lambda z: z, z[:, :0]) == 0).all()
    nilpotent = torch.tensor([[0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    assert (spectral_radius(lambda z: z @ nilpotent.T, torch.zeros(1, 2, dtype=torch.float64)) < 1e-6).all()


def test_radius_does_not_depend_on_batch_mates_or_leave_a_trace():
    layer, x = tdeq.DEQ(tdeq.cells.MLP(12)), torch.randn(4, 3, 12)
    z, before = layer(x), torch.get_rng_state()
    result = spectral_radius(layer, z, x)
    assert torch.equal(torch.get_rng_state(), before) and not result.requires_grad
    torch.testing.assert_close(spectral_radius(layer, z.flip(0), x.flip(0)).flip(0), result, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_radius_under_autocast(half):
    """Autocast rules the cell, not the method: products by element alone it leaves as they are."""
    layer = tdeq.DEQ(tdeq.cells.Affine(16))
    x, rates = torch.randn(4, 16), torch.linspace(0.1, 0.9, 16)
    z = layer(x)
    exact, by_element = spectral_radius(layer, z, x), spectral_radius(lambda z: rates * z, z)
    with torch.autocast("cpu", dtype=half):
        radius = spectral_radius(layer, z, x)
        assert torch.equal(spectral_radius(lambda z: rates * z, z), by_element)
    assert radius.dtype == torch.float32
    torch.testing.assert_close(radius, exact, rtol=2 ** -(6 if half == torch.bfloat16 else 9), atol=0)


def net(z, w, b):
    """Not row-separable in any simple way: a smooth map with a dense Jacobian that depends on z."""
    return torch.tanh(z @ w.T + b) * (1 + 0.3 * z.roll(1, -1))


def estimate(j, probes):
    """(mean, standard deviation) of the estimator of `probes` signs, in closed form."""
    gram = j @ j.mT
    n = j.shape[-1]
    spread = 2 * (gram.square().sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(1)) / n**2 / probes
    return j.square().sum((1, 2)) / n, spread.sqrt()


@pytest.mark.parametrize(("probes", "draws"), [(1, 1000), (4, 400)])
def test_penalty_is_unbiased_with_the_variance_of_signs(probes, draws):
    w, b, z = (torch.randn(*shape, dtype=torch.float64) for shape in [(5, 5), (5,), (3, 5)])
    mean, spread = estimate(dense(lambda z: net(z, w, b), z), probes)
    with torch.no_grad():
        penalties = torch.stack([jacobian_penalty(net, z, w, b, probes=probes) for _ in range(draws)])
    assert ((penalties.mean(0) - mean).abs() < 4 * spread / math.sqrt(draws)).all()
    torch.testing.assert_close(penalties.std(0), spread, rtol=0.2, atol=0)


@pytest.fixture
def hadamard(monkeypatch):
    """Probes that are the rows of a Hadamard matrix of 4: the mean over them is the Frobenius norm itself."""
    turn = iter(range(10**6))

    def fill(tensor, p):
        assert p == 0.5 and tensor.shape[1] % 4 == 0
        return tensor.copy_((SIGNS[next(turn) % 4].repeat(tensor.shape[1] // 4) + 1) / 2)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", fill)


@pytest.mark.parametrize("detached", [True, False])
def test_value_and_gradients_of_the_penalty(hadamard, detached):
    """At a detached z, and at the fixed point as a function of the weights."""
    w, b, x = (torch.randn(*shape, dtype=torch.float64) for shape in [(4, 4), (4,), (3, 4)])
    inputs = [t.requires_grad_() for t in (0.5 * w / torch.linalg.matrix_norm(w, 2), b, x)]
    w, b, x = inputs

    def f(z):
        return torch.tanh(z @ w.T + b + x[: len(z)])

    z = tdeq.fixed_point(f, torch.zeros(3, 4, dtype=torch.float64), tol=1e-14, max_steps=500).value
    result = jacobian_penalty(f, z.detach() if detached else z, probes=4)

    unrolled = z.detach()
    for _ in range(0 if detached else 60):  # from the solution: what is left of the start is 0.5^60
        unrolled = f(unrolled)
    slope = 1 - torch.tanh(unrolled @ w.T + b + x) ** 2
    true = (slope[:, :, None] * w).square().sum((1, 2)) / 4
    torch.testing.assert_close(result, true, rtol=1e-12, atol=0)
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    grads = [torch.autograd.grad(penalty @ weights, inputs) for penalty in (result, true)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_penalty_without_a_graph(hadamard):
    w, b, z = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(4, 4), (4,), (3, 4)])
    with torch.no_grad():
        result = jacobian_penalty(net, z, w, b, probes=4)
    assert not result.requires_grad
    torch.testing.assert_close(result, dense(lambda z: net(z, w, b), z).detach().square().sum((1, 2)) / 4)
    assert (jacobian_penalty(lambda z: torch.ones_like(z), z) == 0).all()
    assert (jacobian_penalty(lambda z: w[:3], z) == 0).all(), "f has a gradient, but not by z"
    assert jacobian_penalty(net, z[:0], w, b).shape == (0,)


class Once(torch.autograd.Function):
    """The sine, with a derivative that has none."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_an_f_that_is_differentiable_once():
    z = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        result = jacobian_penalty(Once.apply, z)
    torch.testing.assert_close(result, z.cos().square().mean(1))  # J is diagonal, so the estimate is exact
    torch.testing.assert_close(spectral_radius(Once.apply, z), z.cos().abs().amax(1), rtol=2e-5, atol=0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        jacobian_penalty(Once.apply, z.requires_grad_()).sum().backward()


def nested(z):
    a, b = z["a"], z["b"][0]
    return {"a": torch.tanh(a + 0.5 * b.mean(-1).mean(-1, keepdim=True)), "b": (b.flip(-1).sin() * a[..., None, :1],)}


def test_any_nesting(hadamard):
    a, b = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 2, 4, dtype=torch.float64)

    def flat(row):  # [B, 4 + 8]
        z = nested({"a": row[:, :4], "b": (row[:, 4:].view(-1, 2, 4),)})
        return torch.cat([z["a"], z["b"][0].flatten(1)], dim=1)

    rows = torch.cat([a.flatten(0, 1), b.flatten(0, 1).flatten(1)], dim=1)
    j = dense(flat, rows)
    z = {"a": a, "b": (b,)}
    radius = spectral_radius(nested, z, batch_dims=2)
    torch.testing.assert_close(radius, radii(j).view(2, 3), rtol=2e-5, atol=0)
    result = jacobian_penalty(nested, z, batch_dims=2, probes=4)
    expected = (SIGNS.repeat(1, 3) @ j).square().sum((1, 2)).view(2, 3) / 4 / 12
    torch.testing.assert_close(result, expected)
    assert jacobian_penalty(nested, z).shape == spectral_radius(nested, z).shape == (2,)


def test_a_mask_leaves_the_jacobian_of_what_counts(hadamard):
    w, b, z = (torch.randn(*shape, dtype=torch.float64) for shape in [(8, 8), (8,), (3, 8)])
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4, [False] * 8])
    j = dense(lambda z: net(z, w, b), z)
    result = jacobian_penalty(net, z, w, b, mask=mask, probes=4)
    whole = (SIGNS.repeat(1, 2) @ j[0]).square().sum() / 4 / 8
    torch.testing.assert_close(result, torch.stack([whole, j[1, :4, :4].square().sum() / 4, whole * 0]))
    radius = spectral_radius(net, z, w, b, mask=mask)
    true = torch.stack([radii(j[0]), radii(j[1, :4, :4]), whole * 0])
    torch.testing.assert_close(radius, true, rtol=2e-5, atol=1e-9)


def test_padding_does_not_count():
    layer, x = tdeq.DEQ(tdeq.cells.Transformer(8, heads=2)), torch.randn(2, 5, 8)
    both = (x, torch.tensor([[True] * 5, [True, True, True, False, False]]))
    z = layer(both).detach()
    short = z[1:, :3], x[1:, :3]
    torch.testing.assert_close(layer(short[1]), short[0], rtol=1e-3, atol=1e-3)
    alone = spectral_radius(layer, *short)
    torch.testing.assert_close(spectral_radius(layer, z, both)[1:], alone, rtol=0.02, atol=0)
    torch.manual_seed(1)
    result = jacobian_penalty(layer, z, both, probes=200)[1:]
    torch.testing.assert_close(result, jacobian_penalty(layer, *short, probes=200), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["MLP", "Transformer", "Conv"])
def test_a_layer_is_its_cell_with_the_injection(name):
    cell = getattr(tdeq.cells, name)(6, **{"Transformer": {"heads": 2}, "Conv": {"groups": 2}}.get(name, {}))
    layer, x = tdeq.DEQ(cell), torch.randn((2, 6, 3, 3) if name == "Conv" else (2, 3, 6))
    z = layer(x)
    radius = spectral_radius(layer, z, x)
    assert radius.shape == x.shape[: -1 if cell.batch_dims == -1 else 1]
    assert torch.equal(spectral_radius(cell, z, cell.inject(x)), radius) and ((radius > 0) & (radius < 1)).all()
    torch.manual_seed(3)
    penalty = jacobian_penalty(layer, z, x)
    penalty.mean().backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    torch.manual_seed(3)
    assert torch.equal(jacobian_penalty(cell, z, cell.inject(x)), penalty)


def test_half_states():
    w = torch.randn(8, 8, dtype=torch.bfloat16) / 4
    result = spectral_radius(lambda z: z @ w.T, torch.randn(2, 8, dtype=torch.bfloat16))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, radii(w.float()).expand(2), rtol=0.02, atol=0)


def test_a_parametrized_cell_and_dropout():
    class Block(nn.Sequential):
        def forward(self, z, x):
            return torch.tanh(super().forward(z) + x)

    cell = Block(spectral_norm(nn.Linear(6, 6)), tdeq.FixedDropout(0.5))
    layer, x = tdeq.DEQ(cell), torch.randn(4, 6)
    jacobian_penalty(layer, layer(x), x).mean().backward()
    assert cell[0].parametrizations.weight.original.grad.abs().sum() > 0
    z = layer.eval()(x)
    true = radii(dense(lambda z: torch.tanh(cell[0](z) + x[0]), z[:1]))
    torch.testing.assert_close(spectral_radius(layer, z, x)[:1], true, rtol=1e-4, atol=0)


def test_a_compiled_layer_is_measured_uncompiled():
    layer = tdeq.DEQ(tdeq.cells.Affine(4), compile={"backend": "no such backend"})
    plain, x = tdeq.DEQ(layer.cell), torch.randn(3, 4)
    z = plain(x).detach()
    assert torch.equal(spectral_radius(layer, z, x), spectral_radius(plain, z, x))
    assert jacobian_penalty(layer, z, x).isfinite().all()


@pytest.mark.parametrize("measure", [jacobian_penalty, spectral_radius])
def test_bad_input(measure):
    layer, x = tdeq.DEQ(tdeq.cells.Affine(4)), torch.randn(3, 4)
    z, option = layer(x), "probes" if measure is jacobian_penalty else "products"
    for error, message, f, state, options in (
        (TypeError, "args must be the layer's input x and nothing else, got 0", layer, z, {}),
        (TypeError, "f must be a DEQ, a cell or a function, got int 3", 3, z, {}),
        (TypeError, "z must be made of floating-point tensors", torch.sin, x.long(), {}),
        (ValueError, "f\\(z\\) must keep the shape and device of z0", lambda z: z[:, :2], z, {}),
        (ValueError, "batch_dims=3 does not fit z", torch.sin, z, {"batch_dims": 3}),
        (TypeError, "mask must be made of bool tensors", torch.sin, z, {"mask": x}),
        (ValueError, option, torch.sin, z, {option: 0}),
        (TypeError, option, torch.sin, z, {option: 1.5}),
    ):
        with pytest.raises(error, match=message):
            measure(f, state, **options)
