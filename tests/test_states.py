"""States along the way, what is called after each evaluation, and nets of which only the last steps have a gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Neumann, OneStep, PeacemanRachford, Phantom, Picard, Unrolled
from tritondeq.cells import MLP, Affine, Monotone

F64 = torch.float64


@pytest.fixture
def w():
    return (0.2 * torch.randn(5, 5, dtype=F64)).requires_grad_()


@pytest.fixture
def b():
    return torch.randn(3, 5, dtype=F64, requires_grad=True)


def f(z, w, b):
    return torch.tanh(z @ w + b)


def steps(w, b, count):
    z = torch.zeros(3, 5, dtype=F64)
    for _ in range(count):
        z = f(z, w, b)
    return z


def gradient(adjoint_of, z, w, b, g):
    """The gradient of <g, z> by w and b that an adjoint takes at z: `adjoint_of` makes u of J' and g."""
    z = z.detach()
    slopes = 1 - f(z, w, b).detach() ** 2  # f(z) = tanh(z W + b), sample by sample
    rows = [adjoint_of(w.detach() @ torch.diag(s), row) for s, row in zip(slopes, g, strict=True)]
    return torch.autograd.grad(f(z, w, b), (w, b), torch.stack(rows))


ADJOINTS = {
    "Implicit": (Implicit(tol=1e-13), lambda jt, g: torch.linalg.solve(torch.eye(5, dtype=F64) - jt, g)),
    "OneStep": (OneStep(), lambda jt, g: g),
    "Neumann": (Neumann(3), lambda jt, g: g + jt @ (g + jt @ g)),
    "Phantom": (Phantom(2, 0.5), lambda jt, g: 0.5 * g + 0.5 * (0.5 * g + 0.5 * (jt @ g))),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_each_state_has_the_gradient_that_the_adjoint_takes_there(name, w, b):
    adjoint, of = ADJOINTS[name]
    solution = tdeq.fixed_point(f, torch.zeros(3, 5, dtype=F64), (w, b), adjoint=adjoint, tol=1e-12, at=(1, 4))
    for count, state in zip((1, 4), solution.states, strict=True):
        assert torch.equal(state, steps(w, b, count))
        g = torch.randn_like(state)
        got = torch.autograd.grad(state, (w, b), g, retain_graph=True)
        torch.testing.assert_close(got, gradient(of, state, w, b, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Picard(damping=0.7), Anderson(), Broyden()], ids=str)
def test_the_states_are_those_of_the_solver(solver, w, b):
    seen = {}
    options = {"solver": solver, "tol": 1e-10, "callback": lambda k, z, residual: seen.update({k: z.clone()})}
    solution = tdeq.fixed_point(f, torch.zeros(3, 5, dtype=F64), (w, b), at=(2, 3), **options)
    assert torch.equal(solution.states[0], seen[3]) and torch.equal(solution.states[1], seen[4])


def test_a_loss_on_several_states_adds_their_gradients(w, b):
    z0, layer = torch.zeros(3, 5, dtype=F64), {"adjoint": OneStep(), "tol": 1e-10}
    solution = tdeq.fixed_point(f, z0, (w, b), at=(1, 2), **layer)
    together = torch.autograd.grad(sum(s.square().sum() for s in (*solution.states, solution.value)), w)[0]
    solution = tdeq.fixed_point(f, z0, (w, b), at=(1, 2), **layer)
    apart = [torch.autograd.grad(s.square().sum(), w)[0] for s in (*solution.states, solution.value)]
    torch.testing.assert_close(together, sum(apart))


def test_a_sample_that_has_stopped_stays_and_after_the_end_there_is_the_solution(w):
    b = torch.randn(3, 5, dtype=F64) * torch.tensor([[1e-9], [1.0], [1.0]], dtype=F64)
    alone = tdeq.fixed_point(f, torch.zeros(1, 5, dtype=F64), (w, b[:1]), atol=1e-8)
    solution = tdeq.fixed_point(f, torch.zeros(3, 5, dtype=F64), (w, b), atol=1e-8, at=(6, 50))
    assert alone.steps.item() < 6 < solution.steps.max() < 50
    assert torch.equal(solution.states[0][:1], alone.value)
    assert torch.equal(solution.states[1], solution.value)
    grads = [torch.autograd.grad(z.sum(), w, retain_graph=True)[0] for z in (solution.states[1], solution.value)]
    assert torch.equal(*grads)


def test_states_have_the_structure_of_the_start():
    def pair(state, x):
        a, c = state["a"], state["c"]
        return {"a": 0.5 * torch.cos(c.sum(1, keepdim=True)) + x, "c": 0.3 * a.to(c.dtype).expand_as(c)}

    z0 = {"a": torch.zeros(2, 1), "c": torch.zeros(2, 3, dtype=torch.bfloat16)}
    kinds = []
    solution = tdeq.fixed_point(
        pair, z0, (torch.ones(2, 1),), tol=1e-3, at=[2], callback=lambda k, z, r: kinds.append((z["c"].dtype, r.shape))
    )
    (state,) = solution.states
    assert state["a"].shape == (2, 1) and state["c"].dtype == torch.bfloat16
    assert set(kinds) == {(torch.bfloat16, (2,))} and len(kinds) == solution.steps.max()


def test_after_each_evaluation_its_residual_is_handed_out(w, b):
    calls = []
    options = {"tol": 1e-8, "trace": True, "callback": lambda k, z, residual: calls.append((k, z, residual.clone()))}
    solution = tdeq.fixed_point(f, torch.zeros(3, 5, dtype=F64), (w, b), **options)
    assert [k for k, *_ in calls] == list(range(1, solution.steps.max() + 1))
    assert torch.equal(torch.stack([residual for *_, residual in calls]), solution.trace)
    assert not any(z.requires_grad for _, z, _ in calls)
    solution.value.sum().backward()
    assert len(calls) == solution.steps.max() and solution.adjoint.steps.max() > 1


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [Affine, MLP])
def test_kernels_give_the_same_states(kind, device):
    """By fused steps, for a kernel that does the whole solve has no states to give."""
    layer, x = DEQ(kind(8), adjoint=Implicit(tol=1e-6), tol=1e-5).to(device), torch.randn(3, 8, device=device)
    found, calls = {}, []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solution = layer.solve(x, at=(1, 3))
            assert layer.solve(x, callback=lambda k, z, residual: calls.append(k)).route == solution.route
        assert max(calls) == solution.steps.max()
        calls.clear()
        grads = torch.autograd.grad(solution.states[1].sum(), list(layer.parameters()))
        found[name] = *solution.states, *grads
    assert solution.route == tdeq.Route.FUSED
    torch.testing.assert_close(found["triton"], found["torch"], rtol=0, atol=1e-5)  # ten times the tolerance


