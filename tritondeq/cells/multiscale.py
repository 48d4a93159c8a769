"""Several resolutions at once: MDEQ."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as weight_normed

from ..checks import integer
from .base import Cell
from .conv import Block, Injection, image_of, values_in_groups
from .norm import GroupNorm

State = tuple[Tensor, ...]
_LEAD = 6.0  # at initialisation, of what a block makes against the state it adds it to
_FAINT = 0.1  # and of all that comes from a resolution without an injection


class MultiScale(Cell):
    """The multiscale cell of MDEQ (Bai et al. 2020): images at 2 to 4 resolutions that interact at every step.

        y_i = GN(ReLU(z_i + GN(u_i + conv3(ReLU(GN(conv3 z_i))))))      at each resolution i, as in `Conv`
        z_i' = GN(conv1(ReLU(sum_j fuse_ij(y_j))))                      fuse_ii is the identity

    fuse_ij, to a coarser i > j, is i - j times a 3 x 3 convolution of stride 2 and GN, with a ReLU between; to a finer
    i < j a 1 x 1 convolution and GN, repeated in space (nearest). u_0 = GN(conv1 x), and u_i = 0 for i > 0.

    The state is a tuple of [B, channels[i], ceil(H / 2^i), ceil(W / 2^i)]. Sizes that are no multiples of 2^i work: a
    coarse pixel then stands for fewer fine ones at the lower and right edge.

    Contractive at initialisation: what a block makes weighs six times the state it is added to, and all that comes from
    a resolution without an injection a tenth. Measured with four channels or more to a group: random images of 8 to 32
    pixels a side take 6 to 9 steps to 1e-3 (spectral radius 0.30 to 0.54). Constant images, and groups that hold a
    handful of values at the coarsest resolution, may not contract.

    The published f, with its options, by number of parameters (`input` and `inputs` apart, since there a stem stands
    before f):

        MultiScale((24, 24), expansion=5)                      111456   CIFAR-10, small
        MultiScale((32, 64, 128, 256), expansion=5)           8712832   CIFAR-10, large; ImageNet, small
        MultiScale((88, 176, 352, 704), expansion=6)         77689392   ImageNet, XL

    Args:
        channels: Channels of each resolution, the finest first.
        inputs: Channels of x, [B, inputs, H, W]; None is channels[0].
        groups: Number of groups of every GroupNorm but those after the fusion, which have half as many (at least one),
            as published; divides all channels.
        expansion, dropout: As for `Conv`, in each block.
        weight_norm: Whether the blocks' convolutions and the ones after the fusion are weight-normalised.

    Raises:
        ValueError: A group would hold a single value at some resolution.
    """

    def __init__(
        self,
        channels: Sequence[int],
        inputs: int | None = None,
        *,
        expansion: int = 1,
        groups: int = 8,
        dropout: float = 0.0,
        weight_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        channels = tuple(channels)
        if not 2 <= len(channels) <= 4:
            raise ValueError(f"channels must be those of 2 to 4 resolutions, got {len(channels)}: {channels}")
        inputs = channels[0] if inputs is None else inputs
        options = {f"channels[{i}]": c for i, c in enumerate(channels)} | {"inputs": inputs, "expansion": expansion}
        for name, value in (options | {"groups": groups}).items():
            integer(name, value)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        scales = range(len(channels))
        self.channels, self.inputs, self.groups = channels, inputs, groups
        self.input = Injection(inputs, channels[0], partial(nn.Conv2d, kernel_size=1, **like), groups, **like)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, **like)
        blocks: list[Any] = [Block(c, conv, expansion, groups, dropout, weight_norm, **like) for c in channels]
        fuse = [[_fusion(channels[j], channels[i], i - j, groups, like) for j in scales] for i in scales]
        self.blocks, self.fuse = nn.ModuleList(blocks), nn.ModuleList(map(nn.ModuleList, fuse))
        self.post = nn.ModuleList()
        for c in channels:
            mix: nn.Module = nn.Conv2d(c, c, 1, bias=False, **like)
            mix = weight_normed(mix) if weight_norm else mix
            self.post.append(nn.Sequential(nn.ReLU(), mix, GroupNorm(max(1, groups // 2), c, **like)))
        for j, block in enumerate(blocks):
            nn.init.constant_(block.norm2.weight, _LEAD)
            for norm in [block.norm3, *(fuse[i][j][-1] for i in scales if i != j)] if j else ():
                nn.init.constant_(norm.weight, _FAINT)

    def inject(self, x: Tensor) -> Tensor:
        image_of(x, self.inputs, 2, self)
        for size, c in zip(_sizes(x.shape[2:], len(self.channels)), self.channels, strict=True):
            values_in_groups(size, c, self.groups)
        return self.input(x)

    def initial(self, x: Tensor, injection: Tensor) -> State:
        sizes = _sizes(x.shape[2:], len(self.channels))
        shapes = [(x.shape[0], c, *size) for c, size in zip(self.channels, sizes, strict=True)]
        like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        return tuple(torch.empty(s, memory_format=torch.channels_last, **like).zero_() for s in shapes)

    def forward(self, z: State, injection: Tensor) -> State:
        y = [block(part, None if i else injection) for i, (block, part) in enumerate(zip(self.blocks, z, strict=True))]
        fused = []
        for i, total in enumerate(y):
            for j, (fuse, part) in enumerate(zip(self.fuse[i].children(), y, strict=True)):
                if j != i:
                    part = fuse(part)
                    if j > i:
                        part = F.interpolate(part, scale_factor=2 ** (j - i))[:, :, : total.shape[2], : total.shape[3]]
                    total = total + part
            fused.append(self.post[i](total))
        return tuple(fused)


def _fusion(inputs: int, outputs: int, down: int, groups: int, like: dict[str, Any]) -> nn.Sequential:
    """Returns the map from one resolution to another, `down` levels coarser."""
    if down < 0:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False, **like), GroupNorm(groups, outputs, **like))
    layers: list[nn.Module] = []
    for level in range(down):
        last = level == down - 1
        wide = outputs if last else inputs
        layers.append(nn.Conv2d(inputs, wide, 3, stride=2, padding=1, bias=False, **like))
        layers.append(GroupNorm(groups, wide, relu=None if last else "after", **like))
    return nn.Sequential(*layers)


def _sizes(size: torch.Size, scales: int) -> list[torch.Size]:
    return [torch.Size(-(-n // 2**i) for n in size) for i in range(scales)]
