"""Gradients: against closed forms to second order, against each other, and in every mode autograd has."""

import gc
import weakref

import pytest
import torch
from problems import NUMBERS, PROBLEMS, tanh_problem
from torch.utils.checkpoint import checkpoint

from tritondeq import Anderson, Broyden, Implicit, Neumann, OneStep, Phantom, Picard, Unrolled, fixed_point

EXACT = [
    (Picard(), Implicit()),
    (Anderson(), Implicit()),
    (Broyden(), Implicit()),
    (Picard(), Implicit(solver=Anderson(3), tol=1e-13, max_steps=400)),
    (Picard(), Unrolled(400)),
]
APPROXIMATE = [OneStep(), Neumann(3), Phantom(4, 0.8)]


def solve(problem, params, solver, adjoint):
    return fixed_point(problem.f, problem.z0, params, solver=solver, adjoint=adjoint, tol=1e-13, max_steps=400).value


def leaves(problem):
    return tuple(p.clone().requires_grad_() for p in problem.params)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("solver,adjoint", EXACT, ids=repr)
def test_first_and_second_derivatives_are_those_of_the_closed_form(problem, solver, adjoint):
    if not problem.contractive and isinstance(solver, Picard):
        pytest.skip("plain iteration is repelled")
    params = leaves(problem)
    weights = torch.linspace(0.5, 1.5, problem.z0.numel(), dtype=torch.float64).reshape(problem.z0.shape)

    def derivatives(value):
        first = torch.autograd.grad((value * weights).sum(), params, create_graph=True)
        probe = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).reshape(g.shape) ** 2).sum() for g in first)
        probe = probe + sum(g.sum() for g in first)
        return first, torch.autograd.grad(probe, params, allow_unused=True, materialize_grads=True)

    first, second = derivatives(solve(problem, params, solver, adjoint))
    true_first, true_second = derivatives(problem.answer(*params))
    for got, true in zip((*first, *second), (*true_first, *true_second), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NUMBERS)
def test_published_digits(name):
    problem = next(p for p in PROBLEMS if p.name == name)
    value, firsts, seconds = NUMBERS[name]
    params = leaves(problem)
    z = solve(problem, params, Picard(), Implicit())
    assert z.item() == pytest.approx(value, rel=1e-12)
    for i, first in firsts.items():
        (g,) = torch.autograd.grad(z.sum(), params[i], create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), params[i], retain_graph=True)
        assert g.item() == pytest.approx(first, rel=1e-10) and h.item() == pytest.approx(seconds[i], rel=1e-9)


@pytest.mark.parametrize("solver,adjoint", [*EXACT[:-1], (Picard(), Unrolled(40))], ids=repr)
def test_gradcheck_and_gradgradcheck(solver, adjoint):
    gen = torch.Generator().manual_seed(3)
    a = (0.4 * torch.randn(3, 3, generator=gen, dtype=torch.float64)).requires_grad_()
    b = torch.randn(2, 3, generator=gen, dtype=torch.float64).requires_grad_()

    def value(a, b):
        state = {"x": torch.zeros(2, 3, dtype=torch.float64), "y": (torch.zeros(2, 1, dtype=torch.float64),)}

        def f(z):
            x = torch.tanh(z["x"] @ a.T + b + z["y"][0] / 4)
            return {"x": x, "y": (torch.sin(x.sum(1, keepdim=True) / 3) * b[:, :1],)}

        out = fixed_point(f, state, solver=solver, adjoint=adjoint, tol=1e-14, max_steps=400).value
        return out["x"], out["y"][0]

    assert torch.autograd.gradcheck(value, (a, b))
    assert torch.autograd.gradgradcheck(value, (a, b))


