"""`fix_dropout`: what it replaces, what it refuses, and that a cell trains behind it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stacks import DropPath, StochasticDepth
from torch import nn

from tritondeq import DEQ, FixedDropout, Unrolled, fix_dropout


class Block(nn.Module):
    """Two linear maps, each with a dropout of its own."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int = 4):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.drops = nn.ModuleDict({"first": first, "second": second})
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, z, x):
        return torch.tanh(self.outer(self.drops["second"](torch.tanh(self.inner(self.drops["first"](z))))) + x)


def layer(first: nn.Module, second: nn.Module, **options) -> DEQ:
    return DEQ(fix_dropout(Block(first, second)).double(), tol=1e-12, max_steps=200, **options)


def test_gradients_are_the_finite_differences_of_the_same_masks():
    deq = layer(nn.Dropout(0.3), nn.Dropout1d(0.3))
    names = [name for name, _ in deq.named_parameters()]

    def f(x, *values):
        torch.manual_seed(5)
        return torch.func.functional_call(deq, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *deq.parameters()))


def test_trains_as_the_weight_tied_loop_of_the_same_masks():
    deq, x = layer(nn.Dropout(0.3), DropPath(0.3)), torch.randn(8, 4, dtype=torch.float64)
    loop = copy.deepcopy(deq)
    loop.adjoint = Unrolled(200)
    for net in (deq, loop):
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close([*deq.parameters()], [*loop.parameters()], rtol=1e-7, atol=1e-9)


def test_each_solve_draws_masks_and_eval_draws_none():
    deq, x, masks = layer(nn.Dropout(0.5), nn.Dropout(0.5)), torch.randn(8, 4, dtype=torch.float64), []
    for drop in deq.cell.drops.values():
        drop.register_forward_hook(lambda module, args, out: masks.append((module, (out == 0).detach())))
    for _ in range(2):
        deq(x, z0=torch.randn_like(x))
        assert deq.last.converged.all()
    one, other = ([mask for module, mask in masks if module is drop] for drop in deq.cell.drops.values())
    steps = len(one) // 2
    for seen in (one, other):
        assert len({mask.numpy().tobytes() for mask in seen}) == 2, "a mask for each of two solves"
    assert steps > 4 and not torch.equal(one[0], other[0])
    assert torch.equal(deq.eval()(x), deq(x))


@pytest.mark.parametrize(
    ("dropout", "dims"),
    [
        (nn.Dropout(0.3), None),
        (nn.Dropout(0.3, inplace=True), None),
        *((kind(0.3), 2) for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)),
        (DropPath(0.3), 1),
        (type("Dinov2DropPath", (DropPath,), {})(0.3), 1),
        (StochasticDepth(0.3, "row"), 1),
        (StochasticDepth(0.3, "batch"), 0),
    ],
    ids=repr,
)
def test_what_it_replaces(dropout, dims):
    for training in (True, False):
        model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"default": dropout})).train(training)
        linear = model[0]
        assert fix_dropout(model) is model and model[0] is linear
        new = model[1]["default"]
        assert type(new) is FixedDropout and (new.p, new.dims, new.training) == (0.3, dims, training)
        assert fix_dropout(model)[1]["default"] is new, "what is fixed stays"
        assert type(alone := fix_dropout(dropout)) is FixedDropout and (alone.p, alone.training) == (0.3, training)


def test_channels_and_samples_are_dropped_as_before():
    """One value for each channel, or each sample, as torch and torchvision have them."""
    x = torch.ones(50, 20, 3, 3)
    for dropout, axes in ((nn.Dropout2d(0.5), (2, 3)), (DropPath(0.5), (1, 2, 3))):
        out = fix_dropout(dropout)(x)
        assert torch.equal(out, out.amax(axes, keepdim=True).expand_as(x)) and set(out.unique().tolist()) == {0.0, 2.0}


def test_a_share_of_0_stays():
    cell = fix_dropout(Block(nn.Dropout(0.0), DropPath(None, scale_by_keep=False)))
    assert [drop.p for drop in cell.drops.values()] == [0.0, 0.0]
    x = torch.randn(3, 4)
    assert torch.equal(DEQ(cell)(x), DEQ(cell.eval())(x))


