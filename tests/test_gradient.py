"""The gradient on autograd's graph: solves in solves, checkpoints, threads, transforms, side outputs.

The reference of each is the same map as a plain loop under autograd, or a closed form, in float64.
"""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.autograd import functional
from torch.utils.checkpoint import checkpoint

import tritondeq as tdeq
from tritondeq import DEQ, Implicit, Neumann, OneStep, Phantom, Unrolled, fixed_point

TIGHT = {"tol": 1e-12, "max_steps": 1000}
SERIES = {"implicit": Implicit(), "neumann": Neumann(60), "phantom": Phantom(80, 0.9), "unrolled": Unrolled(60)}
WIDTH = 4


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def close(got, right, tol=1e-7):
    """Asserts relative distances in the 2-norm."""
    for g, r in zip(got, right, strict=True):
        assert g is not None and (g - r).norm() <= tol * r.norm().clamp(min=1e-3), (g, r)


def loop(f, z, steps=150):
    for _ in range(steps):
        z = f(z)
    return z


def leaves(count=2):
    draw = torch.Generator().manual_seed(1)
    weights = [0.2 * torch.randn(WIDTH, WIDTH, generator=draw) for _ in range(count)]
    return [t.requires_grad_() for t in (*weights, torch.randn(3, WIDTH, generator=draw))]


def elsewhere(work):
    """Runs `work` in another thread, as autograd does on CUDA."""
    made = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join()
    assert made, "it raised"
    return made[0]


class Block(nn.Module):
    def __init__(self, scale=0.6):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight.data.mul_(scale)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


# solves within solves


def nest(depth, solve):
    """The function of (weights, x) whose map at each level holds the solve of the next."""

    def level(weights, outer):
        if not weights:
            return outer
        w, *rest = weights
        return solve(lambda z: torch.tanh(level(rest, z) @ w.T + outer), torch.zeros(3, WIDTH))

    return level


@pytest.mark.parametrize("outer", SERIES)
@pytest.mark.parametrize("inner", SERIES)
def test_a_solve_in_a_solve(outer, inner):
    adjoints = iter([SERIES[outer], *[SERIES[inner]] * 10000])

    def solve(f, z):
        return fixed_point(f, z, adjoint=next(adjoints), **TIGHT).value

    *weights, x = leaves()
    z, right = nest(2, solve)(weights, x), nest(2, lambda f, z: loop(f, z, 60))(weights, x)
    close([z], [right], 1e-9)
    close(*(torch.autograd.grad(y.pow(2).sum(), (*weights, x)) for y in (z, right)))


@pytest.mark.slow
def test_three_levels():
    *weights, x = leaves(3)
    z = nest(3, lambda f, z: fixed_point(f, z, tol=1e-10, max_steps=60).value)(weights, x)
    right = nest(3, lambda f, z: loop(f, z, 24))(weights, x)
    close(*(torch.autograd.grad(y.pow(2).sum(), (*weights, x)) for y in (z, right)), 1e-5)


def test_second_derivatives_of_a_solve_in_a_solve():
    *weights, x = leaves()
    both = []
    for solve in (lambda f, z: fixed_point(f, z, **TIGHT).value, lambda f, z: loop(f, z, 40)):
        z = nest(2, solve)(weights, x)
        first = torch.autograd.grad(z.pow(2).sum(), (*weights, x), create_graph=True)
        both.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (*weights, x)))
    close(*both, 1e-6)