def test_an_unrolled_net_gives_the_states_of_its_steps_with_their_whole_gradient(w, b):
    solution = tdeq.fixed_point(f, torch.zeros(3, 5, dtype=F64), (w, b), adjoint=Unrolled(6), at=(2, 6))
    for count, state in zip((2, 6), solution.states, strict=True):
        expected = steps(w, b, count)
        assert torch.equal(state, expected)
        got, truth = (torch.autograd.grad(z.square().sum(), (w, b), retain_graph=True) for z in (state, expected))
        assert all(map(torch.equal, got, truth))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("last", [1, 3, 7])
def test_only_the_last_steps_have_a_gradient(last, checkpoint, w, b):
    """To the bit that of the loop that recursive reasoners are trained with."""
    z0 = torch.randn(3, 5, dtype=F64, requires_grad=True)
    value = tdeq.fixed_point(f, z0, (w, b), adjoint=Unrolled(7, checkpoint, last)).value
    z = z0
    with torch.no_grad():
        for _ in range(7 - last):
            z = f(z, w, b)
    for _ in range(last):
        z = f(z, w, b)
    assert torch.equal(value, z)
    inputs = (w, b, z0) if last == 7 else (w, b)
    got, truth = (torch.autograd.grad(y.square().sum(), inputs) for y in (value, z))
    assert all(map(torch.equal, got, truth))


def test_a_layer_unrolls_its_last_steps():
    layer, x = DEQ(Affine(4)).unrolled(5, last=2), torch.randn(2, 4)
    solution = layer.solve(x, at=(3, 4))
    assert [state.requires_grad for state in solution.states] == [False, True]