def test_each_name_gets_a_dropout_of_its_own():
    shared = nn.Dropout(0.5)
    cell = fix_dropout(Block(shared, shared))
    one, other = cell.drops.values()
    assert type(one) is type(other) is FixedDropout and one is not other


def test_a_module_that_is_called_twice():
    """One mask for both calls; where the shapes differ, which no mask fits, an error."""

    class Twice(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.drop, self.width, self.masks = nn.Dropout(0.5), width, []

        def forward(self, z, x):
            ones = torch.ones_like(z)
            self.masks = [self.drop(ones), self.drop(ones[:, : self.width])]
            return torch.tanh(0.3 * self.masks[0] * z + x)

    x = torch.randn(3, 4)
    cell = fix_dropout(Twice(4))
    DEQ(cell)(x)
    assert torch.equal(*cell.masks)
    with pytest.raises(ValueError, match="another FixedDropout at each place"):
        DEQ(fix_dropout(Twice(2)))(x)


@pytest.mark.parametrize(
    ("left", "name"),
    [
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), "LSTM"),
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.FeatureAlphaDropout(0.1), "FeatureAlphaDropout"),
        (type("Own", (nn.Dropout,), {})(0.1), "Own"),
        (type("DropBlock2d", (nn.Module,), {"drop_prob": 0.1})(), "DropBlock2d"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_can_not_replace(left, name):
    model = nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.ModuleList([left])})
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"FixedDropout can take the place of {name} 'b.0': set.* to 0"):
            fix_dropout(model.train(mode))
        assert type(model["a"]) is nn.Dropout, "nothing is replaced"
    for share in ("p", "dropout", "drop_prob"):
        if hasattr(left, share):
            setattr(left, share, 0.0)
    assert type(fix_dropout(model)["a"]) is FixedDropout and model["b"][0] is left


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (DropPath(0.1, scale_by_keep=False), ValueError, "scale_by_keep=True"),
        (nn.Dropout(1.0), ValueError, "p must be at least 0 and below 1"),
        (torch.tanh, TypeError, "model must be an nn.Module, got builtin"),
    ],
)
def test_bad_arguments(model, error, message):
    with pytest.raises(error, match=message):
        fix_dropout(model)


def test_the_error_of_a_solve_leads_here():
    deq = DEQ(Block(nn.Dropout(0.1), nn.Dropout(0.1)))
    with pytest.raises(RuntimeError, match=r"Dropout 'drops.first'.*FixedDropout, which fix_dropout\(cell\) puts"):
        deq(torch.randn(2, 4))
    fix_dropout(deq)(torch.randn(2, 4)).sum().backward()


def test_attention_that_reads_the_share():
    """A fused attention drops by a function: its solve raises, until the share is 0."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_drop = nn.Dropout(0.2)

        def forward(self, z, x):
            p = self.attn_drop.p if self.training else 0.0
            return 0.5 * F.scaled_dot_product_attention(z, z, z, dropout_p=p) + x

    deq, x = DEQ(fix_dropout(Attention())), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention with a dropout of 0.2"):
        deq(x)
    deq.cell.attn_drop.p = 0.0
    assert deq.solve(x).converged.all()


def test_layers_of_torch():
    """The dropout of nn.MultiheadAttention has to go; the rest of the layer's is fixed."""
    cell = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    with pytest.raises(ValueError, match="MultiheadAttention 'self_attn'"):
        fix_dropout(cell)
    cell.self_attn.dropout = 0.0
    fix_dropout(cell)
    assert [type(drop) for drop in (cell.dropout, cell.dropout1, cell.dropout2)] == [FixedDropout] * 3

    class Injected(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = cell

        def forward(self, z, x):
            return 0.3 * self.layer(z) + x

    deq, x, runs = DEQ(Injected().double(), tol=1e-12, max_steps=300), torch.randn(2, 5, 8).double(), []
    for steps in (None, 60):
        torch.manual_seed(1)
        runs.append(torch.autograd.grad(deq.unrolled(steps)(x).sin().sum(), list(deq.parameters())))
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)
