"""What the library people use now, torchdeq 0.1.0, gets wrong: each defect as a test of ours.

Where torchdeq is installed, the comparison that made the defect visible runs beside it.
"""

import pytest
import torch
from problems import tanh_problem

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, OneStep, Picard, Status, Unrolled, fixed_point


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_d1_anderson_is_not_slower_than_plain_iteration(gain):
    """There: 21 / 46 / 116 evaluations where plain iteration takes 13 / 27 / 67, for an absolute ridge."""
    f, _, _ = tanh_problem(256, 256, gain)
    z0 = torch.zeros(256, 256)
    ours = {s: fixed_point(f, z0, solver=s, tol=1e-4, max_steps=300).steps.max().item() for s in (Picard(), Anderson())}
    assert ours[Anderson()] < ours[Picard()]
    torchdeq = pytest.importorskip("torchdeq")
    deq = torchdeq.get_deq(f_solver="anderson", f_max_iter=300, f_tol=1e-4, f_stop_mode="rel")
    _, info = deq(f, z0)
    assert ours[Anderson()] < info["nstep"].max().item()


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_d2_gradients_do_not_depend_on_the_scale_of_the_loss(scale):
    """There: a loss of 1e-8 gets the one-step gradient, off by half, for an absolute tolerance."""
    f, w, u = tanh_problem(8, 32, 0.45)
    w.requires_grad_()

    def grad(adjoint):
        z = fixed_point(f, torch.zeros(8, 32), adjoint=adjoint, tol=1e-5, max_steps=200).value
        return torch.autograd.grad((scale * z.sin()).sum(), w)[0]

    exact, ours, one = grad(Unrolled(200)), grad(tdeq.Implicit()), grad(OneStep())
    assert (ours - exact).norm() < 1e-4 * exact.norm() < 1e-3 * (one - exact).norm()


def test_d3_second_derivatives_are_right():
    """There: -1.3022, silently."""
    b = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    z = fixed_point(lambda z: torch.tanh(0.6 * z + b), torch.zeros(1, 1, dtype=torch.float64), tol=1e-13).value
    (g,) = torch.autograd.grad(z.sum(), b, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), b)
    assert h.item() == pytest.approx(-3.7329238706515873, rel=1e-10)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d6_half_precision_states_run_in_every_solver(solver, dtype):
    f, _, _ = tanh_problem(4, 16, 0.45)
    solution = fixed_point(lambda z: f(z.float()).to(dtype), torch.zeros(4, 16, dtype=dtype), solver=solver)
    assert solution.converged.all() and solution.value.dtype == dtype


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_d7_nan_in_one_sample_neither_poisons_nor_delays_the_others(solver):
    """There: all NaN, and the whole batch runs to max_iter."""
    calls = []

    def f(z):
        calls.append(1)
        y = 0.5 * z + 1
        return torch.cat([y[:1] + float("nan"), y[1:]])

    solution = fixed_point(f, torch.zeros(3, 4), solver=solver, tol=1e-4, max_steps=200)
    assert solution.status.tolist() == [Status.NONFINITE, 0, 0] and solution.value.isfinite().all()
    assert len(calls) < 30


def test_d8_early_convergence_never_swaps_the_gradient():
    f, w, _ = tanh_problem(4, 16, 0.3)
    w.requires_grad_()
    z = fixed_point(f, torch.zeros(4, 16), tol=1e-6, max_steps=500).value
    exact = fixed_point(f, torch.zeros(4, 16), adjoint=Unrolled(100)).value
    a, b = (torch.autograd.grad(v.sin().sum(), w)[0] for v in (z, exact))
    assert (a - b).norm() < 1e-4 * b.norm()


def test_d9_unknown_options_raise():
    for make in (
        lambda: DEQ(tdeq.cells.Affine(4), stop_mode="rel"),
        lambda: Anderson(lam=1e-4),
        lambda: fixed_point(lambda z: z, torch.zeros(1, 1), f_tol=1e-3),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            make()


def test_d10_eval_mode_is_differentiable():
    layer = DEQ(tdeq.cells.Affine(4)).eval()
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.norm() > 0


def test_d12_few_steps_are_steps():
    """There: Anderson with max_iter <= 2 returns z0 untouched; here any number does what it can."""
    f, _, _ = tanh_problem(2, 8, 0.5)
    for solver in (Picard(), Anderson(), Broyden()):
        residuals = [
            fixed_point(f, torch.zeros(2, 8), solver=solver, tol=1e-9, max_steps=k).residual.max() for k in (1, 2, 3, 4)
        ]
        assert residuals == sorted(residuals, reverse=True) and residuals[3] < 0.7 * residuals[0]


def test_dict_states_work():
    """There: AssertionError."""
    solution = fixed_point(lambda z: {"a": 0.5 * z["a"] + 1}, {"a": torch.zeros(2, 3)}, tol=1e-5)
    assert solution.converged.all()


def test_each_sample_costs_its_own_steps():
    """There: all four rows of rates .1 / .5 / .9 / .99 run the 500 steps of the slowest."""
    rates = torch.tensor([[0.1], [0.5], [0.9], [0.99]])
    solution = fixed_point(lambda z: rates * z + 1, torch.zeros(4, 3), tol=1e-5, max_steps=1000)
    assert solution.steps[0] < 10 < solution.steps[2] < solution.steps[3] / 4
