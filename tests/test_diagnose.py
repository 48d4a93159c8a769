"""Each change that diagnose advises is made, and helps."""

import math

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, OneStep, Phantom, Picard, Status, Unrolled, diagnose


class Block(nn.Module):
    """act(A z + x)."""

    def __init__(self, a, act=lambda x: x):
        super().__init__()
        self.a, self.act = nn.Parameter(a), act

    def forward(self, z, x):
        return self.act(z @ self.a.T + x)


class Residual(nn.Module):
    """A pre-norm residual block, and what it lacks."""

    def __init__(self, width, outer=False):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.outer = nn.LayerNorm(width) if outer else nn.Identity()

    def forward(self, z, x):
        return self.outer(z + x + self.linear(self.norm(z)).tanh())


def turning(angle, rho):
    return rho * torch.matrix_exp(torch.tensor([[0, -angle], [angle, 0]]))


def named(diagnosis, name):
    return [advice for advice in diagnosis.advice if name in advice.changes]


@pytest.mark.parametrize(
    ("name", "angle", "rho", "solvers"),
    [
        ("oscillates", 2.0, 1.5, {Picard(0.4), Anderson(), Broyden()}),
        ("repels", 0.3, 1.5, {Anderson(), Broyden()}),
        ("slow", 0.3, 0.95, {Anderson(), Broyden()}),
    ],
)
def test_advice_for_solves_that_fail(name, angle, rho, solvers):
    layer, x = DEQ(Block(turning(angle, rho))), torch.randn(16, 2)
    diagnosis = diagnose(layer, x)
    assert (diagnosis.solution.status >= Status.MAX_STEPS).all()
    solved = [advice for advice in diagnosis.advice if {"solver", "max_steps"} & set(advice.changes)]
    assert solvers <= {advice.changes.get("solver") for advice in solved}
    assert any("max_steps" in advice.changes for advice in solved) == (name == "slow")
    for advice in solved:
        for attribute, value in advice.changes.items():
            setattr(layer, attribute, value)
        layer(x)
        assert layer.last.converged.all(), advice
        layer.solver, layer.max_steps = Picard(), 50
    torch.testing.assert_close(diagnosis.radius, torch.full((16,), rho), rtol=1e-4, atol=0)
    assert any("jacobian_penalty" in advice.text for advice in diagnosis.advice) == (rho > 1)
    assert not named(diagnosis, "adjoint"), "the backward solve goes as the forward one does"


def test_growing_needs_an_outer_norm():
    x = torch.randn(16, 8)
    diagnosis = diagnose(DEQ(Residual(8)), x)
    assert (diagnosis.solution.status == Status.GROWING).all()
    assert math.isnan(diagnosis.floor) and math.isnan(diagnosis.apart) and "floor" not in str(diagnosis)
    (advice,) = diagnosis.advice
    assert "16 of 16 samples GROWING" in advice.text and "outer norm" in advice.text and not advice.changes
    diagnosis = diagnose(DEQ(Residual(8, outer=True)), x)
    assert diagnosis.solution.converged.all() and diagnosis.advice == []


@pytest.mark.parametrize(
    ("act", "x", "text"),
    [
        (torch.log, torch.randn(8, 4), "8 of 8 samples NONFINITE"),
        # 1 below a half and 0 above it: damping looks well by the Jacobian, which is 0, and is tried in vain
        (lambda y: (y < 0.5) + 0 * y, torch.zeros(8, 4), "no solver tried finds a fixed point"),
    ],
)
def test_no_fixed_point_at_all(act, x, text):
    (advice,) = diagnose(DEQ(Block(torch.eye(4), act)), x).advice
    assert text in advice.text and not advice.changes


