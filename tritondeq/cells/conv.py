"""z = GN(ReLU(z + GN(u + conv(ReLU(GN(conv z)))))): the residual block of MDEQ, at one resolution."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as weight_normed

from ..checks import integer
from ..held import FixedDropout
from ..layout import transformed
from .base import Cell, floating
from .norm import GroupNorm

_CONVS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
_LEAD = 3.0  # what the sum with u weighs at initialisation, against the unit variance of the state
_SMALL = 0.1  # of a variance-keeping scale, for the convolution whose output the injection is added to


class Conv(Cell):
    """z = GN(ReLU(z + GN(u + conv(ReLU(GN(conv z)))))), u = GN(conv x): the residual block of MDEQ (Bai et al. 2020).

    Convolutions keep the size of the image. In two dimensions the state is channels_last in memory, and so is what a
    solve returns, whatever the format of x; a z0 is best given in that format, in which it stays.

    Contractive at initialisation: u has unit variance, what is added to it about a hundredth of that, and the sum
    weighs three times what the state does. Measured with four channels or more to a group, 16 to 256 channels, 1 to 32
    pixels a side: 7 to 12 steps to 1e-3 (spectral radius 0.44 to 0.80, the most at one pixel), up to 10 for constant
    images. Two channels in a group leave a constant image two values, whose GroupNorm is a sign: nothing contracts.

    Args:
        channels: C of the state, [B, C, H, W], or [B, C, L] for dims=1.
        inputs: Channels of x, [B, inputs, H, W]; None is C.
        kernel_size: The size of every convolution; odd.
        expansion: Channels between the two convolutions, in multiples of C; MDEQ has 5.
        groups: Number of groups of every GroupNorm; divides C.
        dims: 2 for images, 1 for sequences.
        dropout: Share of channels that a `FixedDropout` sets to zero before u is added.
        weight_norm: Whether the two convolutions are weight-normalised (Salimans and Kingma 2016), as in MDEQ.

    Raises:
        ValueError: Groups of x's size would hold a single value.
    """

    def __init__(
        self,
        channels: int,
        inputs: int | None = None,
        *,
        kernel_size: int = 3,
        expansion: int = 1,
        groups: int = 8,
        dims: int = 2,
        dropout: float = 0.0,
        weight_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        inputs = channels if inputs is None else inputs
        options = {"channels": channels, "inputs": inputs, "kernel_size": kernel_size, "expansion": expansion}
        for name, value in (options | {"groups": groups}).items():
            integer(name, value)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that an image keeps its size, got {kernel_size}")
        if dims not in _CONVS:
            raise ValueError(f"dims must be 1 or 2, got {dims!r}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.inputs, self.groups, self.dims = channels, inputs, groups, dims
        conv = partial(_CONVS[dims], kernel_size=kernel_size, padding=kernel_size // 2, **like)
        self.input = Injection(inputs, channels, conv, groups, **like)
        self.block = Block(channels, conv, expansion, groups, dropout, weight_norm, **like)

    def inject(self, x: Tensor) -> Tensor:
        image_of(x, self.inputs, self.dims, self)
        values_in_groups(x.shape[2:], self.channels, self.groups)
        return self.input(x)

    def initial(self, x: Tensor, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection, dtype=x.dtype)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return self.block(z, injection)


class Injection(nn.Module):
    """x -> GN(conv x), channels_last. The bias makes the channels of an empty image differ."""

    def __init__(self, inputs: int, channels: int, conv: Callable[..., nn.Module], groups: int, **like: Any):
        super().__init__()
        self.conv = conv(inputs, channels)
        self.norm = GroupNorm(groups, channels, **like)

    def forward(self, x: Tensor) -> Tensor:
        return as_channels_last(self.norm(self.conv(as_channels_last(x))))


class Block(nn.Module):
    """(z, u) -> GN(ReLU(z + GN(u + conv(ReLU(GN(conv z)))))); u may be None, for zero."""

    def __init__(
        self, channels: int, conv: Callable, expansion: int, groups: int, dropout: float, weight_norm: bool, **like: Any
    ):
        super().__init__()
        hidden = expansion * channels
        self.conv1, self.conv2 = conv(channels, hidden, bias=False), conv(hidden, channels, bias=False)
        nn.init.normal_(self.conv2.weight, std=_SMALL / self.conv2.weight[0].numel() ** 0.5)
        if weight_norm:
            weight_normed(self.conv1), weight_normed(self.conv2)
        self.norm1 = GroupNorm(groups, hidden, relu="after", **like)
        self.norm2 = GroupNorm(groups, channels, **like)
        self.norm3 = GroupNorm(groups, channels, relu="before", **like)
        nn.init.constant_(self.norm2.weight, _LEAD)
        self.dropout = FixedDropout(dropout, dims=2)  # whole channels

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        v = self.dropout(self.conv2(self.norm1(self.conv1(z))))
        return self.norm3(z, self.norm2(v, u))


def as_channels_last(x: Tensor) -> Tensor:
    """Returns an image in the memory format that is fastest for convolutions; a sequence as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and not transformed() else x


def image_of(x: Any, channels: int, dims: int, cell: nn.Module) -> None:
    """Raises unless x is a floating-point tensor [B, channels, H, W], or [B, channels, L]."""
    floating(x, cell)
    if x.ndim != dims + 2 or x.shape[1] != channels:
        wanted = f"[B, {channels}, {'H, W' if dims == 2 else 'L'}]"
        raise ValueError(f"x must be {wanted} for {type(cell).__name__}, got shape {tuple(x.shape)}")


def values_in_groups(size: torch.Size, channels: int, groups: int) -> None:
    """Raises ValueError where a group of a GroupNorm would hold a single value, whose norm is always zero."""
    if channels // groups * size.numel() == 1:
        raise ValueError(
            f"groups={groups} of {channels} channels leave one value to a group of a {' x '.join(map(str, size))} "
            "image, and normalised it is always 0: take fewer groups"
        )
