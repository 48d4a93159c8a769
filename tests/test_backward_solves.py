"""A backward solve that fails is never returned in silence: it warns, with `throw` it raises, and NaN stays NaN."""

import warnings

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Neumann, Phantom, Picard, fixed_point

FAILED = "a backward solve.* did not converge"


def repelled(adjoint=None, throw=False, **options):
    """dz/da of z = 1.3 z - 0.3 a from its solution a: 1, where plain iteration runs away."""
    a = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    adjoint = Implicit() if adjoint is None else adjoint
    solution = fixed_point(lambda z: 1.3 * z - 0.3 * a, a.detach(), adjoint=adjoint, throw=throw, **options)
    (got,) = torch.autograd.grad(solution.value.sum(), a)
    return got.item(), solution


def test_it_warns_and_throws():
    with pytest.warns(UserWarning, match=FAILED):
        got, solution = repelled()
    assert abs(got) < 10 and not solution.adjoint.converged.any(), "the best iterate, not the last"
    with pytest.raises(RuntimeError, match=FAILED + ".*1 of 1 samples GROWING"):
        repelled(throw=True)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_a_secant_method_solves_it_in_silence(solver):
    for options in ({"solver": solver}, {"adjoint": Implicit(solver=solver)}):
        assert repelled(tol=1e-6, throw=True, **options)[0] == pytest.approx(1, rel=1e-5)


def test_a_layer_passes_throw_on():
    layer, x = DEQ(nn.Linear(3, 3, bias=False).double(), throw=True), torch.zeros(2, 3, dtype=torch.float64)
    layer.cell.forward = lambda z, x: z @ (1.3 * layer.cell.weight.sign().abs().diag().diag_embed()) + x
    z = layer(x)
    with pytest.raises(RuntimeError, match=FAILED):
        z.sum().backward()


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_the_residual_is_relative_to_the_cotangent(rate):
    """So its tolerance bounds the error of u = g / (1 - rate), however much larger than g that is."""
    a = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    adjoint = Implicit(tol=1e-3, max_steps=20000)
    z = fixed_point(lambda z: rate * z + (1 - rate) * a, a.detach(), adjoint=adjoint).value
    assert torch.autograd.grad(z.sum(), a)[0].item() == pytest.approx(1, abs=2e-3)


def test_samples_that_depend_on_one_another_are_right_or_reported():
    """Rows are nodes of a ring: where all stop together, u is that of one system, and else a warning comes."""
    eye, right = torch.eye(6, dtype=torch.float64), 0
    a = 0.4 * (torch.roll(eye, 1, 0) + torch.roll(eye, -1, 0))
    x = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    for spread in torch.linspace(0, 1, 20).tolist():
        g = torch.linspace(1 - spread, 1, 6, dtype=torch.float64)[:, None].expand(6, 2)
        z = fixed_point(lambda z: a @ z + x, torch.zeros_like(x).detach(), tol=1e-9, max_steps=500).value
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (got,) = torch.autograd.grad(z, x, g)
        if not caught:
            torch.testing.assert_close(got, torch.linalg.solve(eye - a.T, g), rtol=1e-6, atol=0)
            right += 1
        else:
            assert "samples of the batch depend on one another" in str(caught[0].message)
    assert 0 < right < 20


def test_one_scale_for_samples_that_depend_on_one_another():
    """Cotangents on either side of a power of two, at nodes of a ring that all stop in one step: nothing shows it."""
    eye = torch.eye(6, dtype=torch.float64)
    a = 0.4 * (torch.roll(eye, 1, 0) + torch.roll(eye, -1, 0))
    x = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.05, 0.95], dtype=torch.float64).repeat(3)[:, None].expand(6, 2)
    adjoint = Implicit(tol=1.05 * 0.8**100, max_steps=500)
    solution = fixed_point(lambda z: a @ z + x, torch.zeros_like(x).detach(), tol=1e-9, max_steps=500, adjoint=adjoint)
    (got,) = torch.autograd.grad(solution.value, x, g)
    assert solution.adjoint.converged.all() and len(solution.adjoint.steps.unique()) == 1
    torch.testing.assert_close(got, torch.linalg.solve(eye - a.T, g), rtol=1e-8, atol=0)


def test_it_is_said_of_second_derivatives():
    """z1 = 0.1 z1 + (z2 - 20)^2, z2 = 0.95 z2 + b: only the second derivative needs hundreds of steps."""
    b = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def f(z, b):
        return torch.stack([0.1 * z[:, 0] + (z[:, 1] - 20).square(), 0.95 * z[:, 1] + b], 1)

    start = torch.tensor([[0.0, 20.0]], dtype=torch.float64)
    z = fixed_point(f, start, (b,), adjoint=Implicit(tol=1e-8, max_steps=20), tol=1e-8).value
    (first,) = torch.autograd.grad(z[:, 0].sum(), b, create_graph=True)
    with pytest.warns(UserWarning, match=FAILED):
        torch.autograd.grad(first, b)


def root(z):
    return torch.where(z > 0, torch.sqrt(z), 0.0)


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Implicit(solver=Anderson()), Implicit(solver=Broyden()), Neumann(40), Phantom(40, 0.9)],
    ids=repr,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:a backward solve")
def test_nan_in_the_jacobian_of_one_sample_stays_nan_and_stays_there(adjoint):
    """z = r(z) / 4 + 0.3 z + b, r(z) = sqrt(z) above 0: autograd has 0 times NaN for the branch that was not taken."""
    b = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    start = torch.sign(b.detach())
    z = fixed_point(lambda z: 0.25 * root(z) + 0.3 * z + b, start, tol=1e-12, max_steps=200, adjoint=adjoint).value
    (got,) = torch.autograd.grad(z.sum(), b)
    exact = 1 / (0.7 - 1 / (8 * z[0].detach().sqrt()))
    torch.testing.assert_close(got[0], exact, rtol=1e-6, atol=0)
    assert got[1].isnan().all()


@pytest.mark.filterwarnings("ignore:a backward solve")
def test_the_outcome_of_each_sample_is_in_the_solution():
    rates = torch.tensor([[0.3], [1.3], [-0.4]], dtype=torch.float64)
    a = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda z: rates * z + (1 - rates) * a, a.detach().clone(), tol=1e-6)
    (got,) = torch.autograd.grad(solution.value.sum(), a)
    torch.testing.assert_close(got[::2], torch.ones(2, 1, dtype=torch.float64), rtol=1e-5, atol=0)
    assert solution.adjoint.converged.tolist() == [True, False, True]


def test_options_are_checked():
    for options, error in (({"atol": -1.0}, ValueError), ({"atol": "0"}, TypeError), ({"throw": 1}, TypeError)):
        with pytest.raises(error, match=next(iter(options))):
            fixed_point(torch.cos, torch.zeros(2, 3), **options)
        with pytest.raises(error, match=next(iter(options))):
            DEQ(nn.Linear(3, 3), **options)


def test_a_solution_is_frozen_and_names_its_route():
    solution = fixed_point(torch.cos, torch.zeros(2, 3), solver=Picard(), atol=1e-2)
    assert solution.route is tdeq.Route.TORCH and "tensors are on cpu" in solution.why
    with pytest.raises(AttributeError):
        solution.value = None