@pytest.mark.parametrize("width", [2, 64])
def test_anderson_is_named_where_it_is_worth_it(width):
    a, x = 0.7 * torch.linalg.qr(torch.randn(width, width))[0], torch.randn(16, width)
    plain, faster = DEQ(Block(a)), DEQ(Block(a), solver=Anderson())
    for layer in (plain, faster):
        layer(x)
    before, after = plain.last.steps.median(), faster.last.steps.median()
    assert before > 15 and (after <= 0.7 * before) == (width == 2)
    advice = [advice.text for advice in named(diagnose(plain, x), "solver")]
    assert advice == [f"solver=Anderson(): a median of {after} steps, not {before}"] * (width == 2)


def test_a_tolerance_below_the_floor():
    layer, x = DEQ(tdeq.cells.Affine(16), tol=1e-9, solver=Anderson()), torch.randn(32, 16)
    diagnosis = diagnose(layer, x)
    assert (diagnosis.solution.status == Status.PLATEAU).any()
    (advice,) = named(diagnosis, "tol")
    assert diagnosis.floor < advice.changes["tol"] < 3 * diagnosis.floor and diagnosis.floor < 1e-6
    layer.tol = advice.changes["tol"]
    layer(x)
    assert layer.last.converged.all()


@pytest.mark.parametrize("gain", [0.5, 0.95, 1.5])
def test_a_backward_solve_that_fails(gain):
    """With a gain of 1.5 the forward solve fails too, and Anderson's equilibrium is where the backward one is tried."""
    layer = DEQ(Block(turning(0.3, gain)), adjoint=Implicit(max_steps=2), solver=Picard() if gain > 1 else Anderson())
    x = torch.randn(16, 2)
    diagnosis = diagnose(layer, x)
    assert diagnosis.solution.converged.all() == (gain < 1) and (diagnosis.adjoint.status == Status.MAX_STEPS).all()
    assert gain < 1 or Anderson() in [advice.changes.get("solver") for advice in diagnosis.advice]
    (advice,) = named(diagnosis, "adjoint")
    layer.solver, layer.adjoint = Anderson(), advice.changes["adjoint"]
    layer(x).sum().backward()
    assert layer.last.converged.all() and layer.last.adjoint.converged.all()


@pytest.mark.parametrize(
    ("rho", "adjoint", "low", "high"),
    [(0.8, OneStep(), -1, 0.9), (0.3, OneStep(), 0.9, 1), (0.8, Phantom(steps=30, damping=0.8), 0.999, 1.001)],
)
def test_an_approximate_gradient(rho, adjoint, low, high):
    a, x = rho * torch.linalg.qr(torch.randn(8, 8))[0], torch.randn(16, 8)
    diagnosis = diagnose(DEQ(Block(a), adjoint=adjoint), x)
    assert low < diagnosis.cosine < high and diagnosis.adjoint is None and "cosine" in str(diagnosis)
    advised = [advice.changes["adjoint"] for advice in named(diagnosis, "adjoint")]
    assert advised == [Implicit()] * (diagnosis.cosine < 0.9)


def test_cosine_is_taken_at_the_equilibrium_that_another_solver_reached():
    cell, x = Block(turning(0.3, 1.5)), torch.randn(16, 2)
    lost = diagnose(DEQ(cell, adjoint=OneStep()), x)
    diagnosis = diagnose(DEQ(cell, adjoint=OneStep(), solver=Anderson()), x)
    assert not lost.solution.converged.any() and diagnosis.solution.converged.all()
    assert lost.cosine == pytest.approx(diagnosis.cosine, abs=1e-6)


def test_cosine_is_that_of_the_gradients():
    a, x = 0.6 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0], torch.randn(1, 3, dtype=torch.float64)
    layer = DEQ(Block(a), adjoint=OneStep(), tol=1e-12, max_steps=200)
    diagnosis = diagnose(layer, x).cosine
    with torch.random.fork_rng():
        torch.manual_seed(0x5EED + 1)
        g = torch.randn(1, 3, dtype=torch.float64)
    z = torch.linalg.solve(torch.eye(3) - a, x[0])
    exact = torch.linalg.solve(torch.eye(3) - a.T, g[0])
    one, all_ = (torch.cat([u, torch.outer(u, z).flatten()]) for u in (g[0], exact))
    assert diagnosis == pytest.approx(torch.cosine_similarity(one, all_, dim=0).item(), rel=1e-9)


