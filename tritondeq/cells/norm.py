"""GroupNorm between convolutions, with what stands around it."""

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm of a sum, with a ReLU before it or after it.

    Args:
        groups: Groups of channels.
        channels: C of [B, C, ...]; a multiple of `groups`.
        relu: "before", "after" or None.

    Raises:
        ValueError: `groups` does not divide `channels`.
    """

    def __init__(self, groups: int, channels: int, *, relu: str | None = None, **kwargs):
        if channels % groups:
            raise ValueError(f"groups={groups} must divide the channels of every GroupNorm, and one has {channels}")
        super().__init__(groups, channels, **kwargs)
        self.relu = relu

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """GroupNorm(a), or of a + b."""
        x = a if b is None else a + b
        y = super().forward(torch.relu(x) if self.relu == "before" else x)
        return torch.relu(y) if self.relu == "after" else y
