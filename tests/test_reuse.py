"""`Implicit(reuse=True)`: the adjoint begins with the forward solve's inverse Jacobian."""

import pytest
import torch
from problems import tanh_problem

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit
from tritondeq.loop import Estimate, Settings, iterate


def gradients(reuse, gain=1.2, name="torch", solver=Broyden(memory=40), tol=1e-9, rows=3, width=24):  # noqa: B008
    """Returns (gradients of weights and injection, adjoint steps), spectral radius about `gain`, twice of one graph."""
    torch.manual_seed(0)
    w = (torch.randn(width, width, dtype=torch.float64) * gain / width**0.5).requires_grad_()
    u = torch.randn(rows, width, dtype=torch.float64).requires_grad_()
    options = {"solver": solver, "adjoint": Implicit(reuse=reuse, max_steps=300), "tol": tol, "max_steps": 300}
    with tdeq.backend(name):
        solution = tdeq.fixed_point(lambda z: torch.tanh(z @ w.T + u), torch.zeros_like(u), **options)
        assert solution.converged.all()
        loss = solution.value.sin().sum()
        return [(torch.autograd.grad(loss, (w, u), retain_graph=True), solution.adjoint.steps) for _ in range(2)]


@pytest.mark.parametrize(
    "name, memory",
    [("torch", 4), ("torch", 40), pytest.param("triton", 4, marks=[pytest.mark.kernels, pytest.mark.slow])],
)
def test_same_gradient(name, memory):
    fresh, _ = gradients(False, solver=Broyden(memory=memory), gain=0.8)[0]
    reused, _ = gradients(True, solver=Broyden(memory=memory), gain=0.8, name=name)[0]
    torch.testing.assert_close(reused, fresh, rtol=1e-6, atol=1e-7)


def test_fewer_products_where_the_ring_holds_the_solve():
    """On the average: stale updates cost a sample more than they save, now and then."""
    (_, fresh), (_, reused) = (gradients(reuse, tol=1e-3, rows=24, width=64)[0] for reuse in (False, True))
    assert reused.sum() <= 0.9 * fresh.sum()


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("width, dtype", [(9, torch.float64), (2049, torch.float64), (40, torch.float32)], ids=str)
def test_kernels_leave_the_same_estimate_but_for_its_oldest_update(width, dtype, memory):
    """Of samples that stop at different steps, beginning with an estimate and without; in float64 by two launches a
    step, of samples that three programs share if they are wide, in float32 by one."""
    a = torch.linspace(-0.9, 0.8, width, dtype=dtype)
    c = torch.randn(3, width, dtype=dtype)
    c[1] = 0.0
    begin, tight = Estimate(), 1e-6 if dtype == torch.float64 else 1e-2
    begin.rings = [0.1 * torch.randn(3, memory, width, dtype=dtype) / width**0.5 for _ in range(2)]
    for estimate in (None, begin):
        solves = []
        for name in ("torch", "triton"):
            left = Estimate()
            settings = Settings(Broyden(memory=memory), 1e-3, 9, None, None, estimate=estimate, leaves=left)
            with tdeq.backend(name):
                solution = iterate(lambda z: a * torch.sin(z) + c, torch.zeros_like(c), settings)
            solves.append((solution.steps, left.rings))
        (steps, eager), (fused_steps, fused) = solves
        assert torch.equal(fused_steps, steps) and steps[1] == 1 and steps[0] > memory + 2
        for rings, exact in zip(fused, eager, strict=True):
            if estimate is None:
                assert not rings[1].any()
            assert torch.equal(rings[1], exact[1]), "it stopped before it had any update"
            torch.testing.assert_close(rings[::2, 1:], exact[::2, 1:], rtol=tight, atol=1e-3 * tight)
            assert not rings[::2, 0].any()


@pytest.mark.filterwarnings("ignore:a backward solve")  # it is cut short
def test_retained_graphs_begin_with_the_same_estimate():
    first, second = gradients(True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_frozen_samples_keep_their_estimate():
    """Batch mates that go on for long change neither values nor steps of the adjoint."""
    _, w, u = tanh_problem(1, 8, 0.3, dtype=torch.float64)
    u = torch.cat([u, 0.1 * u]).requires_grad_()
    slow = torch.tensor([[0.5], [3.3]], dtype=torch.float64)
    alone = []
    for rows in (slice(0, 1), slice(0, 2)):
        solution = tdeq.fixed_point(
            lambda z, rows=rows: torch.tanh(slow[rows] * (z @ w.T) + u[rows]),
            torch.zeros_like(u[rows]),
            solver=Broyden(memory=6),
            adjoint=Implicit(reuse=True),
            tol=1e-8,
        )
        (g,) = torch.autograd.grad(solution.value[0].sum(), u)
        alone.append((g[0], solution.steps, solution.adjoint.steps[0]))
    assert alone[1][1][1] > alone[1][1][0] + 3
    torch.testing.assert_close(alone[0][0], alone[1][0], rtol=1e-12, atol=1e-12)
    assert alone[0][2] == alone[1][2]


def test_second_derivatives():
    _, w, u = tanh_problem(2, 5, 0.4, dtype=torch.float64)
    options = {"solver": Broyden(), "adjoint": Implicit(reuse=True), "tol": 1e-12, "max_steps": 200}

    def layer(w):
        return tdeq.fixed_point(lambda z: torch.tanh(z @ w.T + u), torch.zeros_like(u), **options).value

    assert torch.autograd.gradgradcheck(layer, (w.requires_grad_(),), atol=1e-6)


def test_without_gradient():
    deq = DEQ(torch.nn.Bilinear(4, 4, 4), solver=Broyden(), adjoint=Implicit(reuse=True))
    with torch.no_grad():
        assert deq(torch.zeros(2, 4)).isfinite().all()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: DEQ(torch.nn.Identity(), adjoint=Implicit(reuse=True)), ValueError, "Broyden, got solver Picard"),
        (lambda: Implicit(solver=Anderson(), reuse=True), ValueError, "solver must be None"),
        (lambda: Implicit(reuse=1), TypeError, "reuse must be a bool"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()
