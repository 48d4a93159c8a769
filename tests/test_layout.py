"""States in matrices: what lies where, and what is copied."""

import pytest
import torch

from tritondeq import DEQ, fixed_point
from tritondeq.layout import Layout

LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


def image(shape=(2, 3, 4, 5), form=LAST, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype).contiguous(memory_format=form)


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape, form", [((2, 3, 4, 5), LAST), ((2, 3, 2, 4, 5), LAST_3D)])
def test_channels_last_lies_as_in_memory(shape, form):
    z = image(shape, form)
    layout = Layout(z)
    flat = layout.pack(z)
    assert same_memory(flat, z) and torch.equal(flat, z.movedim(1, -1).reshape(2, -1))
    back = layout.unpack(flat)
    assert same_memory(back, z) and back.stride() == z.stride() and torch.equal(back, z)


def test_the_other_format_is_copied_and_means_the_same():
    z = image()
    layout, plain = Layout(z), z.contiguous()
    flat = layout.pack(plain)
    assert not same_memory(flat, plain) and torch.equal(flat, layout.pack(z))
    assert torch.equal(Layout(plain).pack(z), plain.reshape(2, -1))


@pytest.mark.parametrize(
    "z, dims",
    [
        (image(form=torch.contiguous_format), 1),
        (image((2, 1, 4, 5)), 1),  # both formats at once
        (image((2, 3, 1, 1)), 1),
        (image()[:, :2], 1),  # not dense
        (image(), 2),
        (image().transpose(2, 3), 1),
        (torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2), 1),  # no format that torch keeps
    ],
)
def test_all_else_lies_in_order_of_dims(z, dims):
    layout = Layout(z, dims)
    flat = layout.pack(z)
    assert torch.equal(flat, z.reshape(flat.shape)) and torch.equal(layout.unpack(flat), z)


def test_nesting_with_formats_and_dtypes_of_its_own():
    z = {"a": image(), "b": (image((2, 3), torch.contiguous_format), image((2, 4, 2, 2), dtype=torch.bfloat16))}
    layout = Layout(z)
    flat = layout.pack(z)
    assert flat.shape == (2, 60 + 3 + 16) and flat.dtype == torch.float32
    back = layout.unpack(flat)
    assert torch.equal(back["a"], z["a"]) and torch.equal(back["b"][0], z["b"][0])
    assert back["b"][1].dtype == torch.bfloat16 and torch.equal(back["b"][1], z["b"][1])
    for leaf in (back["a"], back["b"][1]):
        assert leaf.stride(1) == 1
    assert Layout(back).channels_last == layout.channels_last  # a start from the last value


def test_a_mask_lies_where_its_elements_do():
    z, mask = image(), torch.rand(2, 3, 4, 5) > 0.5
    layout = Layout(z)
    assert torch.equal(layout.mask(mask), layout.pack(mask.float()).bool())
    rows = torch.rand(2, 3) > 0.5
    assert torch.equal(layout.mask(rows), layout.pack(rows[..., None, None].expand(2, 3, 4, 5).float()).bool())


def test_packing_is_differentiable():
    z = image(dtype=torch.float64).requires_grad_()
    layout = Layout(z)
    assert torch.autograd.gradcheck(lambda z: (layout.pack(z).sin(), layout.unpack(layout.pack(z)).sin()), z)


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
def test_a_solve_keeps_the_format_of_its_start(form):
    """For f, for the value, and for a start from the last value."""
    x, seen = torch.randn(2, 3, 4, 5), []

    def f(z):
        seen.append(z)
        return torch.tanh(0.5 * z + x)

    z0 = torch.zeros(2, 3, 4, 5).contiguous(memory_format=form)
    value = fixed_point(f, z0, tol=1e-6).value
    assert fixed_point(f, value, tol=1e-6).steps.max() == 1
    assert all(z.stride() == z0.stride() for z in (*seen, value))
    torch.testing.assert_close(value, torch.tanh(0.5 * value + x), atol=1e-5, rtol=0)


def test_a_plain_convolution_gets_the_format_of_its_input():
    class Cell(torch.nn.Conv2d):
        def forward(self, z, x):
            assert z.is_contiguous(memory_format=LAST)
            return torch.tanh(0.3 * super().forward(z) + x)

    layer, x = DEQ(Cell(3, 3, 3, padding=1)), torch.randn(2, 3, 4, 5).contiguous(memory_format=LAST)
    z = layer(x)
    assert z.is_contiguous(memory_format=LAST)
    z.sum().backward()
    assert layer.cell.weight.grad.norm() > 0
