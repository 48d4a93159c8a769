"""The convolutional cell: its equation, its format in memory, its start, its training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritondeq import DEQ, Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from tritondeq.cells import Conv
from tritondeq.layout import Layout

LAST = torch.channels_last
SOLVERS = [Picard(), Picard(damping=0.8), Anderson(memory=3), Broyden(memory=4)]


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


def seeded(make):
    torch.manual_seed(1)
    return make()


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


@pytest.mark.parametrize("dims", [1, 2])
def test_gradients(dims):
    cell = scattered(Conv(4, 2, groups=2, dims=dims).double())
    layer, x = DEQ(cell, tol=1e-13, max_steps=500), torch.randn(2, 2, *(3, 2)[:dims], dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def solved(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(solved, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_are_those_of_many_unrolled_steps(solver, weight_norm):
    cell = scattered(Conv(8, 3, groups=2, weight_norm=weight_norm).double())
    x, grads = torch.randn(2, 3, 4, 4, dtype=torch.float64), []
    for layer in (DEQ(cell, solver=solver, tol=1e-12, max_steps=300), DEQ(cell, adjoint=Unrolled(200))):
        grads.append(torch.autograd.grad(layer(x).sin().sum(), list(cell.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_weight_norm_is_the_same_map_at_first():
    plain, normed = (seeded(lambda w=w: Conv(8, groups=2, weight_norm=w)) for w in (False, True))
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(DEQ(plain)(x), DEQ(normed)(x))
    extra = sum(p.numel() for p in normed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 8 + 8


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_batch_mates_do_not_matter(solver):
    x = torch.randn(5, 3, 6, 6) * torch.tensor([1.0, 10.0, 1e-2, 1.0, 0.0]).reshape(5, 1, 1, 1)
    layer = DEQ(scattered(Conv(16, 3, groups=2)), solver=solver, tol=1e-4, max_steps=80)
    together = layer.solve(x)
    for i in range(5):
        alone = layer.solve(x[i : i + 1])
        assert abs(int(alone.steps) - int(together.steps[i])) <= 1
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=2e-3, atol=2e-3)
    x[1] = torch.nan
    others = [0, 2, 3, 4]
    spoilt = layer.solve(x)
    assert spoilt.status[1] == Status.NONFINITE
    torch.testing.assert_close(spoilt.value[others], together.value[others])


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
def test_packing_copies_nothing(monkeypatch):
    """What the block returns is what the loop measures, in the same memory."""
    packed, pack = [], Layout.pack
    monkeypatch.setattr(Layout, "pack", lambda self, *a: packed.append((a[0], pack(self, *a))) or packed[-1][1])
    DEQ(Conv(8, 3, groups=2))(torch.randn(2, 3, 5, 6))
    assert len(packed) > 5
    assert all(state.data_ptr() == flat.data_ptr() for state, flat in packed)


@torch.no_grad()
@pytest.mark.parametrize("channels, groups", [(16, 4), (32, 8), (64, 8), (256, 8)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_contractive_at_initialisation(channels, groups, size):
    for seed in range(3):
        torch.manual_seed(seed)
        layer = DEQ(Conv(channels, 3, groups=groups), tol=1e-3)
        layer(torch.randn(4, 3, size, size))
        assert layer.last.converged.all() and layer.last.steps.max() <= 15
        layer(10 * torch.randn(1, 3, 1, 1).expand(1, 3, size, size))  # u is normalised
        assert layer.last.converged.all() and layer.last.steps.max() <= 15


def test_autocast():
    layer, x = DEQ(Conv(16, 3, groups=4)), torch.randn(4, 3, 8, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.float32 and layer.last.converged.all() and layer.last.residual.max() <= 1e-2
        z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (z - exact).norm() / exact.norm() < 0.03


def test_a_state_dict_makes_the_same_layer():
    for options in ({}, {"weight_norm": True, "dropout": 0.1}):
        first, second = (DEQ(Conv(8, 3, groups=2, **options)).eval() for _ in range(2))
        x = torch.randn(2, 3, 4, 4)
        assert not torch.equal(first(x), second(x))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x)) and torch.equal(first(x), copy.deepcopy(first)(x))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(3, 0.8)], ids=repr)
def test_compiled_it_is_the_same(adjoint):
    x, results = torch.randn(2, 3, 4, 4), []
    for compile in (False, {"backend": "aot_eager"}):
        cell = seeded(lambda: Conv(8, 3, groups=2, dropout=0.2))
        layer = DEQ(cell, adjoint=adjoint, compile=compile, tol=1e-6, max_steps=100)
        torch.manual_seed(2)
        z = layer(x)
        assert z.is_contiguous(memory_format=LAST)
        results.append([z, *torch.autograd.grad(z.sin().sum(), list(cell.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(data.target)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_training(narrow):
    """300 steps on handwritten digits: the loss falls, and every solve ends well in a bounded number of steps."""
    pytest.importorskip("sklearn")
    x, labels = digits()
    cell, head = Conv(32, 1, groups=4), nn.Linear(32 * 64, 10)
    layer = DEQ(cell, solver=Anderson(memory=4), max_steps=100)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3)
    losses, steps = [], []
    for i in range(300):
        rows = torch.arange(32 * i, 32 * i + 32) % len(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            z = layer(x[rows])
            loss = F.cross_entropy(head(z.float().flatten(1)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert set(layer.last.status.tolist()) <= {Status.CONVERGED, Status.PLATEAU}, layer.last
        losses.append(loss.item())
        steps.append(layer.last.steps.max().item())
    assert sum(losses[-20:]) / 20 < 0.3 < 2.0 < losses[0]
    assert max(steps) < 100


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (2, 3, 1, 7)])
def test_sizes_at_the_edge(shape):
    layer, x = DEQ(Conv(8, 3, groups=2)), torch.randn(shape, requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.shape == (shape[0], 8, *shape[2:]) and x.grad.isfinite().all() and layer.last.converged.all()


def test_repr_names_the_options():
    assert "8, inputs=3, groups=2, dims=2" in repr(Conv(8, 3, groups=2))


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: Conv(12), ValueError, "groups=8 must divide.*12"),
        (lambda: Conv(8, groups=16), ValueError, "groups=16 must divide.*8"),
        (lambda: Conv(0), ValueError, "channels"),
        (lambda: Conv(8, 0), ValueError, "inputs"),
        (lambda: Conv(8, kernel_size=2), ValueError, "kernel_size must be odd.*2"),
        (lambda: Conv(8, expansion=0.5), TypeError, "expansion"),
        (lambda: Conv(8, groups=0), ValueError, "groups"),
        (lambda: Conv(8, dims=3), ValueError, "dims must be 1 or 2, got 3"),
        (lambda: Conv(8, dropout=1.0), ValueError, "p must be"),
        (lambda: Conv(8, stride=2), TypeError, "stride"),
        (lambda: DEQ(Conv(8, 3))(torch.zeros(2, 4, 5, 5)), ValueError, r"\[B, 3, H, W\] for Conv.*\(2, 4, 5, 5\)"),
        (lambda: DEQ(Conv(8, 3, dims=1))(torch.zeros(2, 3, 5, 5)), ValueError, r"\[B, 3, L\] for Conv"),
        (lambda: DEQ(Conv(8, 3))(torch.zeros(2, 3, 5, 5).long()), TypeError, "x must be a floating-point.*int64"),
        (lambda: DEQ(Conv(8, 3))([1.0]), TypeError, "x must be a floating-point.*list"),
        (lambda: DEQ(Conv(8, 3))(torch.zeros(2, 3, 1, 1)), ValueError, "groups=8 of 8 channels.*1 x 1 image"),
    ],
)
def test_what_does_not_fit_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
