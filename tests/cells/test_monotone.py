"""The monotone cell and the splittings that solve it: certificates, closed forms, gradients, both backends."""

import pytest
import torch

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, ForwardBackward, Implicit, Neumann, PeacemanRachford, Picard, Unrolled
from tritondeq.cells import Affine, Monotone

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
SPLITTINGS = [PeacemanRachford(), PeacemanRachford(0.3), PeacemanRachford(2.0), ForwardBackward()]


def expansive(features=12, activation="relu", margin=0.5, gain=4.0, dtype=torch.float64):
    """A cell whose ||W|| is above 1."""
    cell = Monotone(features, activation=activation, margin=margin, dtype=dtype)
    with torch.no_grad():
        cell.parametrizations.weight.original1.mul_(gain)
    assert torch.linalg.matrix_norm(cell.weight, 2) > 1.2
    return cell


def dense(cell, z, x):
    """(I - S W, S) of each row at a solution, from the formula of the cell."""
    pre = z @ cell.weight.T + cell.input(x)
    slope = (pre > 0).to(z.dtype) if cell.activation == "relu" else 1 - torch.tanh(pre) ** 2
    return torch.eye(z.shape[1], dtype=z.dtype) - slope[:, :, None] * cell.weight, slope


@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_the_equation_and_its_certificate_for_any_parameters(margin):
    cell = Monotone(7, 3, margin=margin).double()
    a, b = cell.parametrizations.weight.original0, cell.parametrizations.weight.original1
    for scale in (0.0, 30.0, 1.0):
        with torch.no_grad():
            a.copy_(scale * torch.randn(7, 7))
            b.copy_(scale * torch.randn(7, 7))
        expected = (1 - margin) * torch.eye(7, dtype=torch.float64) - a.T @ a + b - b.T
        torch.testing.assert_close(cell.weight, expected, rtol=1e-14, atol=1e-14)
        assert cell.monotonicity() >= margin * (1 - 1e-9)
    assert torch.linalg.matrix_norm(cell.weight, 2) > 5
    for alpha in (0.1, 1.0):
        layer = DEQ(cell, solver=PeacemanRachford(alpha), tol=1e-10, max_steps=10_000)
        assert layer.solve(torch.randn(4, 3, dtype=torch.float64)).converged.all()


def test_assigning_a_weight_keeps_the_nearest_monotone_one():
    cell = Monotone(6, margin=0.4).double()
    inside = cell.weight.detach().clone()
    cell.weight = inside
    torch.testing.assert_close(cell.weight, inside, rtol=1e-12, atol=1e-12)
    cell.weight = 2 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(cell.weight, 0.6 * torch.eye(6, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, 3.0])
def test_every_row_of_a_and_b_can_learn(margin):
    """At initialisation, and after a weight was assigned whose symmetric part is cut off in half of the directions."""
    cell, x = Monotone(64, margin=margin), torch.randn(100, 64)
    for weight in (None, torch.randn(64, 64) / 8):
        if weight is not None:
            cell.weight = weight
        cell.zero_grad()
        DEQ(cell, tol=1e-5)(x).square().sum().backward()
        for part in (cell.parametrizations.weight.original0, cell.parametrizations.weight.original1):
            assert part.grad.norm(dim=1).min() > 1e-6 * part.grad.norm(dim=1).max()


