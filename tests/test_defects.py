"""What the library people use now, torchdeq 0.1.0, gets wrong: each defect as a test of ours.

Where torchdeq is installed, the comparison that made the defect visible runs beside it.
"""

import pytest
import torch
from problems import tanh_problem

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, OneStep, Picard, Status, Unrolled, fixed_point


def torchdeq_layer(**options):
    """A solver of torchdeq by plain iteration, in train(); skips the rest of the test where it is not installed."""
    torchdeq = pytest.importorskip("torchdeq")
    options = {"f_solver": "fixed_point_iter", "f_max_iter": 200, "f_tol": 1e-5} | options
    return torchdeq.get_deq(**options).train()


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_d1_anderson_is_not_slower_than_plain_iteration(gain):
    """There: 13 / 30 / 73 evaluations where plain iteration takes 11 / 25 / 54, for an absolute ridge."""
    f, _, _ = tanh_problem(256, 256, gain)
    z0 = torch.zeros(256, 256)
    ours = {s: fixed_point(f, z0, solver=s, tol=1e-4, max_steps=300).steps.max().item() for s in (Picard(), Anderson())}
    assert ours[Anderson()] < ours[Picard()]
    _, info = torchdeq_layer(f_solver="anderson", f_max_iter=300, f_tol=1e-4, f_stop_mode="rel")(f, z0)
    assert ours[Anderson()] < info["nstep"].max().item()


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_d2_gradients_do_not_depend_on_the_scale_of_the_loss(scale):
    """There: a loss of 1e-8 gets a gradient that is off by a third, for an absolute tolerance."""
    f, w, _ = tanh_problem(8, 32, 0.45)
    w.requires_grad_()
    z0, options = torch.zeros(8, 32), {"tol": 1e-5, "max_steps": 200}

    def error(z):
        return ((torch.autograd.grad((scale * z.sin()).sum(), w)[0] - exact).norm() / exact.norm()).item()

    unrolled = fixed_point(f, z0, adjoint=Unrolled(200)).value
    exact = torch.autograd.grad((scale * unrolled.sin()).sum(), w)[0]
    ours = error(fixed_point(f, z0, **options).value)
    assert ours < 1e-4 < 1e-3 < error(fixed_point(f, z0, adjoint=OneStep(), **options).value)
    if scale == 1e-8:
        theirs = error(torchdeq_layer(ift=True, b_solver="fixed_point_iter", b_max_iter=200, b_tol=1e-5)(f, z0)[0][-1])
        assert theirs > 0.2


def test_d3_second_derivatives_are_right():
    """There: -1.3022, silently."""
    b = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)

    def second(z):
        (g,) = torch.autograd.grad(z.sum(), b, create_graph=True)
        return torch.autograd.grad(g.sum(), b)[0].item()

    f, z0 = lambda z: torch.tanh(0.6 * z + b), torch.zeros(1, 1, dtype=torch.float64)
    assert second(fixed_point(f, z0, tol=1e-13).value) == pytest.approx(-3.7329238706515873, rel=1e-10)
    layer = torchdeq_layer(ift=True, f_tol=1e-13, b_solver="fixed_point_iter", b_max_iter=200, b_tol=1e-13)
    assert second(layer(f, z0)[0][-1]) == pytest.approx(-1.302, abs=1e-3)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d6_half_precision_states_run_in_every_solver(solver, dtype):
    f, _, _ = tanh_problem(4, 16, 0.45)
    solution = fixed_point(lambda z: f(z.float()).to(dtype), torch.zeros(4, 16, dtype=dtype), solver=solver)
    assert solution.converged.all() and solution.value.dtype == dtype


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_d7_nan_in_one_sample_neither_poisons_nor_delays_the_others(solver):
    """There: the whole batch runs to max_iter."""
    calls = []

    def f(z):
        calls.append(1)
        y = 0.5 * z + 1
        return torch.cat([y[:1] + float("nan"), y[1:]])

    solution = fixed_point(f, torch.zeros(3, 4), solver=solver, tol=1e-4, max_steps=200)
    assert solution.status.tolist() == [Status.NONFINITE, 0, 0] and solution.value.isfinite().all()
    assert len(calls) < 30
    if solver == Picard():
        calls.clear()
        torchdeq_layer(f_stop_mode="rel", f_tol=1e-4)(f, torch.zeros(3, 4))
        assert len(calls) > 200


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


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_d12_few_steps_are_steps(solver):
    """There: Anderson with max_iter <= 2 returns z0 untouched; here any number does what it can."""
    f, _, _ = tanh_problem(2, 8, 0.5)
    runs = [fixed_point(f, torch.zeros(2, 8), solver=solver, tol=1e-9, max_steps=k) for k in (1, 2, 3, 4)]
    residuals = [run.residual.max() for run in runs]
    assert residuals == sorted(residuals, reverse=True) and residuals[3] < 0.7 * residuals[0]


def test_dict_states_work():
    """There: AssertionError."""
    solution = fixed_point(lambda z: {"a": 0.5 * z["a"] + 1}, {"a": torch.zeros(2, 3)}, tol=1e-5)
    assert solution.converged.all()


def test_each_sample_costs_its_own_steps():
    rates = torch.tensor([[0.1], [0.5], [0.9], [0.99]])
    solution = fixed_point(lambda z: rates * z + 1, torch.zeros(4, 3), tol=1e-5, max_steps=1000)
    assert solution.steps[0] < 10 < solution.steps[2] < solution.steps[3] / 4
