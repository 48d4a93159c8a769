"""The norms of cells, with the sums and activations that stand around them."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import dispatch


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm of a sum, with a ReLU before it or after it (`relu`: "before", "after" or None).

    Without gradients, as in the steps of a solve, and on a GPU, it is one Triton launch that keeps channels_last, which
    torch's does not.
    """

    def __init__(self, groups: int, channels: int, *, relu: str | None = None, **like: Any):
        if channels % groups:
            raise ValueError(f"groups={groups} must divide the channels of every GroupNorm, and one has {channels}")
        super().__init__(groups, channels, **like)
        self.relu = relu

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            op, _ = dispatch.pick("norms.group_norm", a.device, a=a, b=b, groups=self.num_groups)
            if op is not None:
                return op.run(a, b, self.weight, self.bias, self.num_groups, self.eps, self.relu)
        x = a if b is None else a + b
        y = super().forward(torch.relu(x) if self.relu == "before" else x)
        return torch.relu(y) if self.relu == "after" else y


def summed(a: Tensor, b: Tensor, gamma: Tensor | None) -> Tensor:
    """Returns a + gamma b."""
    return a + b if gamma is None else torch.addcmul(a, gamma, b)


def sum_and_norm(
    a: Tensor, b: Tensor, gamma: Tensor | None, norm: nn.RMSNorm, sum_too: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (s, norm(s)) with s = a + gamma b; by one kernel, in which s may be None unless `sum_too`.

    With gradients, and within a compiler, torch does it.
    """
    if plain_norm(norm) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        autocast = torch.is_autocast_enabled(a.device.type)
        operands = {"a": a, "b": b, "gamma": gamma, "weight": norm.weight}
        op, _ = dispatch.pick("norms.residual_rms", a.device, autocast=autocast, **operands)
        if op is not None:
            return op.run(**operands, eps=norm.eps, keep_sum=sum_too)
    s = summed(a, b, gamma)
    return s, norm(s)


def plain_norm(norm: nn.Module) -> bool:
    """Returns whether kernels can stand in for it: it is an nn.RMSNorm with a weight, and has no hooks."""
    hooks = norm._forward_hooks or norm._forward_pre_hooks
    return type(norm) is nn.RMSNorm and norm.eps is not None and norm.weight is not None and not hooks
