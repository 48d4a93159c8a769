"""Every solver against closed forms, and each against what only it promises."""

import pytest
import torch
from problems import PROBLEMS, tanh_problem

from tritondeq import Anderson, Broyden, Picard, Status, fixed_point
from tritondeq.kernels.rules import SAFEGUARD

SOLVERS = [Picard(), Picard(damping=0.7), Anderson(), Anderson(memory=2, damping=0.8), Broyden(), Broyden(memory=3)]
SOLVERS += [Anderson(half=True)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_reaches_the_known_fixed_point(problem, solver):
    if not problem.contractive and (isinstance(solver, Picard) or solver in (Anderson(memory=2, damping=0.8),)):
        pytest.skip("plain and damped iteration are repelled")
    solution = fixed_point(problem.f, problem.z0, problem.params, solver=solver, tol=1e-12, max_steps=500)
    assert solution.converged.all(), solution
    torch.testing.assert_close(solution.value, problem.answer(*problem.params), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_residual_reported_is_that_of_the_value(solver):
    f, _, _ = tanh_problem(9, 33, 0.6, torch.float64)
    solution = fixed_point(f, torch.zeros(9, 33, dtype=torch.float64), solver=solver, tol=1e-5, max_steps=40)
    y = f(solution.value)
    torch.testing.assert_close(solution.residual, (y - solution.value).norm(dim=1) / y.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "solver, steps",
    [
        (Anderson(memory=6, ridge=0), 6 + 2),  # D + 1 residuals give D differences; one more evaluation to see it
        (Broyden(12), 2 * 6 + 2),  # Gay 1979
    ],
)
def test_an_affine_problem_ends_in_few_steps(solver, steps):
    a = torch.linspace(-0.9, 0.95, 6, dtype=torch.float64).diag()
    solution = fixed_point(lambda z: z @ a + 1, torch.zeros(1, 6, dtype=torch.float64), solver=solver, tol=1e-10)
    assert solution.steps.item() <= steps


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_anderson_needs_no_more_evaluations_than_picard(gain, dtype, tol):
    f, _, _ = tanh_problem(256, 256, gain, dtype)
    z0 = torch.zeros(256, 256, dtype=dtype)
    picard, anderson = (fixed_point(f, z0, solver=s, tol=tol, max_steps=300) for s in (Picard(), Anderson(memory=5)))
    assert picard.converged.all() and anderson.converged.all()
    assert (anderson.steps <= picard.steps).all()
    assert anderson.steps.max() < picard.steps.max()


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_rounding_half_of_the_history_costs_no_evaluations(gain):
    f, _, _ = tanh_problem(64, 64, gain, torch.float32)
    options = {"tol": 1e-5, "max_steps": 300}
    whole, half = (fixed_point(f, torch.zeros(64, 64), solver=Anderson(half=h), **options) for h in (False, True))
    assert half.converged.all() and not torch.equal(half.value, whole.value)
    assert half.steps.float().mean() <= 1.02 * whole.steps.float().mean()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_path_does_not_change_when_the_problem_is_scaled(solver, scale):
    z0 = torch.zeros(8, 32)
    scale = 2.0 ** round(torch.tensor(scale).log2().item())  # exact in binary, so that equal means to the bit
    plain, scaled = (
        fixed_point(tanh_problem(8, 32, 0.9, scale=s)[0], z0, solver=solver, tol=1e-5, trace=True) for s in (1.0, scale)
    )
    assert torch.equal(plain.steps, scaled.steps)
    torch.testing.assert_close(scaled.trace, plain.trace, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-5, atol=1e-7)


def test_samples_do_not_share_history():
    """Anderson's and Broyden's weights are per sample: a hard neighbour changes nothing, not even rounding."""
    rates = torch.tensor([0.1, 0.5, 0.9, -0.99]).unsqueeze(1) * torch.linspace(0.5, 1, 7)
    for solver in (Anderson(memory=3), Broyden(memory=4)):
        options = {"solver": solver, "tol": 1e-5, "max_steps": 100}
        together = fixed_point(lambda z: rates * z + 1, torch.zeros(4, 7), **options)
        for i in range(4):
            alone = fixed_point(lambda z, r: r * z + 1, torch.zeros(1, 7), (rates[i : i + 1],), **options)
            assert together.steps[i] == alone.steps[0]
            torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-5, atol=1e-6)


def test_a_singular_small_system_becomes_a_plain_step():
    """A constant map makes every difference zero; a repeated one makes the Gram matrix singular."""
    c = torch.ones(2, 3)
    for solver in (Anderson(ridge=0), Broyden()):
        solution = fixed_point(lambda z: c, torch.zeros(2, 3), solver=solver)
        assert solution.converged.all() and torch.equal(solution.value, c)
        # every residual lies in one direction, so that the Gram matrix has rank one
        solution = fixed_point(lambda z: 0.5 * z + c, torch.zeros(2, 3), solver=solver, tol=1e-6)
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, 2 * c)


