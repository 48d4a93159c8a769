"""GroupNorm against float64: values, offsets, splits, what spoils what, what it refuses; and in the cells."""

import pytest
import torch
from close import assert_as_eager, error

import tritondeq as tdeq
from tritondeq import DEQ
from tritondeq.cells import Conv, MultiScale
from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.norms.group_norm import group_norm, group_norm_ref, refuses

LAST = torch.channels_last
NARROW = [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2]
RELUS = [None, "before", "after"]
WHOLE = launch.GROUP // 4  # pixels of 3 or 4 channels that fill a program


def operands(shape, device, other=True):
    def draw():
        return torch.randn(shape).to(device).contiguous(memory_format=LAST)

    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    return draw(), draw() if other else None, weight, bias


def exact(a, b, weight, bias, groups, eps, relu):
    """In float64, from the definition."""
    x = a.double() if b is None else a.double() + b.double()
    rows = (x.relu() if relu == "before" else x).reshape(len(x), groups, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + eps).sqrt()
    y = rows.reshape(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y.relu() if relu == "after" else y


SHAPES = [
    ((1, 2, 1, 1), 1),  # two values
    ((2, 1, 1, 3), 1),
    ((3, 7, 5, 1), 7),  # a channel to a group
    ((2, 15, 7, 11), 5),  # no power of two
    ((2, 8, 4, 4), 2),
    ((1, 4, 1, WHOLE), 1),  # one program, full
    ((2, 3, 1, WHOLE + 1), 1),  # one pixel more
    ((1, 8, 5, WHOLE + 3), 2),  # several parts
]


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("relu", RELUS, ids=str)
@pytest.mark.parametrize("other", [False, True], ids=["a", "a+b"])
def test_values(shape, groups, relu, other, device):
    given = (*operands(shape, device, other=other), groups, 1e-5, relu)
    y, true = group_norm(*given), exact(*given)
    assert y.is_contiguous(memory_format=LAST) and y.shape == shape and y.dtype == torch.float32
    assert_as_eager(y, group_norm_ref(*given), true)
    assert error(y, true) < 1e-6


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", NARROW, ids=str)
def test_narrow_operands_and_wide_statistics(shape, groups, dtypes, device):
    """One rounding of a result that is right in float32; the sum is not rounded."""
    a, b, weight, bias = operands(shape, device)
    a, b = a.to(dtypes[0]), b.to(dtypes[1])
    y, true = group_norm(a, b, weight, bias, groups, 1e-5, None), exact(a, b, weight, bias, groups, 1e-5, None)
    assert y.dtype == torch.promote_types(*dtypes)
    unit = torch.finfo(y.dtype).eps / 2
    assert ((y.double() - true).abs() <= 1.01 * unit * true.abs() + 1e-5).all()


@pytest.mark.parametrize("shape, groups", [((2, 8, 8, 8), 2), ((1, 3, 1, 2 * WHOLE + 1), 1)], ids=str)
@pytest.mark.parametrize("offset, deviation", [(1e3, 1.0), (-3e4, 1.0), (1e4, 0.005)])
def test_offsets(shape, groups, offset, deviation, device):
    """E[x^2] - E[x]^2 in float32 would have no digit left; the last is a few units of float32 around its mean."""
    a, _, weight, bias = operands(shape, device, other=False)
    given = (a * deviation + offset, None, weight, bias, groups, 1e-12, None)
    y, true = group_norm(*given), exact(*given)
    assert_as_eager(y, group_norm_ref(*given), true)
    assert error(y, true) < 1e-6


def test_a_constant_group_is_its_bias(device):
    a, _, weight, bias = operands((2, 4, 1, 7), device, other=False)
    a = torch.full_like(a, 1e4)
    y = group_norm(a, None, weight, bias, 2, 1e-5, None)
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pixels", [9, WHOLE + 5])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter
def test_a_bad_value_spoils_its_group_alone(pixels, bad, device):
    a, b, weight, bias = operands((3, 8, 1, pixels), device)
    clean = group_norm(a, b, weight, bias, 2, 1e-5, "after")
    a[1, 5, 0, pixels - 1] = bad
    y = group_norm(a, b, weight, bias, 2, 1e-5, "after")
    assert y[1, 4:].isnan().all()
    y[1, 4:] = clean[1, 4:]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("pixels", [7, WHOLE + 5])
def test_bits_of_a_sample_do_not_depend_on_its_batch(pixels, device):
    a, b, weight, bias = operands((4, 8, 1, pixels), device)
    together = group_norm(a, b, weight, bias, 2, 1e-5, "before")
    alone = [group_norm(a[i : i + 1], b[i : i + 1], weight, bias, 2, 1e-5, "before") for i in range(4)]
    assert torch.equal(torch.cat(alone), together)


def test_samples_that_lie_apart(device):
    """As those of a part of a state do."""
    flat = torch.randn(3, 100, device=device)
    a = flat[:, :60].view(3, 3, 5, 4).movedim(-1, 1)
    weight, bias = torch.randn(2, 4, device=device)
    for b in (flat[:, 40:].view(3, 3, 5, 4).movedim(-1, 1), a.contiguous(memory_format=LAST)):
        given = (a, b, weight, bias, 2, 1e-5, "after")
        assert refuses(a=a, b=b, groups=2) is None
        torch.testing.assert_close(group_norm(*given).double(), exact(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_empty(shape, device):
    a, b, weight, bias = operands(shape, device)
    assert group_norm(a, b, weight, bias, 2, 1e-5, None).shape == shape


@pytest.mark.parametrize(
    "a, b, groups, why",
    [
        (torch.zeros(2, 4, 3, 3), None, 2, "not channels_last"),
        (torch.zeros(2, 4, 3, 3).double(), None, 2, "float64"),
        (torch.zeros(2, 4, 3, 3).to(memory_format=LAST), torch.zeros(2, 4, 3, 3), 2, "not channels_last"),
        (torch.zeros(2, 4, 3, 3).to(memory_format=LAST), torch.zeros(1, 4, 3, 3), 2, r"sum of shapes"),
        (torch.zeros(1, 10000, 1, 1), None, 1, "10000 channels, above 8192"),
        (torch.zeros(1, 8192, 1, 1), None, 1, None),
        (torch.zeros(2, 4, 5), None, 2, "not channels_last"),
    ],
)
def test_what_it_refuses(a, b, groups, why):
    reason = refuses(a=a, b=b, groups=groups)
    assert reason is None if why is None else why in reason


@pytest.mark.parametrize(
    "cell, scales",
    [
        (lambda: Conv(8, 3, groups=2), 1),
        pytest.param(lambda: MultiScale((8, 16), 3, groups=2), 2, marks=pytest.mark.slow),
    ],
    ids=["Conv", "MultiScale"],
)
def test_cells_solve_alike_and_differentiate_in_torch(cell, scales, device, monkeypatch):
    calls, op = [], dispatch.load("norms.group_norm")
    watched = dispatch.RowOp(lambda *given: calls.append(1) or op.run(*given), op.ref, op.refuses)
    monkeypatch.setitem(dispatch._ops, "norms.group_norm", watched)
    layer, x = DEQ(cell().to(device), tol=1e-5, max_steps=100), torch.randn(2, 3, 4, 4, device=device)
    results, counts = [], []
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            z = layer(x)
            value = torch.cat([t.flatten(1) for t in (z if scales > 1 else (z,))], 1)
            counts.append((len(calls), int(layer.last.steps.max())))
            results.append([value, *torch.autograd.grad(value.sin().sum(), list(layer.parameters()))])
    assert counts[0][0] == 0 and counts[1][0] % counts[1][1] == 0 and counts[1][0] >= 3 * counts[1][1]
    assert abs(counts[0][1] - counts[1][1]) <= 1
    assert len(calls) == counts[1][0]  # none in the backward
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
