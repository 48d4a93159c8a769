"""Each change that diagnose advises is made, and helps; what a cell must not do is named, and nothing else is."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
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
    # the backward solve goes as the forward one does, but to a residual relative to g, and u is 20 times as large
    assert bool(named(diagnosis, "adjoint")) == (name == "slow")


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


class Wrong(nn.Module):
    """tanh(A z + x), by a function that a test hands in; `count`, `memory` and `table` are there for it to use."""

    def __init__(self, act, width=8, batch_dims=1):
        super().__init__()
        self.linear, self.act, self.batch_dims = nn.Linear(width, width), act, batch_dims
        self.linear.weight.data.mul_(0.5)
        self.register_buffer("memory", torch.zeros(width))
        self.register_buffer("ticks", torch.zeros((), dtype=torch.long))
        self.count, self.table = 0, torch.randn(64, width)

    def forward(self, z, x):
        return self.act(self, z, x, torch.tanh(self.linear(z) + x))


def counted(cell, z, x, y):
    cell.count += 1
    return y + 0.3 * cell.table[cell.count % 64]


def alternating(cell, z, x, y):
    cell.ticks += 1  # in place: the tensor stays
    return y + 0.3 * (-1) ** cell.ticks.item()


def slow_clock(cell, z, x, y):
    cell.count += 1
    return y + 0.3 * cell.table[cell.count // 20 % 64]


def remembering(cell, z, x, y):
    """A running mean, which settles as the state does."""
    with torch.no_grad():
        cell.memory = 0.5 * cell.memory + 0.5 * z.mean(0)
    return 0.5 * y + 0.5 * cell.memory


def starting(cell, z, x, y):
    """It is another map at the first evaluations alone, and solves have made them."""
    cell.count = min(cell.count + 1, 4)
    return y + 0.3 * cell.table[cell.count]


def hidden(cell, z, x, y):
    vars(cell).setdefault("_list", []).append(0)
    return y + 0.3 * (-1) ** len(cell._list)


def dropped_state(cell, z, x, y):
    """Its solution is 0, where noise leaves no trace."""
    return 0.5 * z * (1 + 0.3 * torch.rand_like(z))


NO_FUNCTION = {
    counted: (["cell.count"], "cell.count: make"),
    alternating: (["cell.ticks"], "cell.ticks: make"),
    slow_clock: (["cell.count"], "cell.count: make"),
    starting: (["cell.count"], "cell.count: make"),
    remembering: (["cell.memory"], "cell.memory: make"),
    hidden: ([], "something elsewhere"),
    dropped_state: ([], "draws random numbers"),
    lambda cell, z, x, y: y + 0.1 * torch.randn_like(z): ([], "draws random numbers"),
    lambda cell, z, x, y: F.rrelu(y, training=True): ([], "draws random numbers"),
}


@pytest.mark.parametrize("act", NO_FUNCTION, ids=lambda act: act.__name__)
def test_a_cell_that_is_no_function_of_its_state(act):
    moved, words = NO_FUNCTION[act]
    layer, x = DEQ(Wrong(act), max_steps=60), torch.randn(6, 8)
    before = {name: (value, value.clone()) for name, value in layer.cell.named_buffers()}
    generator = torch.get_rng_state()
    diagnosis = diagnose(layer, x)
    (advice,) = diagnosis.advice
    assert "not a function of its state: two evaluations at one state differ by" in advice.text and words in advice.text
    assert f"{diagnosis.differs:.1e}" in advice.text and 1e-3 < diagnosis.differs < 2 and not advice.changes
    assert list(diagnosis.moved) == moved and math.isnan(diagnosis.coupled) and math.isnan(diagnosis.floor)
    assert diagnosis.radius.isnan().all() and diagnosis.radius.shape == (6,) and "radius" not in str(diagnosis)
    assert layer.cell.count == 0 and torch.equal(torch.get_rng_state(), generator)
    for name, (value, copy) in before.items():
        assert getattr(layer.cell, name) is value and torch.equal(value, copy), name


def test_the_difference_is_relative():
    add = torch.zeros(2, 8)
    add[1] = 1.0

    def act(cell, z, x, y):
        cell.count += 1
        return 100 + add[cell.count % 2] + 0 * y

    assert diagnose(DEQ(Wrong(act)), torch.randn(6, 8)).differs == pytest.approx(0.01, rel=0.02)


def test_what_moves_and_matters_not_is_no_cause():
    def logging(cell, z, x, y):
        cell.count += 1
        cell.same = float("2000.5")  # another object of the same value
        cell.memory = y.detach().mean(0)
        return y

    cell = Wrong(logging)
    cell.same = 2000.5
    diagnosis = diagnose(DEQ(cell), torch.randn(6, 8))
    assert diagnosis.moved == ("cell.count", "cell.memory") and diagnosis.advice == [] and diagnosis.differs == 0


def shared_mean(cell, z, x, y):
    return 0.5 * y + 0.3 * z.mean(0)


COUPLED = {
    "a statistic of the batch": (shared_mean, (16, 8), 1, 0),
    "the sample before": (lambda cell, z, x, y: 0.5 * y + 0.3 * z.roll(1, 0), (13, 8), 1, 0),
    "one sample on the first alone": (
        lambda cell, z, x, y: torch.cat([0.5 * y[:1] + 0.3 * z[6:7], y[1:]]),
        (11, 8),
        1,
        0,
    ),
    "the first on one sample alone": (
        lambda cell, z, x, y: torch.cat([y[:6], 0.5 * y[6:7] + 0.3 * z[:1], y[7:]]),
        (11, 8),
        1,
        0,
    ),
    "two samples": (shared_mean, (2, 8), 1, 0),
    "tokens of a sequence": (lambda cell, z, x, y: 0.5 * y + 0.3 * z.mean(1, keepdim=True), (3, 5, 8), 2, 1),
    "tokens of all": (lambda cell, z, x, y: 0.5 * y + 0.3 * z.mean((0, 1)), (3, 5, 8), -1, 0),
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_depend_on_one_another(name):
    act, shape, batch_dims, right = COUPLED[name]
    layer, x = DEQ(Wrong(act, batch_dims=batch_dims)), torch.randn(shape)
    diagnosis = diagnose(layer, x)
    (advice,) = diagnosis.advice
    assert "samples depend on one another" in advice.text and f"Set batch_dims={right} on the cell" in advice.text
    assert f"{diagnosis.coupled:.1e}" in advice.text and diagnosis.coupled > 0.01 and diagnosis.differs == 0
    layer.cell.batch_dims = right
    diagnosis = diagnose(layer, x)
    assert diagnosis.advice == [] and diagnosis.coupled == 0 and not diagnosis.radius.isnan().any()


def test_batch_dims_of_one_leave_tokens_alone():
    diagnosis = diagnose(DEQ(Wrong(COUPLED["tokens of a sequence"][0])), torch.randn(3, 5, 8))
    assert diagnosis.advice == [] and diagnosis.coupled == 0


def unseen(cell, z, x, y):
    y = y.clone()
    z.data.mul_(0.5)
    return y


OTHER = {
    "its state in place, unseen": (unseen, "changes its state in place, unseen by autograd"),
    "another map with gradients": (
        lambda cell, z, x, y: y + 0.3 * torch.is_grad_enabled(),
        "is it another map where gradients are on",
    ),
    "no gradient by the state": (
        lambda cell, z, x, y: 0.5 * y + torch.where(z > 99, (z - 99).sqrt(), 0.0),
        "6 of 6 samples have a Jacobian that is NaN at their solution",
    ),
    "no gradient by a parameter": (
        lambda cell, z, x, y: 0.5 * y + 0 * (0 * cell.linear.bias).sqrt(),
        "gradient by x or by a parameter is not finite",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_causes(name):
    act, words = OTHER[name]
    (advice,) = diagnose(DEQ(Wrong(act)), torch.randn(6, 8)).advice
    assert words in advice.text and not advice.changes


REFUSED = {
    "in place": (lambda cell, z, x, y: z.mul_(0.5) + x, "changes its state in place"),
    "functional dropout": (lambda cell, z, x, y: F.dropout(y), "dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_pass_and_leave_the_cell_as_it_was(name):
    act, words = REFUSED[name]

    def counts(cell, *args):
        cell.count += 1
        cell.memory += 1
        return act(cell, *args)

    layer = DEQ(Wrong(counts))
    with pytest.raises(RuntimeError, match=words):
        diagnose(layer, torch.randn(6, 8))
    assert layer.cell.count == 0 and not layer.cell.memory.any()


def test_a_layer_that_throws_is_diagnosed_and_warns_of_nothing():
    layer = DEQ(Block(turning(0.3, 1.5)), throw=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diagnosis = diagnose(layer, torch.randn(4, 2))
    assert (diagnosis.solution.status >= Status.MAX_STEPS).all() and named(diagnosis, "solver") and not caught
    assert layer.throw


class Beside(Block):
    def forward(self, z, x):
        return super().forward(z, x), z.sum()


class Recurrent(nn.GRUCell):
    def forward(self, z, x):
        return super().forward(x, z)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = DEQ(tdeq.cells.Affine(6), tol=1e-5)

    def forward(self, z, x):
        return 0.5 * self.inner(torch.tanh(z) + x)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, z, x):
        return self.norm(x + 0.5 * self.attend(z, z, z, need_weights=False)[0])


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, z, x):
        return self.norm(x + 0.3 * self.conv(z))


class Dropping(Wrong):
    def __init__(self):
        super().__init__(lambda cell, z, x, y: cell.drop(y))
        self.drop = tdeq.FixedDropout(0.3)


SOUND = {
    "Affine": (lambda: DEQ(tdeq.cells.Affine(6)), ROWS),
    "rows of tokens": (lambda: DEQ(tdeq.cells.Affine(6)), (2, 3, 6)),
    "Conv": (lambda: DEQ(tdeq.cells.Conv(4, groups=2)), (2, 4, 4, 4)),
    "Gated": (lambda: DEQ(tdeq.cells.Gated(6)), ROWS),
    "MLP": (lambda: DEQ(tdeq.cells.MLP(6)), ROWS),
    "dropout": (lambda: DEQ(Dropping()), (6, 8)),
    "GRU": (lambda: DEQ(Recurrent(6, 6), max_steps=100), ROWS),
    "attention": (lambda: DEQ(Attending()), (3, 5, 8)),
    "image": (lambda: DEQ(Image()), (3, 4, 5, 5)),
    "layer within": (lambda: DEQ(Nested()), ROWS),
    "spectral norm": (lambda: DEQ(Weighted(nn.utils.parametrizations.spectral_norm)), ROWS),
    "weight norm": (lambda: DEQ(Weighted(nn.utils.parametrizations.weight_norm)), ROWS),
    "beside": (lambda: DEQ(Beside(0.5 * torch.eye(6)), has_aux=True), ROWS),
    **{name: LAYERS[name] for name in ("Monotone", "Transformer", "MultiScale")},
}


class Weighted(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.linear = norm(nn.Linear(6, 6))

    def forward(self, z, x):
        return torch.tanh(0.3 * self.linear(z) + x)


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name, mode):
    make, shape = SOUND[name]
    layer, x = make(), torch.randn(shape)
    if mode == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    buffers = {key: value.clone() for key, value in layer.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        diagnosis = diagnose(layer, x)
    assert all(torch.equal(value, buffers[key]) for key, value in layer.named_buffers())
    assert diagnosis.differs == 0 and diagnosis.coupled < 1e-6 and diagnosis.moved == ()
    assert not diagnosis.radius.isnan().any() and not math.isnan(diagnosis.floor)


def test_padding_does_not_count():
    """What a cell puts at padded tokens may be anything, noise as well."""
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[:, 3:] = False
    noise = Wrong(lambda cell, z, x, y: torch.where(keep[..., None], y, torch.randn_like(y)))
    assert diagnose(DEQ(noise), torch.randn(3, 5, 8), mask=keep).differs == 0
    assert diagnose(DEQ(noise), torch.randn(3, 5, 8)).differs > 0.1


def test_what_stays_and_what_does_not():
    """Tensors keep their identity, numbers their value; None that became a tensor stays one, as documented."""

    def act(cell, z, x, y):
        cell.table += 1
        cell.late = torch.ones(3)
        cell.rate = math.nan
        return y

    cell = Wrong(act)
    cell.late, cell.rate = None, 0.5
    table, copy = cell.table, cell.table.clone()
    diagnosis = diagnose(DEQ(cell), torch.randn(6, 8))
    assert cell.table is table and torch.equal(table, copy) and cell.rate == 0.5 and cell.late is not None
    assert diagnosis.moved == ("cell.table",) and diagnosis.advice == []


def test_bad_input():
    with pytest.raises(TypeError, match="layer must be a DEQ, got Affine"):
        diagnose(tdeq.cells.Affine(4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="x must hold at least one sample"):
        diagnose(DEQ(tdeq.cells.Affine(4)), torch.randn(0, 4))


def test_a_parametrized_cell_has_the_name_of_its_class():
    report = str(diagnose(DEQ(tdeq.cells.Monotone(4)), torch.randn(3, 4)))
    assert report.startswith("DEQ of Monotone: PeacemanRachford(")


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_another_equilibrium_is_found_from_one_at_zero_too(scale):
    """z = tanh(3/2 z) has three; the distance is relative to the larger of the two."""

    class Pitchfork(nn.Module):
        def forward(self, z, x):
            return torch.tanh(1.5 * z)

    x = torch.full((4, 1), scale)
    diagnosis = diagnose(DEQ(Pitchfork(), adjoint=OneStep()), x, z0=x)
    assert diagnosis.apart == pytest.approx(1.0 if scale == 0 else 2.0, rel=1e-3)