@pytest.mark.parametrize("features", [64, 512])
@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, 3.0])
def test_a_weight_begins_as_large_as_that_of_affine(margin, features):
    """Both parts have the spectral norm 0.9 / sqrt 2 of the parts of a normal matrix of norm 0.9, or what m allows."""
    w = Monotone(features, margin=margin).weight.detach().double()
    half, g = (w - w.mT) / 2, 0.9 / 2**0.5
    assert 0.85 * g < torch.linalg.matrix_norm(half, 2) < 1.1 * g
    values = torch.linalg.eigvalsh((w + w.mT) / 2)
    assert values[-1] <= min(g * 1.15, 1 - margin) + 1e-6
    assert abs(values[0] - (min(1 - margin, 0) - g)) < 0.15 * g


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("solver", SPLITTINGS, ids=repr)
def test_solves_what_plain_iteration_does_not(solver, activation):
    cell, x = expansive(activation=activation), torch.randn(6, 12, dtype=torch.float64)
    assert not DEQ(cell, solver=Picard(), max_steps=500, tol=1e-9).solve(x).converged.all()
    solution = DEQ(cell, solver=solver, tol=1e-12, max_steps=5000).solve(x)
    assert solution.converged.all()
    z = solution.value
    right = ACTIVATIONS[activation](z @ cell.weight.T + x @ cell.input.weight.T + cell.input.bias)
    torch.testing.assert_close(z, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("w", [0.9, -1.5, -20.0])
def test_scalar_closed_form(w):
    """z = relu(w z + b) is max(b, 0) / (1 - w)."""
    cell = Monotone(1, margin=0.05).double()
    cell.weight = torch.tensor([[w]], dtype=torch.float64)
    b = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1)
    with torch.no_grad():
        cell.input.weight.fill_(1)
        cell.input.bias.zero_()
    for solver in SPLITTINGS:
        z = DEQ(cell, solver=solver, tol=1e-13, max_steps=20_000)(b)
        torch.testing.assert_close(z, b.clamp_min(0) / (1 - w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("solver", SPLITTINGS, ids=repr)
def test_gradients_are_those_of_the_dense_system(solver, activation):
    cell, x = expansive(activation=activation), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    z = DEQ(cell, solver=solver, tol=1e-13, max_steps=20_000)(x)
    g = torch.randn_like(z)
    grads = torch.autograd.grad(z, [x, cell.input.weight, *cell.parametrizations.weight.parameters()], g)
    system, slope = dense(cell, z.detach(), x)
    v = slope * torch.linalg.solve(system.mT, g)
    w = cell.weight
    expected = torch.autograd.grad(w, tuple(cell.parametrizations.weight.parameters()), v.T @ z.detach())
    for a, b in zip(grads, (v @ cell.input.weight, v.T @ x, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [PeacemanRachford(), pytest.param(ForwardBackward(), marks=pytest.mark.slow)], ids=repr
)
def test_second_derivatives(solver):
    cell, x = expansive(4, "tanh", gain=4.0), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer = DEQ(cell, solver=solver, tol=1e-13, max_steps=20_000)
    assert torch.autograd.gradcheck(layer, x, atol=1e-6)
    assert torch.autograd.gradgradcheck(layer, x, atol=1e-5)


@pytest.mark.parametrize("forward, backward", [(Picard(), PeacemanRachford()), (PeacemanRachford(), Anderson(8))])
def test_forward_and_backward_solvers_may_differ(forward, backward):
    cell, x = expansive(gain=2.5), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    if isinstance(forward, Picard):
        cell = Monotone(12).double()
    exact = DEQ(cell, tol=1e-12, max_steps=5000)(x)
    mixed = DEQ(cell, solver=forward, adjoint=Implicit(solver=backward), tol=1e-12, max_steps=5000)(x)
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), x) for z in (exact, mixed)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_residual_bounds_that_of_the_cell():
    cell, x = expansive(), torch.randn(6, 12, dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64)
    for alpha in (0.2, 1.0, 3.0):
        solution = DEQ(cell, solver=PeacemanRachford(alpha), tol=1e-4, max_steps=5000).solve(x)
        z, injection = solution.value, cell.inject(x)
        pre = z @ cell.weight.T + injection[0]
        w = z - alpha * (pre - z)  # not the solver's last iterate, but as large as the one at the solution
        factor = (1 / alpha + torch.linalg.matrix_norm(eye - cell.weight, 2)) / 2
        bound = factor * solution.residual * (w.norm(dim=1) * 1.05)
        assert ((cell(z, injection) - z).norm(dim=1) <= bound).all()


def test_lipschitz_bound_holds_and_is_not_idle():
    cell = Monotone(8, margin=0.7).double()
    layer, bound = DEQ(cell, tol=1e-12, max_steps=5000), cell.lipschitz()
    x = torch.randn(1, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(8, 8)
    assert torch.linalg.matrix_norm(jacobian, 2) <= bound
    with torch.no_grad():  # z = x / m where W = (1 - m) I and z > 0
        for p in cell.parametrizations.weight.parameters():
            p.zero_()
        cell.input.weight.copy_(torch.eye(8))
        cell.input.bias.zero_()
    jacobian = torch.autograd.functional.jacobian(layer, x.abs()).reshape(8, 8)
    assert torch.linalg.matrix_norm(jacobian, 2) == pytest.approx(1 / 0.7, rel=1e-9)
    assert 1 / 0.7 <= cell.lipschitz() < 1.05 / 0.7


def test_the_resolvent_is_computed_once_for_a_solve_and_its_gradient(monkeypatch):
    calls = []
    inv = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda m: calls.append(1) or inv(m))
    DEQ(Monotone(6))(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 1


def test_warm_start_at_the_solution_takes_one_step():
    cell, x = expansive(), torch.randn(5, 12, dtype=torch.float64)
    for solver in SPLITTINGS:
        layer = DEQ(cell, solver=solver, tol=1e-9, max_steps=5000)
        z = DEQ(cell, solver=solver, tol=1e-13, max_steps=20_000)(x)
        layer(x, z)
        assert (layer.last.steps == 1).all()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "solver",
    [
        *(PeacemanRachford(), PeacemanRachford(0.5)),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (ForwardBackward(), Picard())),
    ],
    ids=repr,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_agree_with_torch(solver, activation):
    cell = Monotone(10, activation=activation, dtype=torch.float32)
    if not isinstance(solver, Picard):
        with torch.no_grad():
            cell.parametrizations.weight.original1.mul_(2.0)
    x, results = torch.randn(2, 3, 10), []
    exact = Monotone(10, activation=activation).double()
    exact.load_state_dict(cell.state_dict())
    truth = DEQ(exact, tol=1e-13, max_steps=5000)(x.double())
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            layer = DEQ(cell, solver=solver, tol=1e-6, max_steps=2000)
            z = layer(x)
            grads = torch.autograd.grad(z.sin().sum(), list(cell.parameters()))
        assert layer.last.converged.all() and layer.last.adjoint.converged.all()
        results.append([layer.last.steps, z, *grads])
        torch.testing.assert_close(z.double(), truth, rtol=0, atol=2e-4 if solver == ForwardBackward() else 2e-5)
    fused = solver != ForwardBackward() or activation == "relu"
    fused &= solver != PeacemanRachford(0.5) or activation == "relu"
    assert layer.last.route is (tdeq.Route.KERNEL if fused else tdeq.Route.FUSED)
    assert (results[0][0] - results[1][0]).abs().max() <= 1
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.slow
def test_wide_cells_take_steps_that_hold_the_product():
    cell, x, results = Monotone(260), torch.randn(2, 260), []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            layer = DEQ(cell, tol=1e-5, max_steps=200)
            z = layer(x)
            results.append([z, *torch.autograd.grad(z.sin().sum(), list(cell.parameters()))])
    for path in (layer.last.why, layer.last.adjoint.why):
        assert path.startswith("one launch a step and its GEMM")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_autocast_rounds_no_certificate():
    cell, x = expansive(16, dtype=torch.float32), torch.randn(4, 16)
    exact = cell.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cell.weight, exact)
        layer = DEQ(cell, tol=1e-5, max_steps=500)
        z = layer(x)
    assert z.dtype == torch.float32 and layer.last.converged.all()
    z.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in cell.parameters())


def test_solvers_and_adjoints_of_a_layer():
    assert DEQ(Monotone(4)).solver == PeacemanRachford() and DEQ(Affine(4)).solver == Picard()
    assert DEQ(Monotone(4), adjoint=Unrolled(3)).solver == Picard()
    x, cell = torch.randn(3, 8, dtype=torch.float64), Monotone(8).double()
    grads = [
        torch.autograd.grad(DEQ(cell, adjoint=adjoint, tol=1e-12, max_steps=500)(x).sum(), cell.input.weight)[0]
        for adjoint in (Implicit(), Neumann(200))
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("precision, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_prox_of_tanh_over_alphas(precision, bound):
    splitting = Monotone(3, activation="tanh").to(precision).splitting((torch.zeros(1, 3), torch.zeros(3, 3)))
    t = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-8, 0, 99)]).double()
    for alpha in (0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0):
        y = alpha * t + (1 - alpha) * t.tanh()
        z = splitting.prox(y.to(precision), alpha)
        torch.testing.assert_close(z.double(), t.tanh(), rtol=bound, atol=bound)