class Outer(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.w, self.inner = nn.Parameter(leaves()[0].detach()), make(Block(0.4))

    def forward(self, z, x):
        return torch.tanh(self.inner(z) @ self.w.T + x)


@pytest.mark.parametrize("adjoint", SERIES)
def test_a_layer_in_a_cell(adjoint):
    def make(cell):
        return DEQ(cell, adjoint=SERIES[adjoint], **TIGHT)

    def unroll(cell):
        return DEQ(cell, adjoint=Unrolled(60))

    x = leaves()[-1]
    grads = []
    for wrap in (make, unroll):
        layer = wrap(Outer(wrap))
        grads.append(torch.autograd.grad(layer(x).pow(2).sum(), [*layer.parameters(), x]))
    close(*grads)


def test_the_radius_of_a_map_that_solves():
    """J = D W (I - E V)^-1 E, with D and E the slopes of the outer and of the inner tanh."""
    w, v, x = (t.detach() for t in leaves())
    inner = lambda z: fixed_point(lambda y: torch.tanh(y @ v.T + z), torch.zeros(3, WIDTH), **TIGHT).value  # noqa: E731
    z = loop(lambda z: torch.tanh(inner(z) @ w.T + x), torch.zeros(3, WIDTH), 60)
    y = inner(z)
    d, e = torch.diag_embed(1 - z**2), torch.diag_embed(1 - y**2)
    jacobian = d @ w @ torch.linalg.solve(torch.eye(WIDTH) - e @ v, e)
    radius = tdeq.spectral_radius(lambda z: torch.tanh(inner(z) @ w.T + x), z)
    close([radius], [torch.linalg.eigvals(jacobian).abs().amax(-1)], 1e-4)


# checkpoints and threads


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [lambda f: f(), elsewhere], ids=["here", "elsewhere"])
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(4, 0.8), Unrolled(20)], ids=repr)
def test_a_checkpoint_around_the_layer(adjoint, run, reentrant):
    encoder = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])
    layer, x = DEQ(Block(), adjoint=adjoint, **TIGHT), torch.randn(3, WIDTH)
    leaves = [*encoder.parameters(), *layer.parameters()]
    right = torch.autograd.grad(layer(encoder(x)).pow(2).sum(), leaves)
    loss = checkpoint(layer, encoder(x), use_reentrant=reentrant).pow(2).sum()
    run(lambda: loss.backward() or True)
    close([leaf.grad for leaf in leaves], right, 1e-9)


def test_a_checkpoint_solves_twice_and_not_at_every_product():
    layer, x, solves = DEQ(Block(), **TIGHT), torch.randn(3, WIDTH, requires_grad=True), []
    layer.cell.linear.register_forward_pre_hook(lambda *_: solves.append(1))
    layer(x)
    once = len(solves)
    solves.clear()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(solves) <= 2 * once


def test_a_checkpoint_keeps_nothing_alive_and_sees_weights_change():
    layer, x = DEQ(Block(), **TIGHT), torch.randn(3, WIDTH, requires_grad=True)

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(7):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        counts.append(alive())
    assert counts[-1] == counts[1]
    z = checkpoint(layer, x, use_reentrant=False)
    with torch.no_grad():
        layer.cell.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_in_a_cell_is_refused_where_it_would_lose_weights():
    class Cell(Block):
        def forward(self, z, x):
            return checkpoint(lambda z: torch.tanh(self.linear(z)), z, use_reentrant=True) + x

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        DEQ(Cell(), adjoint=OneStep())(torch.randn(2, WIDTH))


class Energy(nn.Module):
    """A step down the gradient of sum softplus(W z) + |z|^2 / 2 - z x, which autograd takes in the cell."""

    def __init__(self, run):
        super().__init__()
        self.w, self.run = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH)), run

    def forward(self, z, x):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = nn.functional.softplus(z @ self.w.T).sum() + 0.5 * z.pow(2).sum() - (z * x).sum()
            return z - 0.5 * self.run(lambda: torch.autograd.grad(energy, z, create_graph=True)[0])


@pytest.mark.parametrize("run", [lambda f: f(), elsewhere], ids=["here", "elsewhere"])
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(100, 0.9), Unrolled(100)], ids=repr)
def test_a_cell_that_differentiates(adjoint, run):
    layer, x = DEQ(Energy(run), adjoint=adjoint, **TIGHT), torch.randn(3, WIDTH, requires_grad=True)
    w = layer.cell.w
    right = loop(lambda z: 0.5 * z + 0.5 * (x - torch.sigmoid(z @ w.T) @ w), torch.zeros(3, WIDTH))
    close(*(torch.autograd.grad(z.pow(3).sum(), (w, x)) for z in (layer(x), right)), 1e-6)


