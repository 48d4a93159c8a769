"""torch.func around a layer: right for an unrolled one, and for a solve that functional_call calls; else refused.

What stands within a cell is in test_gradient.py. The truth is autograd in float64, one sample, or one model, at a time.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.parametrizations import weight_norm

import tritondeq as tdeq
from tritondeq import DEQ, Unrolled

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, for attention
WIDTH, STEPS = 4, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, z, x):
        return self.norm(x + torch.tanh(0.5 * self.linear(z)))


class Normed(Block):
    def __init__(self):
        super().__init__()
        weight_norm(self.linear)


CELLS = {
    "a user's cell": Block,
    "weight norm": Normed,
    "Affine": lambda: tdeq.cells.Affine(WIDTH),
    "Affine with a bound": lambda: tdeq.cells.Affine(WIDTH, contraction=0.9),
    "Monotone": lambda: tdeq.cells.Monotone(WIDTH),
    "MLP": lambda: tdeq.cells.MLP(WIDTH),
    "Gated": lambda: tdeq.cells.Gated(WIDTH),
    "Transformer": lambda: tdeq.cells.Transformer(WIDTH, heads=2),
    "Conv": lambda: tdeq.cells.Conv(WIDTH, groups=2),
}
EACH = [name if name in ("a user's cell", "Affine") else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]


def made(name, steps=STEPS):
    return DEQ(CELLS[name]().double(), tol=1e-12, max_steps=500).unrolled(steps)


def drawn(name, rows=3):
    shape = {"Transformer": (3, WIDTH), "Conv": (WIDTH, 3, 3)}.get(name, (WIDTH,))
    return torch.randn(rows, *shape, dtype=torch.float64)


def loss(z):
    return z.pow(3).sin().sum()


def weights(layer):
    return {name: weight.detach() for name, weight in layer.named_parameters()}


def by_autograd(layer, x):
    """The gradients of the loss by the weights."""
    names, leaves = zip(*layer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(layer(x)), leaves), strict=True))


def close(actual, right, rtol=1e-10):
    torch.testing.assert_close(actual, right, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", EACH)
def test_gradients_per_sample(name):
    layer, x = made(name), drawn(name)
    per_sample = vmap(grad(lambda w, x: loss(functional_call(layer, w, (x[None],)))), (None, 0))(weights(layer), x)
    each = [by_autograd(layer, x[i : i + 1]) for i in range(len(x))]
    close(per_sample, {key: torch.stack([one[key] for one in each]) for key in each[0]})


@pytest.mark.parametrize("name", EACH)
def test_an_ensemble(name):
    """Its values, and the gradients of each model."""
    layers, x = [made(name) for _ in range(3)], drawn(name)
    stacked, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    run = lambda w, b: functional_call(base, (w, b), (x,))  # noqa: E731
    close(vmap(run)(stacked, buffers), torch.stack([layer(x) for layer in layers]))
    gradients = vmap(grad(lambda w, b: loss(run(w, b))))({k: v.detach() for k, v in stacked.items()}, buffers)
    each = [by_autograd(layer, x) for layer in layers]
    close(gradients, {key: torch.stack([one[key] for one in each]) for key in each[0]})


@pytest.mark.parametrize("name", [pytest.param("a user's cell", marks=pytest.mark.slow), "Affine"])
def test_derivatives_by_the_input(name):
    layer, x = made(name), drawn(name)
    functional, v = torch.autograd.functional, torch.randn_like(x)
    jacobian = functional.jacobian(layer, x)
    close(jacrev(layer)(x), jacobian)
    close(jacfwd(layer)(x), jacobian)
    close(jvp(layer, (x,), (v,))[1], torch.einsum("bcde,de->bc", jacobian, v))
    close(vjp(layer, x)[1](v)[0], torch.einsum("bcde,bc->de", jacobian, v))
    close(hessian(lambda x: loss(layer(x)))(x), functional.hessian(lambda x: loss(layer(x)), x))


def test_a_function():
    """With a nested state, what f captures, and a start that is differentiated."""
    w, x = 0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64), drawn("")

    def run(w, x, z0):
        f = lambda z: {"a": torch.tanh(z["b"] @ w + x), "b": 0.5 * z["a"]}  # noqa: E731
        return tdeq.fixed_point(f, {"a": z0, "b": z0}, adjoint=Unrolled(STEPS)).value["a"]

    z0 = torch.randn_like(x)
    leaves = [t.clone().requires_grad_() for t in (w, x, z0)]
    close(grad(lambda *t: loss(run(*t)), (0, 1, 2))(w, x, z0), torch.autograd.grad(loss(run(*leaves)), leaves))
    many = torch.stack([w, -w, 2 * w])
    close(vmap(run, (0, None, None))(many, x, z0), torch.stack([run(w, x, z0) for w in many]))


@pytest.mark.parametrize("name", EACH)
def test_a_solve_takes_the_weights_that_functional_call_lends(name):
    """Its gradients are those of as many unrolled steps as reach the fixed point."""
    layer, x = made(name, None), drawn(name)
    lent = {key: weight.mul(0.9).requires_grad_() for key, weight in weights(layer).items()}
    explicit = copy.deepcopy(layer).unrolled(100)
    values = [functional_call(each, lent, (x,)) for each in (layer, explicit)]
    close(*values, rtol=1e-8)
    for a, b in zip(*(torch.autograd.grad(loss(z), list(lent.values())) for z in values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


SOLVES = {
    "grad": lambda layer, x: grad(lambda x: loss(layer(x)))(x),
    "vmap": lambda layer, x: vmap(layer)(x[:, None]),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "vjp": lambda layer, x: vjp(layer, x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,)),
    "per sample": lambda layer, x: vmap(
        grad(lambda w, x: loss(functional_call(layer, w, (x[None],)))), (None, 0)
    )(weights(layer), x),
    "ensemble": lambda layer, x: vmap(lambda w: functional_call(layer, w, (x,)))(
        stack_module_state([layer, copy.deepcopy(layer)])[0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", SOLVES)
def test_a_solve_within_a_transform_is_refused_and_what_is_named_instead_works(name, mode):
    layer, x = made("a user's cell", None), drawn("")
    with pytest.raises(RuntimeError, match=r"torch\.func .*around a fixed point .* layer\.unrolled\(steps\)"), mode():
        SOLVES[name](layer, x)
    assert layer.solve(x).converged.all()  # an error leaves nothing behind
    with mode():
        SOLVES[name](layer.unrolled(STEPS), x)
