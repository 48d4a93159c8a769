"""What stays the same during a solve: the masks of dropout, and the weights that torch.nn.utils.parametrize makes."""

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import integer, number


class FixedDropout(nn.Module):
    """`nn.Dropout` whose mask is drawn once a solve (variational dropout; Gal and Ghahramani 2016, Bai et al. 2019).

    A mask that changes from step to step leaves no fixed point. In a cell of a `DEQ` that trains, every step of a
    solve, its gradient, and what checkpointing recomputes use one mask; the next solve draws another. Outside of a
    solve each call draws a new mask, and in eval() there is none.

    Args:
        p: Share of elements that become zero, in [0, 1); the others are scaled by 1 / (1 - p).
        dims: The mask has one value for each index of this many leading dims: 1 drops whole samples, as stochastic
            depth does, 2 whole channels, as nn.Dropout2d. None: one for each element.

    Raises:
        TypeError, ValueError: An option does not fit, or the shape changed within a solve.
    """

    def __init__(self, p: float = 0.5, dims: int | None = None):
        super().__init__()
        number("p", p, 0, 1, closed=True)
        if dims is not None:
            integer("dims", dims, least=0)
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
                f"{tuple(shape)}: use another FixedDropout at each place in the cell"
            )
        return x * self.mask

    def extra_repr(self) -> str:
        return f"p={self.p}" if self.dims is None else f"p={self.p}, dims={self.dims}"


class Masks:
    """The dropout masks of one solve; RuntimeError where the cell would draw a new one at every step."""

    def __init__(self, cell: nn.Module):
        self.masks: dict[FixedDropout, Tensor | None] = {}  # None until the first evaluation
        for name, module in cell.named_modules() if cell.training else ():
            if isinstance(module, FixedDropout):
                if module.training and module.p > 0:
                    self.masks[module] = None
            elif _draws(module):
                raise RuntimeError(
                    f"the cell holds {type(module).__name__} {name!r}, which draws another mask at every step, so that "
                    "there is no fixed point: use tritondeq.FixedDropout, set its dropout to 0, or call eval()"
                )

    @property
    def drawn(self) -> bool:
        return all(mask is not None for mask in self.masks.values())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        for module, mask in self.masks.items():
            module.held, module.mask = True, mask
        try:
            yield
        finally:
            for module in self.masks:
                self.masks[module] = module.mask
                module.held, module.mask = False, None


def _draws(module: nn.Module) -> bool:
    """Whether the module, none of ours, draws a mask at each call."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
        return bool(module.p)
    share = getattr(module, "drop_prob", None)  # the name in every DropPath
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        share = module.dropout
    return isinstance(share, int | float) and share > 0


class Parametrized:
    """The parametrized tensors of a module, such as those of spectral_norm or weight_norm.

    `values` are computed at construction, in its grad mode; while `held`, the module uses them. A caller passes them to
    f as an argument, to be differentiated as any other. (parametrize.cached() would store what no_grad computed.)
    """

    def __init__(self, module: nn.Module):
        modules: list[Any] = [m for m in module.modules() if parametrize.is_parametrized(m)]
        self.lists = [m.parametrizations[name] for m in modules for name in m.parametrizations]
        self.values: tuple[Tensor, ...] = tuple(getattr(m, name) for m in modules for name in m.parametrizations)

    @contextlib.contextmanager
    def held(self, values: tuple[Tensor, ...]) -> Iterator[None]:
        constants = [_CONSTANTS.setdefault(made_of, _Constant()) for made_of in self.lists]
        before: list[Any] = [c.value for c in constants]  # a DEQ within a DEQ sees what the outer one holds
        for made_of, constant, value in zip(self.lists, constants, values, strict=True):
            made_of.forward, constant.value = constant, value
        try:
            yield
        finally:
            for made_of, constant, value in zip(self.lists, constants, before, strict=True):
                constant.value = value
                if value is None:
                    del made_of.forward


class _Constant:
    """What a ParametrizationList calls while its value is held."""

    value: Tensor | None = None

    def __call__(self) -> Tensor | None:
        return self.value


_CONSTANTS: WeakKeyDictionary[nn.Module, _Constant] = WeakKeyDictionary()  # reused: compilers guard on identity
