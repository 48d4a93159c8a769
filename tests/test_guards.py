"""What a map may not do is refused or reported: in-place changes, randomness, samples that act on one another."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from replays import HERE, THERE, Cuda
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, FixedDropout, Picard, fixed_point, guards

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
WIDTH = 6


@pytest.fixture
def w():
    return 0.15 * torch.randn(WIDTH, WIDTH, dtype=torch.float64)


# in place


def step(z, w):
    return torch.tanh(z.clone() @ w.T + 1)  # autograd saves the copy, and allows what follows


IN_PLACE = {
    "overwrite": lambda z, w: z.copy_(step(z, w)),
    "damp": lambda z, w: z.mul_(0.5).add_(0.5 * step(2 * z, w)),
    "clamp": lambda z, w: step(z.clamp_(-0.3, 0.3), w),
    "spoil": lambda z, w: (step(z, w), z.zero_())[0],
    "activate": lambda z, w: step(F.elu(z, inplace=True), w),
    "one leaf of two": lambda z, w: step(z, w),
}


@MODES
@pytest.mark.parametrize("solver", [Picard(), Picard(0.7), Anderson(), Broyden(5)], ids=repr)
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_map_that_changes_its_state_is_refused_and_z0_stays(name, solver, mode, w):
    f = IN_PLACE[name]
    with mode():
        z0 = torch.full((4, WIDTH), 0.1, dtype=torch.float64)
        pair = name == "one leaf of two"
        start = (z0, z0.clone()) if pair else z0
        change = lambda z: (step(z[0], w), z[1].mul_(0.5)) if pair else f(z, w)  # noqa: E731
        with pytest.raises(RuntimeError, match="f changes its state in place"):
            fixed_point(change, start, solver=solver)
        assert torch.equal(z0, torch.full_like(z0, 0.1))


@MODES
def test_z0_is_not_the_value_that_is_returned(mode, w):
    """Where the start is the solution, too."""
    with mode():
        z0 = fixed_point(lambda z: step(z, w), torch.zeros(2, WIDTH, dtype=torch.float64), tol=1e-12).value
        before = z0.clone()
        fixed_point(lambda z: step(z, w), z0, tol=1e-2).value.detach().mul_(0)
        assert torch.equal(z0, before)


# randomness


class Cell(nn.Module):
    def __init__(self, f, **modules):
        super().__init__()
        self.linear, self.f, self.now = nn.Linear(WIDTH, WIDTH), f, 0
        self.linear.weight.data.mul_(0.5)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, z, x):
        return torch.tanh(self.f(self, self.linear(z)) + x)


def counter(cell, y):
    cell.now += 1
    return y + 0.1 * torch.cos(torch.tensor(float(cell.now)))


REFUSED = {
    "F.dropout": lambda cell, y: F.dropout(y, 0.2, cell.training),
    "F.dropout1d": lambda cell, y: F.dropout1d(y, p=0.2, training=cell.training),
    "F.alpha_dropout": lambda cell, y: F.alpha_dropout(y, 0.2, training=cell.training),
    "attention": lambda cell, y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.2 * cell.training),
    "nn.Dropout": lambda cell, y: cell.drop(y),
}
DRAWN = {
    "noise": lambda cell, y: y + 0.1 * torch.randn_like(y),
    "rrelu": lambda cell, y: F.rrelu(y, training=True),
    "gumbel": lambda cell, y: y * F.gumbel_softmax(y),
}


@pytest.mark.parametrize("how", ["layer", "function"])
@MODES
@pytest.mark.parametrize("name", REFUSED)
def test_dropout_that_no_solve_can_hold_is_refused(name, mode, how):
    cell, x = Cell(REFUSED[name], drop=nn.Dropout(0.2)), torch.randn(4, 5, WIDTH)
    if name != "nn.Dropout":
        del cell.drop
    solve = DEQ(cell).solve if how == "layer" else lambda x: fixed_point(lambda z: cell(z, x), torch.zeros_like(x))
    with mode(), pytest.raises(RuntimeError, match="draws another mask at every step"):
        solve(x)
    cell.eval()
    with mode():
        assert solve(x).converged.all()


@MODES
@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("ignore:the residual at the solution")  # where there are gradients
def test_random_numbers_are_named_where_nothing_converges(name, mode):
    with mode(), pytest.warns(UserWarning, match="draws random numbers at every evaluation"):
        DEQ(Cell(DRAWN[name]), tol=1e-6)(torch.randn(4, 5, WIDTH))


def test_randomness_that_does_not_matter_is_not_reported():
    with torch.no_grad():
        DEQ(Cell(lambda cell, y: y + 0 * torch.randn_like(y)), tol=1e-4)(torch.randn(4, WIDTH))


def test_a_counter_that_a_loose_tolerance_hides_shows_at_the_solution():
    """Which is evaluated for the gradient."""

    def late(cell, y):
        cell.now += 1
        return y + (cell.now > cell.limit)

    layer, x = DEQ(Cell(late), tol=1e-2), torch.randn(4, WIDTH)
    layer.cell.limit = 1000
    with torch.no_grad():
        layer(x)
    layer.cell.limit, layer.cell.now = layer.cell.now, 0
    with pytest.warns(UserWarning, match="two evaluations at one state differ.*diagnose"):
        layer(x)


def test_a_function_holds_the_masks_and_weights_of_its_modules():
    """As a layer does: those of its closure, of its object and of a partial."""
    cell, x = Cell(REFUSED["nn.Dropout"], drop=FixedDropout(0.3)), torch.randn(4, WIDTH)
    torch.nn.utils.parametrizations.weight_norm(cell.linear)
    for f in (lambda z: cell(z, x), functools.partial(cell, x=x)):
        one, two = (fixed_point(f, torch.zeros_like(x), tol=1e-5) for _ in range(2))
        assert one.converged.all() and not torch.equal(one.value, two.value)


class Model(nn.Module):
    """A model that solves within its forward: its stem is no function of a state, and is not called by the map."""

    def __init__(self, stem, part=None):
        super().__init__()
        self.stem, self.block = stem, nn.Sequential(nn.Linear(WIDTH, WIDTH), part or nn.Identity())
        nn.init.normal_(self.block[0].weight, std=0.05)

    def forward(self, x):
        u = self.stem(x)
        return fixed_point(lambda z: torch.tanh(self.block(z) + u), torch.zeros_like(u), tol=1e-5)

    def step(self, z):
        return torch.tanh(self.block(z))


@pytest.mark.parametrize("stem", [nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)], ids=str)
def test_modules_that_a_function_reaches_and_does_not_call_may_be_anything(stem):
    model, x = Model(stem), torch.randn(4, WIDTH)
    assert model(x).converged.all()
    assert fixed_point(model.step, torch.zeros(4, WIDTH), tol=1e-5).converged.all()


def test_modules_that_a_function_calls_may_not():
    model, x = Model(nn.Identity(), nn.Dropout(0.5)), torch.randn(4, WIDTH)
    for solve in (lambda: model(x), lambda: fixed_point(model.step, torch.zeros(4, WIDTH))):
        with pytest.raises(RuntimeError, match="Dropout.* draws another mask at every step"):
            solve()


def test_masks_hold_behind_functions_that_call_functions():
    block = Model(nn.Identity(), FixedDropout(0.5)).block

    def inner(z):
        return torch.tanh(block(z))

    def outer(z):
        return inner(z) + 0.1

    assert fixed_point(outer, torch.zeros(4, WIDTH), tol=1e-5).converged.all()


# samples that act on one another


@pytest.mark.parametrize("how", ["layer", "function"])
@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_of_the_batch_are_refused(tracks, how):
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=tracks)
    cell, x = Cell(lambda cell, y: cell.norm(y), norm=norm), torch.randn(8, WIDTH)
    solve = DEQ(cell) if how == "layer" else lambda x: fixed_point(cell, torch.zeros_like(x), (x,)).value
    with pytest.raises(RuntimeError, match="BatchNorm1d 'norm', which mixes the samples of a batch"):
        solve(x)
    cell.eval()
    if tracks:
        solve(x)
    else:
        with pytest.raises(RuntimeError, match="mixes the samples"):
            solve(x)


class Diffusion(nn.Module):
    """Rows are nodes of a path graph; the equilibrium is that of (I - 0.9 A) z = x."""

    def __init__(self, nodes):
        super().__init__()
        a = torch.diag(torch.ones(nodes - 1, dtype=torch.float64), 1)
        a = a + a.T
        self.a, self.rate = a / a.sum(1, keepdim=True), nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, z, x):
        return self.rate * self.a @ z + x


def test_nodes_as_samples_are_reported_and_right_as_one_sample():
    cell, x = Diffusion(40), torch.zeros(40, 3, dtype=torch.float64)
    x[0] = 1.0
    layer = DEQ(cell, tol=1e-8, max_steps=2000)
    with pytest.warns(UserWarning, match="samples of the batch depend on one another.* batch_dims=0"):
        layer(x)
    cell.batch_dims = 0
    exact = torch.linalg.solve(torch.eye(40, dtype=torch.float64) - 0.9 * cell.a, x)
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_ordinary_cells_are_not_reported(dtype, tol):
    """Any warning is an error here; fixed points at 0 and rows of zeros, too."""
    for make in (lambda w: tdeq.cells.Affine(w, bias=False), tdeq.cells.MLP, lambda w: Cell(lambda c, y: y)):
        x = torch.randn(5, WIDTH).to(dtype)
        x[2] = 0
        DEQ(make(WIDTH).to(dtype), tol=tol)(x, z0=torch.randn_like(x)).sum().backward()
    a = torch.tensor([0.5], requires_grad=True)
    solution = fixed_point(lambda z: a * z, torch.ones(2, 1))
    assert solution.converged.all() and solution.value.requires_grad


# masks


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_tokens_is_padding(causal):
    layer = DEQ(tdeq.cells.Transformer(8, heads=2, causal=causal).double(), tol=1e-10, max_steps=200)
    x, real = torch.randn(2, 5, 8, dtype=torch.float64), torch.arange(5) < torch.tensor([[3], [5]])
    noisy = torch.where(real[..., None], x, 10 * torch.randn_like(x))
    with torch.no_grad():
        expected = layer((x, real))
        torch.testing.assert_close(layer(noisy, mask=real)[real], expected[real])
        radius = [tdeq.spectral_radius(layer, expected, given, mask=m) for given, m in (((x, real), None), (x, real))]
        torch.testing.assert_close(*radius)
    with pytest.raises(ValueError, match="mask was given twice"):
        layer((x, real), mask=real)


def test_integers_without_a_start_are_refused_by_name():
    with pytest.raises(TypeError, match="got x: an? .*int64 tensor"):
        DEQ(nn.Linear(3, 3))(torch.ones(2, 3, dtype=torch.int64))


# on a GPU


def test_a_warning_is_put_off_until_its_number_has_arrived_and_no_graph_is_captured(monkeypatch):
    """Of a device that is not the current one; CUDA is faked, for there are no two GPUs."""
    cuda, recorded, waited = Cuda(monkeypatch, HERE), [], []
    event = SimpleNamespace(record=recorded.append, synchronize=lambda: waited.append(None))
    event.query = lambda: HERE not in cuda.capturing or pytest.fail("a query")
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(guards, "_later", guards.deque())

    def warn(device):
        guards.warn_if(SimpleNamespace(device=device, numel=lambda: 1, any=lambda: torch.tensor(True)), "words")

    warn(HERE)
    assert not guards._later, "in a graph that is captured, it would be asked for once"
    warn(THERE)
    assert recorded == ["stream of cuda:1"]
    guards.flush()
    assert len(guards._later) == 1
    cuda.capturing = ()
    with pytest.warns(UserWarning, match="words"):
        guards.flush()
    assert not guards._later
    warn(HERE)
    event.query = lambda: False
    guards.flush()
    assert len(guards._later) == 1, "the host does not wait"
    with pytest.warns(UserWarning, match="words"):
        guards.flush(wait=True)
    assert waited == [None] and not guards._later
