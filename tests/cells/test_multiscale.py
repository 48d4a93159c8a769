"""The multiscale cell: its equations, the published sizes, its states, its training."""

import pytest
import torch
import torch.nn.functional as F
from test_conv import digits, group_norm, scattered
from torch import nn

from tritondeq import DEQ, Anderson, Broyden, Picard, Status, Unrolled
from tritondeq.cells import MultiScale

LAST = torch.channels_last
SOLVERS = [Picard(), Picard(damping=0.8), Anderson(memory=3), Broyden(memory=4)]


def right_side(cell, z, x, groups):
    """Both equations of the docstring; `nearest` by indexing."""
    u = group_norm(F.conv2d(x, cell.input.conv.weight, cell.input.conv.bias), groups, cell.input.norm)
    y = []
    for i, (block, part) in enumerate(zip(cell.blocks, z, strict=True)):
        hidden = F.relu(group_norm(F.conv2d(part, block.conv1.weight, padding=1), groups, block.norm1))
        inner = F.conv2d(hidden, block.conv2.weight, padding=1) + (0 if i else u)
        y.append(group_norm(F.relu(part + group_norm(inner, groups, block.norm2)), groups, block.norm3))
    out = []
    for i in range(len(z)):
        total = y[i]
        for j in range(len(z)):
            layers = list(cell.fuse[i][j].children())
            part = y[j]
            if j < i:
                assert len(layers) == 2 * (i - j)
                for level, (conv, norm) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
                    part = group_norm(F.conv2d(part, conv.weight, stride=2, padding=1), groups, norm)
                    part = F.relu(part) if level < i - j - 1 else part
            if j > i:
                part = group_norm(F.conv2d(part, layers[0].weight), groups, layers[1])
                h, w = (torch.arange(n) // 2 ** (j - i) for n in total.shape[2:])
                part = part[:, :, h][:, :, :, w]
            total = total + part if j != i else total
        out.append(group_norm(F.conv2d(F.relu(total), cell.post[i][1].weight), max(1, groups // 2), cell.post[i][2]))
    return out


@pytest.mark.parametrize(
    "channels, shape, options",
    [
        ((4, 4), (2, 3, 4, 4), {}),
        ((4, 8, 4), (1, 3, 8, 4), {"expansion": 2}),
        ((4, 4, 8, 8), (2, 3, 8, 16), {"groups": 1}),
        ((8, 4), (2, 3, 4, 6), {"groups": 4}),
    ],
)
def test_the_equations(channels, shape, options):
    options = {"groups": 2} | options
    cell = scattered(MultiScale(channels, 3, **options).double())
    x = torch.randn(shape, dtype=torch.float64)
    layer = DEQ(cell, tol=1e-12, max_steps=500, solver=Anderson())
    z = layer(x)
    assert isinstance(z, tuple) and layer.last.converged.all()
    assert [t.shape[1:] for t in z] == [(c, shape[2] >> i, shape[3] >> i) for i, c in enumerate(channels)]
    for a, b in zip(z, right_side(cell, z, x, options["groups"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 2), (9, 6), (4, 12)])
def test_sizes_that_do_not_halve(size):
    """A coarse pixel at the edge stands for fewer fine ones; see `right_side` for which."""
    cell = scattered(MultiScale((8, 8, 8, 8), 3, groups=2).double())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    z = cell.initial(x, cell.inject(x))
    assert [t.shape[2:] for t in z] == [tuple(-(-n // 2**i) for n in size) for i in range(4)]
    z = tuple(torch.randn_like(t) for t in z)
    wanted = right_side(cell, z, x, 2)
    for a, b in zip(cell(z, cell.inject(x)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


class Bottleneck(nn.Module):
    """Of the published head: 1 x 1, 3 x 3, 1 x 1 to four times the width, with a shortcut."""

    def __init__(self, inputs, width):
        super().__init__()
        out = 4 * width
        self.body = nn.ModuleList([conv(inputs, width, 1), conv(width, width, 3), conv(width, out, 1)])
        self.shortcut = nn.ModuleList([conv(inputs, out, 1), nn.BatchNorm2d(out)]) if inputs != out else None


def conv(inputs, outputs, size, bias=False):
    return nn.Conv2d(inputs, outputs, size, bias=bias)


def published(channels, widths, final, classes, stage):
    """What stands around f in the published classifiers: a stem, and a head that joins the resolutions."""
    first = channels[0]
    parts = [conv(3, first, 3), nn.BatchNorm2d(first), conv(first, first, 3), nn.BatchNorm2d(first)]
    parts += [conv(first, first, 1), nn.BatchNorm2d(first)] if stage else []
    parts += [Bottleneck(c, w) for c, w in zip(channels, widths, strict=True)]
    for a, b in zip(widths, widths[1:], strict=False):
        parts += [conv(4 * a, 4 * b, 3, bias=True), nn.BatchNorm2d(4 * b)]
    parts += [conv(4 * widths[-1], final, 1, bias=True), nn.BatchNorm2d(final), nn.Linear(final, classes)]
    return nn.ModuleList(parts)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "channels, expansion, around, f, net, paper",
    [
        ((24, 24), 5, ((8, 16), 200, 10, False), 111_456, 158_650, 170e3),
        ((32, 64, 128, 256), 5, ((14, 28, 56, 112), 1680, 10, True), 8_712_832, 11_095_038, 10e6),
        ((32, 64, 128, 256), 5, ((24, 48, 96, 192), 2048, 1000, True), 8_712_832, 16_805_576, 18e6),
        ((88, 176, 352, 704), 6, ((32, 64, 128, 256), 2048, 1000, True), 77_689_392, 90_452_720, 81e6),
    ],
    ids=["cifar-small", "cifar-large", "imagenet-small", "imagenet-xl"],
)
def test_published_sizes(channels, expansion, around, f, net, paper):
    """The paper gives two digits of whole nets; the configurations of its code come within 12% of them."""
    cell = MultiScale(channels, expansion=expansion, device="meta")
    own = size(cell) - size(cell.input)
    assert own == f and own + size(published(channels, *around).to("meta")) == net
    assert abs(net / paper - 1) < 0.12
    normed = MultiScale(channels, expansion=expansion, weight_norm=True, device="meta")
    assert size(normed) - size(cell) == sum(channels) * (expansion + 2)


def test_gradients():
    cell = scattered(MultiScale((4, 4), 2, groups=2).double())
    layer, x = DEQ(cell, tol=1e-12, max_steps=500), torch.randn(1, 2, 4, 3, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def solved(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(solved, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_are_those_of_many_unrolled_steps(solver, weight_norm):
    cell = MultiScale((8, 8), 3, groups=2, weight_norm=weight_norm).double()
    x, grads = torch.randn(2, 3, 4, 4, dtype=torch.float64), []
    for layer in (DEQ(cell, solver=solver, tol=1e-12, max_steps=300), DEQ(cell, adjoint=Unrolled(80))):
        loss = sum(t.sin().sum() for t in layer(x))
        grads.append(torch.autograd.grad(loss, list(cell.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_batch_mates_do_not_matter(solver):
    x = torch.randn(4, 3, 6, 6) * torch.tensor([1.0, 10.0, 1e-2, 1.0]).reshape(4, 1, 1, 1)
    layer = DEQ(MultiScale((8, 16, 8), 3, groups=2), solver=solver, tol=1e-4, max_steps=80)
    together = layer.solve(x)
    for i in range(4):
        alone = layer.solve(x[i : i + 1])
        assert abs(int(alone.steps) - int(together.steps[i])) <= 1
        for a, b in zip(alone.value, together.value, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=2e-3, atol=2e-3)
    x[1] = torch.nan
    others = [0, 2, 3]
    spoilt = layer.solve(x)
    assert spoilt.status[1] == Status.NONFINITE
    for a, b in zip(spoilt.value, together.value, strict=True):
        torch.testing.assert_close(a[others], b[others])


def test_channels_last_inside_and_out():
    """Parts of one matrix, so dense but within a pixel and a row: channels lie side by side."""
    layer, x, seen = DEQ(MultiScale((8, 16), 3, groups=2)), torch.randn(2, 3, 6, 6), []
    for block in layer.cell.blocks:
        for conv in (block.conv1, block.conv2):
            conv.register_forward_hook(lambda module, inputs, out: seen.extend((inputs[0], out)))
    z = layer(x)
    again = layer(x, z0=tuple(t.detach() for t in z))
    assert layer.last.steps.max() == 1
    assert len(seen) > 20 and all(t.stride(1) == 1 and t.stride(3) == t.shape[1] for t in (*seen, *z, *again))


@torch.no_grad()
@pytest.mark.parametrize("channels, groups", [((16, 16), 4), ((32, 32, 64), 8), ((32, 64, 128, 256), 8)])
@pytest.mark.parametrize("pixels", [8, 13])
def test_contractive_at_initialisation(channels, groups, pixels):
    for seed in range(2):
        torch.manual_seed(seed)
        layer = DEQ(MultiScale(channels, 3, groups=groups))
        layer(torch.randn(2, 3, pixels, pixels))
        assert layer.last.converged.all() and layer.last.steps.max() <= 15


def test_autocast():
    layer, x = DEQ(MultiScale((16, 16), 3, groups=4)), torch.randn(4, 3, 8, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        assert layer.last.converged.all()
        sum(t.square().sum() for t in z).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    for a, b in zip(z, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 0.05


def test_a_state_dict_makes_the_same_layer():
    options = {"groups": 2, "weight_norm": True, "dropout": 0.1}
    first, second = (DEQ(MultiScale((8, 8), 3, **options)).eval() for _ in range(2))
    x = torch.randn(2, 3, 4, 4)
    assert not torch.equal(first(x)[1], second(x)[1])
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True))


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_training(narrow):
    """300 steps on handwritten digits, read from the coarse resolution."""
    pytest.importorskip("sklearn")
    x, labels = digits()
    cell, head = MultiScale((32, 32), 1, groups=4), nn.Linear(32 * 16, 10)
    layer = DEQ(cell, solver=Anderson(memory=4), max_steps=100)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3)
    losses, steps = [], []
    for i in range(300):
        rows = torch.arange(16 * i, 16 * i + 16) % len(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            z = layer(x[rows])[1]
            loss = F.cross_entropy(head(z.float().flatten(1)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert set(layer.last.status.tolist()) <= {Status.CONVERGED, Status.PLATEAU}, layer.last
        losses.append(loss.item())
        steps.append(layer.last.steps.max().item())
    assert sum(losses[-20:]) / 20 < 0.5 < 2.0 < losses[0]
    assert max(steps) < 100


def test_repr_names_the_options():
    assert "(8, 16), inputs=3, groups=2" in repr(MultiScale((8, 16), 3, groups=2))


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: MultiScale((8,)), ValueError, r"2 to 4 resolutions, got 1: \(8,\)"),
        (lambda: MultiScale((8,) * 5), ValueError, "2 to 4 resolutions, got 5"),
        (lambda: MultiScale((8, 12)), ValueError, "groups=8 must divide.*12"),
        (lambda: MultiScale((8, 0)), ValueError, r"channels\[1\]"),
        (lambda: MultiScale((8, 8), 0), ValueError, "inputs"),
        (lambda: MultiScale((8, 8), expansion=0), ValueError, "expansion"),
        (lambda: MultiScale((8, 8), groups=2.0), TypeError, "groups"),
        (lambda: MultiScale((8, 8), dropout=-1), ValueError, "p must be"),
        (lambda: MultiScale((8, 8), dims=1), TypeError, "dims"),
        (lambda: DEQ(MultiScale((8, 8), 3))(torch.zeros(2, 4, 5, 5)), ValueError, r"\[B, 3, H, W\].*\(2, 4, 5, 5\)"),
        (lambda: DEQ(MultiScale((8, 8), 3))(torch.zeros(2, 3, 5)), ValueError, r"\[B, 3, H, W\] for MultiScale"),
        (lambda: DEQ(MultiScale((16, 8), 3))(torch.zeros(2, 3, 2, 2)), ValueError, "groups=8 of 8 chan.*1 x 1 image"),
    ],
)
def test_what_does_not_fit_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