class Scaled(nn.Module):
    """A cell with further arguments, of which some are no tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=F64)
        nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, z, x, scale=None, *, kind="tanh", options=None):
        x = x["x"] if isinstance(x, dict) else x
        y = self.linear(z) + (x if scale is None else x * scale)
        return y.tanh() if kind == "tanh" else y


def test_further_arguments_reach_the_cell_with_gradients():
    cell, x = Scaled(), torch.randn(2, 4, dtype=F64)
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def solved(scale, layer):
        return layer(x, scale=scale, kind="tanh", options={"depth": 3, "name": None})

    layer, long = DEQ(cell, tol=1e-13, adjoint=Implicit(tol=1e-13)), DEQ(cell).unrolled(60)
    torch.testing.assert_close(solved(scale, layer), solved(scale, long), rtol=1e-10, atol=1e-10)
    assert not torch.equal(layer(x, kind="linear"), layer(x, kind="tanh"))
    for way in (layer, long):
        assert torch.autograd.gradcheck(lambda s, way=way: solved(s, way), scale)
    assert torch.autograd.gradgradcheck(lambda s: solved(s, layer), scale, atol=1e-4)
    lent = {"cell.linear.weight": 0.5 * cell.linear.weight.detach()}

    def with_lent(scale):
        return torch.func.functional_call(layer, lent, (x,), {"scale": scale})

    assert torch.autograd.gradgradcheck(with_lent, scale, atol=1e-4)


def test_inputs_may_hold_what_is_no_tensor():
    layer, x = DEQ(Scaled(), tol=1e-10), torch.randn(2, 4, dtype=F64)
    whole = layer({"x": x, "name": "a", "length": 3, "nothing": None}, torch.zeros_like(x))
    assert torch.equal(whole, layer(x))


def test_further_arguments_of_a_cell_of_ours_go_to_inject():
    class Shifted(Affine):
        def inject(self, x, shift=0.0):
            return super().inject(x + shift)

    layer, x = DEQ(Shifted(4)), torch.randn(2, 4)
    assert torch.equal(layer(x, shift=0.5), layer(x + 0.5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'shfit'"):
        layer(x, shfit=0.5)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"at": (0,)}, ValueError, "at must be at least 1"),
        ({"at": (2.0,)}, TypeError, "at must be an int"),
        ({"at": (3, 9), "max_steps": 8}, ValueError, r"up to max_steps, 8, got \(3, 9\)"),
        ({"at": (4,), "adjoint": Unrolled(3)}, ValueError, "up to the steps of Unrolled, 3"),
        ({"callback": 3}, TypeError, "callback must be callable, got 3"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        tdeq.fixed_point(torch.cos, torch.zeros(1, 1), **options)


class Energy(nn.Module):
    """A step down the gradient of an energy: the cell enables grad for itself, and goes on from a graph it is given."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.2 * torch.randn(5, 5, dtype=F64))

    def forward(self, z, x):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = (z - x).square().sum() / 2 + (z @ self.w).square().sum() / 2
            return z - 0.5 * torch.autograd.grad(energy, z, create_graph=True)[0]


class EnergyAside(Energy):
    """Hands out the norms of the state, which has a graph, beside it."""

    def forward(self, z, x):
        y = super().forward(z, x)
        with torch.enable_grad():
            return y, {"norms": y.norm(dim=1), "name": "energy"}


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_steps_without_a_gradient_have_none_though_the_cell_enables_it(damping):
    cell, x, z = Energy(), torch.randn(3, 5, dtype=F64), torch.zeros(3, 5, dtype=F64)
    net = DEQ(cell, solver=Picard(damping)).unrolled(6, last=2)
    for k in range(6):
        y = cell(z, x)
        z = torch.lerp(z, y if k >= 4 else y.detach(), damping)
    value = net(x)
    torch.testing.assert_close(value, z, rtol=1e-12, atol=1e-12)
    of_w, right = (torch.autograd.grad(y.sum(), cell.w)[0] for y in (value, z))
    torch.testing.assert_close(of_w, right, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not net(x).requires_grad and torch.equal(net(x), value)
    checkpoint(net, x.clone().requires_grad_(), use_reentrant=True).sum().backward()  # first without grad, then with it
    torch.testing.assert_close(cell.w.grad, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(4)], ids=repr)
def test_what_a_cell_hands_out_has_a_graph_where_grad_is_enabled_alone(adjoint):
    layer, x = DEQ(EnergyAside(), adjoint=adjoint, has_aux=True), torch.randn(3, 5, dtype=F64)
    assert layer.solve(x).aux["norms"].requires_grad
    with torch.no_grad():
        assert not layer.solve(x).aux["norms"].requires_grad


def test_more_last_steps_than_steps_are_refused():
    with pytest.raises(ValueError, match="last must be at most steps, 3, got 4"):
        Unrolled(3, last=4)


def test_a_solver_of_another_equation_has_no_such_states():
    layer = DEQ(Monotone(4), solver=PeacemanRachford())
    with pytest.raises(ValueError, match="at and callback are for Picard, Anderson and Broyden"):
        layer.solve(torch.randn(2, 4), at=(2,))