def test_a_retained_graph_and_an_input_that_is_no_leaf():
    layer, x = DEQ(Block(), **TIGHT), torch.randn(3, WIDTH, requires_grad=True)
    h = 2 * x
    z, right = layer(h), DEQ(layer.cell, adjoint=Unrolled(150))(h)
    first = torch.autograd.grad(z.sum(), (h, x), retain_graph=True)
    again = torch.autograd.grad(z.sum(), (h, x), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    close(first, torch.autograd.grad(right.sum(), (h, x)))


# transforms, and derivatives of derivatives


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(120, 0.9)], ids=repr)
@pytest.mark.parametrize("kind", ["grad", "vmap", "vjp", "jvp"])
def test_transforms_of_torch_func_in_a_cell(kind, adjoint):
    class Cell(Energy):
        def energy(self, z, x):
            return nn.functional.softplus(z @ self.w.T).sum() + 0.5 * z.pow(2).sum() - (z * x).sum()

        def forward(self, z, x):
            if kind == "jvp":
                return 0.3 * torch.func.jvp(lambda a: torch.tanh(a @ self.w.T), (z,), (torch.ones_like(z),))[1] + x
            if kind == "vjp":
                e, pull = torch.func.vjp(lambda z: self.energy(z, x), z)
                return z - 0.5 * pull(torch.ones_like(e))[0]
            grad = torch.func.grad(self.energy)
            return z - 0.5 * (grad if kind == "grad" else torch.func.vmap(grad))(z, x)

    layer, x = DEQ(Cell(None), adjoint=adjoint, **TIGHT), torch.randn(3, WIDTH, requires_grad=True)
    right = loop(lambda z: layer.cell(z, x), torch.zeros(3, WIDTH))
    close(*(torch.autograd.grad(z.pow(3).sum(), (layer.cell.w, x)) for z in (layer(x), right)), 1e-6)


def test_transforms_of_torch_func_around_a_solve_are_refused():
    layer, x = DEQ(Block(), **TIGHT), torch.randn(2, WIDTH)
    works = [torch.func.grad(lambda x: layer(x).sum()), torch.func.vmap(layer), torch.func.jacrev(layer)]
    for work in (*works, lambda x: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"torch\.func .* around a fixed point"):
            work(x)
    right = torch.func.grad(lambda x: loop(lambda z: layer.cell(z, x), torch.zeros_like(x), 20).sum())(x)
    close([torch.func.grad(lambda x: layer.unrolled(20)(x).sum())(x)], [right])


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_forward_mode_is_refused(start):
    layer, x = DEQ(Block(), **TIGHT), torch.randn(2, WIDTH)
    z0 = layer(x).detach() if start == "warm" else None
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), z0=z0)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(150)], ids=repr)
def test_products_with_jacobian_and_hessian(adjoint):
    layer, x, v = DEQ(Block(), adjoint=adjoint, **TIGHT), torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    plain = DEQ(layer.cell, adjoint=Unrolled(150))
    close([functional.jvp(layer, x, v)[1]], [functional.jvp(plain, x, v)[1]])
    cubes = [lambda x, f=f: f(x).pow(3).sum() for f in (layer, plain)]
    close([functional.vhp(cubes[0], x, v)[1]], [functional.vhp(cubes[1], x, v)[1]])
    if isinstance(adjoint, Implicit):
        with pytest.raises(RuntimeError, match="as hvp takes; vhp does not"):
            functional.hvp(cubes[0], x, v)


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(2), Phantom(3, 0.7)], ids=repr)
def test_the_derivative_of_an_approximate_gradient_is_refused_by_the_cotangent_too(adjoint):
    layer, x = DEQ(Block(), adjoint=adjoint, **TIGHT), torch.randn(2, WIDTH)
    with pytest.raises(RuntimeError, match="approximation whose derivative would be wrong"):
        functional.jvp(layer, x, torch.ones_like(x))


def test_second_derivatives_under_functional_call():
    """The graph of the first is made after the call is over, and the lent parameters have been taken back."""
    x, grads = torch.randn(3, WIDTH), []
    for layer in (DEQ(Block(), **TIGHT), DEQ(Block(), adjoint=Unrolled(150))):
        layer.requires_grad_(False)
        a = 0.3 * torch.eye(WIDTH).requires_grad_()
        lent = dict(layer.named_parameters()) | {"cell.linear.weight": a @ a}
        (first,) = torch.autograd.grad(torch.func.functional_call(layer, lent, (x,)).pow(3).sum(), a, create_graph=True)
        grads.append((first, *torch.autograd.grad(first.pow(2).sum(), a)))
    close(*grads)


