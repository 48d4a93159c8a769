"""The multiscale cell: its equations, the published sizes, its states."""

import pytest
import torch
import torch.nn.functional as F
from test_conv import group_norm, scattered

from tritondeq import DEQ, Anderson
from tritondeq.cells import MultiScale

LAST = torch.channels_last


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


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "channels, expansion, f",
    [((24, 24), 5, 111_456), ((32, 64, 128, 256), 5, 8_712_832), ((88, 176, 352, 704), 6, 77_689_392)],
    ids=["cifar-small", "cifar-large", "imagenet-xl"],
)
def test_published_sizes(channels, expansion, f):
    """The parameters of f in the published code."""
    cell = MultiScale(channels, expansion=expansion, device="meta")
    assert size(cell) - size(cell.input) == f
    normed = MultiScale(channels, expansion=expansion, weight_norm=True, device="meta")
    assert size(normed) - size(cell) == sum(channels) * (expansion + 2)


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
