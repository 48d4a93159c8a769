"""Dropout in a cell: its mask has to stay what it is for as long as a solve lasts."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .solvers.base import count


class FixedDropout(nn.Module):
    """`nn.Dropout` whose mask is drawn once a solve (variational dropout; Gal and Ghahramani 2016, Bai et al. 2019).

    A mask that changes from step to step leaves no fixed point to find. In a cell of a `DEQ` that trains, every step of
    a solve, its gradient, and what checkpointing recomputes see one mask; the next solve draws another. Outside of a
    solve each call draws its own, and in eval() there is none.

    Args:
        p: Share of elements that become zero, in [0, 1); the others are scaled by 1 / (1 - p).
        dims: The mask has one value for each index of this many leading dims: 1 drops whole samples, as stochastic
            depth does, 2 whole channels, as nn.Dropout2d. None: one for each element.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
        ValueError: the shape changed between two calls in one solve.
    """

    def __init__(self, p: float = 0.5, dims: int | None = None):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p!r}")
        if dims is not None:
            count("dims", dims, least=0)
        self.p, self.dims = p, dims
        self.held = False  # whether a solve is on
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = x.shape if self.dims is None else x.shape[: self.dims] + (1,) * (x.ndim - self.dims)
        if not self.held:
            return F.dropout(x, self.p) if self.dims is None else x * F.dropout(x.new_ones(shape), self.p)
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(x) if self.dims is None else x.new_ones(shape), self.p)
        if self.mask.shape != shape:
            raise ValueError(
                f"FixedDropout drew its mask for the shape {tuple(self.mask.shape)} in this solve, and now needs "
                f"{tuple(shape)}: give each place in the cell a FixedDropout of its own"
            )
        return x * self.mask

    def extra_repr(self) -> str:
        return f"p={self.p}" if self.dims is None else f"p={self.p}, dims={self.dims}"


_REFUSED = (
    "the cell holds {} {!r}, which draws another mask at every step, so that there is no fixed point: "
    "use tritondeq.FixedDropout, set its dropout to 0, or call eval()"
)


class Masks:
    """The masks of one solve.

    Raises:
        RuntimeError: the cell would draw a new mask at every step.
    """

    def __init__(self, cell: nn.Module):
        self.masks: dict[FixedDropout, Tensor | None] = {}
        if cell.training:
            for name, module in cell.named_modules():
                if isinstance(module, FixedDropout):
                    if module.training and module.p > 0:
                        self.masks[module] = None
                elif _draws(module):
                    raise RuntimeError(_REFUSED.format(type(module).__name__, name))

    @property
    def drawn(self) -> bool:
        return all(mask is not None for mask in self.masks.values())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For one evaluation of the cell."""
        for module, mask in self.masks.items():
            module.held, module.mask = True, mask
        try:
            yield
        finally:
            for module in self.masks:
                self.masks[module] = module.mask
                module.held, module.mask = False, None


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
        return module.p > 0
    if isinstance(getattr(module, "drop_prob", None), int | float):  # DropPath, by whoever wrote it
        return module.drop_prob > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
