"""GroupNorm between convolutions, with what stands around it."""

import torch
from torch import Tensor, nn

from ..kernels import dispatch


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm of a sum, with a ReLU before it or after it.

    Without gradients, as in the steps of a solve, and on a GPU, it is one Triton launch that keeps channels_last, which
    torch's does not.

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
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            op, _ = dispatch.pick("group_norm", a.device, a=a, b=b, groups=self.num_groups)
            if op is not None:
                return op.run(a, b, self.weight, self.bias, self.num_groups, self.eps, self.relu)
        x = a if b is None else a + b
        y = super().forward(torch.relu(x) if self.relu == "before" else x)
        return torch.relu(y) if self.relu == "after" else y