def test_second_derivatives_of_weights_that_have_changed_raise():
    layer, x = DEQ(Block(), **TIGHT), torch.randn(3, WIDTH, requires_grad=True)
    z = layer(x)
    layer.cell.linear.weight.data.mul_(0.5)
    with pytest.raises(RuntimeError, match="its value has changed since the forward pass"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_second_derivatives_of_a_cell_with_another_module_raise():
    """Whose weights may be so near that no value shows it."""
    layer, x = DEQ(Block(), **TIGHT), torch.randn(3, WIDTH, requires_grad=True)
    z = layer(x)
    layer.cell.linear = copy.deepcopy(layer.cell.linear)
    with pytest.raises(RuntimeError, match="modules of the forward pass"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


# what a cell hands out beside its state


PLACES = ["attribute", "private attribute", "buffer", "containers"]


class Experts(nn.Module):
    def __init__(self, kept="attribute"):
        super().__init__()
        self.kept, self.name = kept, {"private attribute": "_balance"}.get(kept, "balance")
        if kept == "buffer":
            self.register_buffer(self.name, None)
        torch.manual_seed(0)
        self.router, self.linear = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Parameter(0.3 * torch.randn(3, WIDTH))
        self.linear.weight.data.mul_(0.3)

    def forward(self, z, x):
        share = self.router(z).softmax(-1)
        balance = (share.mean(0) ** 2).sum()
        setattr(self, self.name, {"of": [1, [balance]]} if self.kept == "containers" else balance)
        return torch.tanh(self.linear(z) + share @ self.experts + x)

    def left(self):
        """Returns what the last evaluation has left."""
        left = getattr(self, self.name)
        return left["of"][1][0] if self.kept == "containers" else left


class WithAux(Experts):
    def forward(self, z, x):
        return super().forward(z, x), {"balance": self.balance}


@pytest.mark.parametrize("how", [*PLACES, "hook", "aux", "aux of a function"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_a_cell_hands_out_moves_with_the_equilibrium(weight, how):
    x, grads, cell = torch.randn(5, WIDTH, requires_grad=True), [], WithAux() if "aux" in how else Experts(how)
    seen = {}
    if how == "hook":  # which alone is reason enough for one more evaluation
        cell.linear.register_forward_hook(lambda module, args, out: seen.update(out=out))
    for solved in (True, False):
        if solved and how == "aux of a function":
            s = fixed_point(cell, torch.zeros_like(x), (x,), has_aux=True, **TIGHT)
            z, beside = s.value, s.aux["balance"]
        elif solved:
            s = DEQ(cell, has_aux=how == "aux", **TIGHT).solve(x)
            z, beside = s.value, s.aux["balance"] if how == "aux" else cell.left()
        else:
            z = loop(lambda z: Experts.forward(cell, z, x), torch.zeros_like(x))
            Experts.forward(cell, z, x)
            beside = cell.left()
        beside = seen["out"].square().sum() if how == "hook" else beside
        grads.append(torch.autograd.grad(weight * z.square().sum() + beside, [*cell.parameters(), x]))
    close(*grads)


def test_aux_without_gradients_and_what_does_not_fit():
    cell, x = WithAux(), torch.randn(5, WIDTH)
    with torch.no_grad():
        solution = DEQ(cell, has_aux=True).solve(x)
        _, aux = cell(solution.value, x)
    assert torch.allclose(solution.aux["balance"], aux["balance"])
    with pytest.raises(ValueError, match=r"f must return \(state, aux\), got Tensor"):
        fixed_point(torch.tanh, x, has_aux=True)
    with pytest.raises(ValueError, match="has_aux=True"):
        DEQ(cell, has_aux=True, graph=True)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(80, 0.9)], ids=repr)
def test_a_weight_that_the_first_evaluation_computes(adjoint):
    class Rotation(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w, self.kept = nn.Parameter(torch.randn(WIDTH, WIDTH)), None

        def forward(self, z, x):
            if self.kept is None:
                self.kept = 0.6 * torch.matrix_exp(self.w - self.w.T)
            return torch.tanh(z @ self.kept.T + x)

    x, cell = torch.randn(3, WIDTH), Rotation()
    right = torch.autograd.grad(loop(lambda z: cell(z, x), torch.zeros_like(x)).sum(), cell.w)
    layer = DEQ(Rotation(), adjoint=adjoint, **TIGHT)
    close(torch.autograd.grad(layer(x).sum(), layer.cell.w), right, 1e-6)
