"""The convolutional cell: its equation, its format in memory, its start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritondeq import DEQ
from tritondeq.cells import Conv

LAST = torch.channels_last


def group_norm(x, groups, norm):
    """From its definition."""
    rows = x.reshape(len(x), groups, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    shape = (-1,) + (1,) * (x.ndim - 2)
    return rows.reshape(x.shape) * norm.weight.reshape(shape) + norm.bias.reshape(shape)


def right_side(cell, z, x, groups):
    """GN(ReLU(z + GN(u + conv(ReLU(GN(conv z)))))), u = GN(conv x)."""
    conv = {3: F.conv1d, 4: F.conv2d}[x.ndim]
    block, pad = cell.block, cell.block.conv1.kernel_size[0] // 2
    u = group_norm(conv(x, cell.input.conv.weight, cell.input.conv.bias, padding=pad), groups, cell.input.norm)
    hidden = F.relu(group_norm(conv(z, block.conv1.weight, padding=pad), groups, block.norm1))
    inner = group_norm(u + conv(hidden, block.conv2.weight, padding=pad), groups, block.norm2)
    return group_norm(F.relu(z + inner), groups, block.norm3)


def scattered(cell):
    """The cell with norms that are no identity, so that each counts."""
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight *= 0.5 + torch.rand_like(module.weight)
                module.bias += 0.3 * torch.randn_like(module.bias)
    return cell


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (2, 3, 5, 4)),
        ({"kernel_size": 1, "expansion": 3}, (1, 3, 2, 3)),
        ({"kernel_size": 5, "expansion": 2, "groups": 1}, (3, 3, 3, 7)),
        ({"dims": 1}, (2, 3, 11)),
    ],
)
def test_the_equation(options, shape):
    options = {"groups": 2} | options
    cell = scattered(Conv(8, 3, **options).double())
    x = torch.randn(shape, dtype=torch.float64)
    layer = DEQ(cell, tol=1e-13, max_steps=500)
    z = layer(x)
    assert z.shape == (shape[0], 8, *shape[2:]) and layer.last.converged.all()
    torch.testing.assert_close(z, right_side(cell, z, x, options["groups"]), rtol=1e-10, atol=1e-11)


def test_weight_norm_is_the_same_map_at_first():
    layers, x = [], torch.randn(2, 8, 4, 4)
    for weight_norm in (False, True):
        torch.manual_seed(1)
        layers.append(DEQ(Conv(8, groups=2, weight_norm=weight_norm)))
    torch.testing.assert_close(layers[0](x), layers[1](x))
    assert len(layers[1].state_dict()) == len(layers[0].state_dict()) + 2


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
def test_channels_last_inside_and_out(form):
    """Whatever x is: every step, the value, and a warm start from it."""
    layer, x = DEQ(Conv(8, 3, groups=2)), torch.randn(2, 3, 5, 6).contiguous(memory_format=form)
    seen = []
    for conv in (layer.cell.block.conv1, layer.cell.block.conv2):
        conv.register_forward_hook(lambda module, inputs, out: seen.extend((inputs[0], out)))
    z = layer(x)
    again = layer(x, z0=z.detach())
    assert layer.last.steps.max() == 1
    assert len(seen) > 20 and all(t.is_contiguous(memory_format=LAST) for t in (*seen, z, again))


@torch.no_grad()
@pytest.mark.parametrize("channels, groups", [(16, 4), (32, 8), (64, 8), (256, 8)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_contractive_at_initialisation(channels, groups, size):
    for seed in range(2):
        torch.manual_seed(seed)
        layer = DEQ(Conv(channels, 3, groups=groups), tol=1e-3)
        layer(torch.randn(4, 3, size, size))
        assert layer.last.converged.all() and layer.last.steps.max() <= 15
        layer(10 * torch.randn(1, 3, 1, 1).expand(1, 3, size, size))  # u is normalised
        assert layer.last.converged.all() and layer.last.steps.max() <= 15


def test_dropout_drops_channels_for_a_whole_solve():
    cell = Conv(8, 3, groups=2, dropout=0.5)
    layer, x, seen = DEQ(cell, tol=1e-6, max_steps=100), torch.randn(3, 3, 4, 4), []
    cell.block.norm2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] == 0))
    a = layer(x)
    assert len(seen) > 5 and all(torch.equal(zero, seen[1]) for zero in seen[1:])  # the first evaluation is of zeros
    whole = seen[1].flatten(2)
    assert torch.equal(whole.all(2), whole.any(2)) and 0.2 < whole.float().mean() < 0.8
    assert not torch.allclose(a, layer(x), atol=1e-4)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (2, 3, 1, 7)])
def test_sizes_at_the_edge(shape):
    layer, x = DEQ(Conv(8, 3, groups=2)), torch.randn(shape, requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.shape == (shape[0], 8, *shape[2:]) and x.grad.isfinite().all() and layer.last.converged.all()