def test_two_equilibria():
    x = 0.1 * torch.randn(16, 8)
    two, one = DEQ(Block(3 * torch.eye(8), torch.tanh)), DEQ(Block(0.5 * torch.eye(8), torch.tanh))
    diagnosis = diagnose(two, x)
    assert diagnosis.apart > 1 and any("random z0" in advice.text for advice in diagnosis.advice)
    z, other = two(x), two(x, z0=-two(x))
    assert (z + other).abs().max() < 0.1, "tanh(3 z) has an equilibrium of either sign"
    assert diagnose(one, x).apart < 1e-5
    repelled = diagnose(two, torch.zeros(4, 8))  # it starts at 0, which is one
    assert repelled.solution.converged.all() and (repelled.radius - 3).abs().max() < 1e-3
    assert any("spectral radius is up to 3.00" in advice.text for advice in repelled.advice)


ROWS = (4, 6)
LAYERS = {
    "Monotone": (lambda: DEQ(tdeq.cells.Monotone(6)), ROWS),
    "Transformer": (lambda: DEQ(tdeq.cells.Transformer(8, heads=2)), (2, 3, 8)),
    "MultiScale": (lambda: DEQ(tdeq.cells.MultiScale((4, 4), groups=2)), (2, 4, 4, 4)),
    "Unrolled": (lambda: DEQ(tdeq.cells.Affine(6), adjoint=Unrolled(2)), ROWS),
    "warming up": (lambda: DEQ(tdeq.cells.Affine(6)).unrolled(2), ROWS),
    "compiled": (lambda: DEQ(tdeq.cells.Affine(6), compile={"backend": "none such"}), ROWS),
    "captured": (lambda: DEQ(tdeq.cells.Affine(6), graph=True), ROWS),
    "frozen": (lambda: DEQ(tdeq.cells.Affine(6)).requires_grad_(False), ROWS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_well_and_stays_as_it_was(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    names = ("solver", "adjoint", "tol", "max_steps", "last", "graph", "compile_cell", "training")
    options, state = [getattr(layer, name) for name in names], torch.get_rng_state()
    diagnosis = diagnose(layer, x)
    assert options == [getattr(layer, name) for name in names] and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in layer.parameters()) and not x.requires_grad
    assert diagnosis.solution.converged.all() and diagnosis.adjoint.converged.all() and diagnosis.advice == []
    assert diagnosis.radius.shape == diagnosis.solution.status.shape and (diagnosis.radius < 0.9).all()
    assert diagnosis.solution.value is None and diagnosis.adjoint.value is None
    first, *lines, last = str(diagnosis).splitlines()
    assert first.startswith("DEQ of ") and last == "all is well"
    names = ["status", "steps", "residual", "radius", "backward", "floor", "starts"]
    assert [line.split()[0] for line in lines] == names


def test_dropout_has_one_mask():
    layer = DEQ(Block(torch.randn(16, 16) / 8, nn.Sequential(nn.Tanh(), tdeq.FixedDropout(0.5))))
    diagnosis = diagnose(layer, torch.randn(8, 16))
    assert diagnosis.advice == [] and diagnosis.apart < 1e-4
    layer.adjoint = Phantom(steps=40, damping=0.9)
    assert diagnose(layer, torch.randn(8, 16)).cosine > 0.999


def test_bad_input():
    with pytest.raises(TypeError, match="layer must be a DEQ, got Affine"):
        diagnose(tdeq.cells.Affine(4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="x must hold at least one sample"):
        diagnose(DEQ(tdeq.cells.Affine(4)), torch.randn(0, 4))