@torch.no_grad()
@pytest.mark.parametrize("above, plain", [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_a_sample_that_is_thrown_off_takes_a_plain_step(solver, above, plain):
    """The third residual is `above` times SAFEGUARD times the best: what is evaluated next is f(z), or it is not."""
    shown = []

    def f(z):
        shown.append(z.clone())
        relative = [1.0, 1e-3, above * SAFEGUARD * 1e-3, 0.5][len(shown) - 1]
        return z / (1 - relative) if relative < 1 else z + 1

    fixed_point(f, torch.zeros(1, 3, dtype=torch.float64), solver=solver, tol=1e-9, max_steps=4)
    y = shown[2] / (1 - above * SAFEGUARD * 1e-3)
    assert torch.allclose(shown[3], y, rtol=1e-12) == plain


@torch.no_grad()
def test_a_cell_may_write_over_what_it_returned():
    """As a cell captured in a CUDA graph does."""
    out = torch.empty(2, 3, dtype=torch.float64)

    def f(z):
        return out.copy_(torch.tanh(0.5 * z + 1))

    for solver in SOLVERS:
        solution = fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), solver=solver, tol=1e-10)
        assert solution.converged.all()
        assert torch.allclose(torch.tanh(0.5 * solution.value + 1), solution.value, rtol=1e-9)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_a_masked_element_is_outside_every_inner_product(solver):
    """The unmasked elements behave as if the others, which diverge, were not there."""
    a = torch.tensor([[0.9, 0.2, 0.1], [-0.3, 0.7, 0.2], [0.1, -0.4, 0.8]], dtype=torch.float64)
    b = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)

    def alone(z):
        return torch.sin(z @ a.T) + b

    def both(z):
        return torch.cat([alone(z[:, :3]), 3 * z[:, 3:] + 1], dim=1)

    mask = torch.tensor([[True] * 3 + [False] * 2])
    part = fixed_point(alone, torch.zeros(1, 3, dtype=torch.float64), solver=solver, tol=1e-9)
    whole = fixed_point(both, torch.zeros(1, 5, dtype=torch.float64), solver=solver, tol=1e-9, mask=mask)
    assert part.converged.all() and torch.equal(part.steps, whole.steps)
    torch.testing.assert_close(whole.value[:, :3], part.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: Picard(damping=0), ValueError, "damping.*above 0 and below 2.*got 0"),
        (lambda: Picard(damping=2.0), ValueError, "damping"),
        (lambda: Picard(damping="1"), TypeError, "damping.*number.*'1'"),
        (lambda: Picard(damping=float("nan")), ValueError, "damping"),
        (lambda: Anderson(memory=0), ValueError, "memory.*at least 1.*0"),
        (lambda: Anderson(memory=2.5), TypeError, "memory.*integer.*2.5"),
        (lambda: Anderson(ridge=-1e-9), ValueError, "ridge"),
        (lambda: Anderson(lam=1e-4), TypeError, "lam"),
        (lambda: Anderson(half=1), TypeError, "half must be a bool, got 1"),
        (lambda: Broyden(memory=0), ValueError, "memory"),
        (lambda: Broyden(memory=True), TypeError, "memory"),
    ],
)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_solver_is_a_value():
    assert Anderson(memory=3) == Anderson(memory=3) and hash(Picard()) == hash(Picard())
    with pytest.raises(AttributeError):
        Picard().damping = 0.5


def test_chaos_is_reported():
    z0 = torch.full((2, 1), 0.4, dtype=torch.float64)
    r = torch.tensor([[3.3], [3.95]], dtype=torch.float64)  # a two-cycle, and chaos
    solution = fixed_point(lambda z: r * z * (1 - z), z0, tol=1e-9)
    assert (solution.status == Status.MAX_STEPS).all()
    with pytest.raises(RuntimeError, match="2 of 2 samples MAX_STEPS"):
        solution.raise_if_failed()