def test_a_third_derivative_raises():
    b = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    z = fixed_point(lambda z: torch.tanh(0.6 * z + b), torch.zeros(1, 1, dtype=torch.float64), tol=1e-12).value
    (g,) = torch.autograd.grad(z.sum(), b, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(h.sum(), b)


class Closure:
    """z = tanh(W z + u(x)) with W captured, u computed outside, and a buffer that needs no gradient."""

    def __init__(self, dtype=torch.float64, seed: int = 0):
        gen = torch.Generator().manual_seed(seed)
        self.w = torch.nn.Parameter(0.25 * torch.randn(5, 5, generator=gen, dtype=dtype))
        self.encoder = torch.nn.Linear(3, 5, dtype=dtype)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.randn(5, 3, generator=gen, dtype=dtype))
            self.encoder.bias.zero_()
        self.x = torch.randn(4, 3, generator=gen, dtype=dtype)
        self.params = [self.w, *self.encoder.parameters()]

    def f(self):
        u = self.encoder(self.x)
        return lambda z: torch.tanh(torch.nn.functional.linear(z, self.w) + u)

    def value(self, adjoint=Implicit(), tol=1e-13, solver=Picard(), **kw):  # noqa: B008
        z0 = torch.zeros(4, 5, dtype=self.w.dtype)
        return fixed_point(self.f(), z0, adjoint=adjoint, tol=tol, max_steps=400, solver=solver, **kw).value

    def grads(self, loss, **kw):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.params, **kw)])

    def truth(self):
        return self.grads(self.value(Unrolled(400)).pow(2).sum())


@pytest.fixture
def closure():
    return Closure()


def solved(f, z0=None, args=(), adjoint=Implicit()):  # noqa: B008
    z0 = torch.zeros(4, 5, dtype=torch.float64) if z0 is None else z0
    return fixed_point(f, z0, args, adjoint=adjoint, tol=1e-13, max_steps=400).value


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Neumann(400), Phantom(800, 0.7), Unrolled(300, checkpoint=True)], ids=repr
)
def test_captured_tensors_get_gradients(closure, adjoint):
    close(closure.grads(closure.value(adjoint).pow(2).sum()), closure.truth())


def test_explicit_arguments_get_gradients(closure):
    u = closure.encoder(closure.x)
    z = solved(lambda z, w, c: torch.tanh(z @ w.T + c["u"]), args=(closure.w, {"u": u}))
    close(closure.grads(z.pow(2).sum()), closure.truth())


def test_a_constant_map_hands_its_constant_through():
    c = torch.randn(2, 3, requires_grad=True)
    z = fixed_point(lambda z: c, torch.zeros(2, 3)).value
    z.pow(2).sum().backward()
    assert torch.equal(z, c) and torch.equal(c.grad, 2 * c)


def test_nothing_to_differentiate_means_no_graph():
    assert not fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3)).value.requires_grad
    z0 = torch.zeros(2, 3, requires_grad=True)  # the fixed point does not depend on where one starts
    assert not fixed_point(lambda z: 0.5 * z + 1, z0).value.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not Closure().value().requires_grad
    z = fixed_point(lambda z: 0.5 * z + 1, z0, adjoint=Unrolled(3)).value
    (g,) = torch.autograd.grad(z.sum(), z0)
    assert torch.equal(g, torch.full((2, 3), 0.125))


def test_a_graph_inside_f_is_seen_through():
    """An energy cell: f takes a gradient of a leaf that it makes."""
    w = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    b = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def energy(z):
        with torch.enable_grad():
            q = z if z.requires_grad else z.detach().requires_grad_()
            e = (torch.tanh(q @ w).cosh().log() + b * q).sum()
            return 0.5 * torch.autograd.grad(e, q, create_graph=True)[0]

    def grads(adjoint):
        z = solved(energy, torch.zeros(2, 4, dtype=torch.float64), adjoint=adjoint)
        return torch.autograd.grad(z.pow(2).sum(), (w, b))

    close(grads(Implicit()), grads(Unrolled(300)))


class Opaque(torch.autograd.Function):
    """z W', through a Function, whose arguments no mode can see."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z, w)
        return z @ w.T

    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g @ w, g.T @ z


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("hidden", ["a leaf", "an input", "all by a compiler"])
def test_what_cannot_be_seen_through_still_has_first_derivatives_and_a_second_raises(closure, hidden):
    u, w = closure.encoder(closure.x), closure.w
    f, words = {
        "a leaf": (lambda z: torch.tanh(Opaque.apply(z, w) + u), "second derivatives need"),
        "an input": (lambda z: torch.tanh(z @ w.T + Opaque.apply(u, torch.eye(5).double())), "second derivatives need"),
        "all by a compiler": (torch.compile(closure.f(), backend="aot_eager"), ""),
    }[hidden]
    z = solved(f)
    close(closure.grads(z.pow(2).sum(), retain_graph=True), closure.truth())
    (g,) = torch.autograd.grad(z.pow(2).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(g.sum(), w)


def test_two_calls_before_one_backward_and_a_retained_graph(closure):
    loss = closure.value().pow(2).sum() + 2 * closure.value(solver=Anderson()).pow(2).sum()
    first = closure.grads(loss, retain_graph=True)
    close(first, 3 * closure.truth())
    assert torch.equal(first, closure.grads(loss, retain_graph=True))
    with torch.no_grad():
        closure.w.add_(1)
    with pytest.raises(RuntimeError, match="in ?place"):  # torch's error, or ours where it has let the change pass
        closure.grads(loss)


def test_a_solution_feeds_the_next_solve(closure):
    def twice(adjoint):
        first = closure.value(adjoint)
        f = closure.f()
        return closure.grads(solved(lambda z: 0.5 * f(z) + 0.3 * first, adjoint=adjoint).pow(2).sum())

    close(twice(Implicit()), twice(Unrolled(400)))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("adjoint", [Implicit(), Neumann(300), Unrolled(300)], ids=repr)
def test_checkpointing_around_the_solve(closure, use_reentrant, adjoint):
    def layer(x):
        u = closure.encoder(x)
        return solved(lambda z: torch.tanh(z @ closure.w.T + u), adjoint=adjoint)

    x = closure.x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    close(torch.cat([p.grad.flatten() for p in closure.params]), closure.truth())


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(3, 0.8), Neumann(4), Unrolled(8)], ids=repr)
def test_autocast_around_the_solve(adjoint):
    closure = Closure(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = closure.value(adjoint, tol=1e-2)
        again = closure.f()(z.detach())  # the same weights, in the same autocast, after the solve
    assert z.dtype == torch.float32
    assert closure.grads(again.pow(2).sum()).norm() > 0  # no cast cached under no_grad cut this graph
    got = closure.grads(z.pow(2).sum())
    exact = closure.grads(closure.value(adjoint, tol=1e-6).pow(2).sum())
    assert (got - exact).norm() / exact.norm() < 3e-2


@pytest.mark.parametrize("adjoint", [Implicit(tol=1e-5), Neumann(3), Phantom(3, 0.5), OneStep()], ids=repr)
@pytest.mark.parametrize("c", [1e-8, 1e-4, 1e5])
def test_the_gradient_is_homogeneous_in_the_loss(adjoint, c):
    closure = Closure(torch.float32)
    c = 2.0 ** round(torch.tensor(c).log2().item())
    loss = closure.value(adjoint, tol=1e-6).pow(2).sum()
    assert torch.equal(closure.grads(loss, retain_graph=True) * c, closure.grads(c * loss))


def test_the_smallest_gradients_are_solved_like_any_other():
    """Squares of these underflow in float32; a norm of zero must not pass for convergence."""
    closure = Closure(torch.float32)
    z = closure.value(Implicit(tol=1e-6), tol=1e-6)
    exact = closure.grads(z.sum(), retain_graph=True)
    got = closure.grads((z * 2.0**-100).sum())
    torch.testing.assert_close(got * 2.0**100, exact, rtol=1e-5, atol=1e-5)


def test_one_sample_that_does_not_converge_leaves_the_others_gradients_right():
    rates = torch.tensor([[0.5], [2.0], [-0.7]], dtype=torch.float64, requires_grad=True)
    b = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda z: rates * z + b, torch.zeros(3, 2, dtype=torch.float64), tol=1e-12, max_steps=100)
    assert solution.status.tolist()[::2] == [0, 0] and solution.status[1] != 0
    with pytest.warns(UserWarning, match="a backward solve.* did not converge"):
        gr, gb = torch.autograd.grad(solution.value.sum(), (rates, b))
    true = 1 / (1 - rates.detach()[::2])
    torch.testing.assert_close(gb[::2], true.expand(2, 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(gr[::2], 2 * true**2, rtol=1e-9, atol=0)
    assert gr.isfinite().all() and gb.isfinite().all()
    adjoint = solution.adjoint
    assert adjoint.status.tolist()[::2] == [0, 0] and adjoint.status[1] != 0 and adjoint.steps.shape == (3,)


def test_masked_elements_do_not_stop_the_backward_solve():
    w = torch.tensor([0.5, 0.999], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False]])
    solution = fixed_point(lambda z: w * z + 1, torch.zeros(1, 2, dtype=torch.float64), mask=mask, tol=1e-9)
    (g,) = torch.autograd.grad(solution.value[:, 0].sum(), w)
    assert g[0].item() == pytest.approx(4, rel=1e-7) and g[1] == 0 and solution.adjoint.converged.all()


@pytest.mark.parametrize("adjoint", APPROXIMATE, ids=repr)
def test_approximate_gradients_are_their_formula(closure, adjoint):
    """Against the dense Jacobian, sample by sample; their derivative raises."""
    z = closure.value(adjoint)
    (got,) = torch.autograd.grad(z.pow(2).sum(), closure.encoder.bias)
    total = torch.zeros(5, dtype=torch.float64)
    count, t = {OneStep(): (1, 1), Neumann(3): (3, 1), Phantom(4, 0.8): (4, 0.8)}[adjoint]
    for row in z.detach():
        slope = 1 - row**2
        m = (1 - t) * torch.eye(5, dtype=torch.float64) + t * (slope.unsqueeze(1) * closure.w.detach()).T
        total += slope * sum(t * torch.linalg.matrix_power(m, k) @ (2 * row) for k in range(count))
    close(got, total)
    (g,) = torch.autograd.grad(closure.value(adjoint).sum(), closure.w, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{type(adjoint).__name__}.*approximation.*Implicit"):
        torch.autograd.grad(g.sum(), closure.w)


def test_one_step_is_exact_where_the_jacobian_vanishes():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    z = solved(lambda z: (z + a / z) / 2, torch.ones(1, 1, dtype=torch.float64), adjoint=OneStep())
    (g,) = torch.autograd.grad(z.sum(), a)
    assert g.item() == pytest.approx(1 / (2 * 2**0.5), rel=1e-12)


def test_unrolled_is_a_plain_loop():
    f, w, u = tanh_problem(3, 8, 0.8, torch.float64)
    z0 = torch.randn(3, 8, dtype=torch.float64)
    solution = fixed_point(f, z0, solver=Picard(0.7), adjoint=Unrolled(5), trace=True)
    z = z0
    for _ in range(5):
        before, y = z, f(z)
        z = 0.3 * z + 0.7 * y
    close(solution.value, z, 1e-12)
    close(solution.residual, (y - before).norm(dim=1) / y.norm(dim=1), 1e-12)
    assert (solution.steps == 5).all() and solution.trace.shape == (5, 3)


def test_training_memory_does_not_grow_with_steps():
    w = torch.randn(64, 64, requires_grad=True)

    def saved(max_steps):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.nbytes), x)[1], lambda x: x):
            fixed_point(lambda z: torch.tanh(z @ w), torch.ones(32, 64), tol=1e-12, max_steps=max_steps)
        return sum(sizes)

    assert saved(4) == saved(64) > 0


def test_nothing_outlives_the_graph(closure):
    """Without waiting for the collector: no cycle ties the solve to what it captured."""
    gc.collect()
    gc.disable()
    try:
        u = closure.encoder(closure.x)
        captured = weakref.ref(u)
        z = fixed_point(lambda z, u=u: torch.tanh(0.3 * z + u), torch.zeros(4, 5, dtype=torch.float64)).value
        torch.autograd.grad(z.pow(2).sum(), closure.encoder.weight, create_graph=True)[0].sum().backward()
        del u, z
        assert captured() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: Neumann(0), ValueError, "terms"),
        (lambda: Neumann(), TypeError, "terms"),
        (lambda: Phantom(5, 0), ValueError, "damping"),
        (lambda: Phantom(5, 1.5), ValueError, "damping.*1.5"),
        (lambda: Phantom(0, 0.5), ValueError, "steps"),
        (lambda: Unrolled(0), ValueError, "steps"),
        (lambda: Unrolled(3, checkpoint=1), TypeError, "checkpoint"),
        (lambda: Implicit(tol=0), ValueError, "tol"),
        (lambda: Implicit(solver="picard"), TypeError, "solver"),
        (lambda: Implicit(max_steps=0), ValueError, "max_steps"),
        (lambda: Closure().value(Unrolled(3), solver=Anderson()), ValueError, "Unrolled.*Picard.*Anderson"),
    ],
)
def test_bad_options_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
