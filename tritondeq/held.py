"""What stays the same during a solve: the masks of dropout, and the weights that torch.nn.utils.parametrize makes.

Both belong to the solve, and lie in thread-local storage while it evaluates its cell: threads may share a layer.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import integer, number

_thread = threading.local()  # `held`: (masks, values) of the solve that evaluates a cell in this thread


class FixedDropout(nn.Module):
    """`nn.Dropout` whose mask is drawn once a solve (variational dropout; Gal and Ghahramani 2016, Bai et al. 2019).

    A mask that changes from step to step leaves no fixed point. In a cell of a `DEQ` that trains, every step of a
    solve, its gradient, and what `Unrolled(checkpoint=True)` recomputes use one mask; the next solve draws another.
    Outside of a solve each call draws a new mask, and in eval() there is none. For Monte Carlo dropout, call train() of
    this module alone. torch.utils.checkpoint around the layer draws the same mask again; around a part of its cell it
    would draw another one in the backward pass, and raises.

    Args:
        p: Share of elements that become zero, in [0, 1); the others are scaled by 1 / (1 - p).
        dims: The mask has one value for each index of this many leading dims: 1 drops whole samples, as stochastic
            depth does, 2 whole channels, as nn.Dropout2d. None: one for each element.

    Raises:
        TypeError, ValueError: An option does not fit, or the shape changed within a solve.
        RuntimeError: A checkpoint within the cell recomputes it in a backward pass.
    """

    def __init__(self, p: float = 0.5, dims: int | None = None):
        super().__init__()
        number("p", p, 0, 1, closed=True)
        if dims is not None:
            integer("dims", dims, least=0)
        self.p, self.dims = p, dims

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = x.shape if self.dims is None else x.shape[: self.dims] + (1,) * (x.ndim - self.dims)
        held = getattr(_thread, "held", None)
        drawn = None if held is None else held[0].get(self)
        if drawn is None:
            if self in _in_cells and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(_RECOMPUTED)
            return F.dropout(x, self.p) if self.dims is None else x * F.dropout(x.new_ones(shape), self.p)
        if not drawn:
            drawn.append(F.dropout(torch.ones_like(x) if self.dims is None else x.new_ones(shape), self.p))
        mask = drawn[0]
        if mask.shape != shape:
            raise ValueError(
                f"FixedDropout drew its mask for the shape {tuple(mask.shape)} in this solve, and now needs "
                f"{tuple(shape)}: use another FixedDropout at each place in the cell"
            )
        return x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}" if self.dims is None else f"p={self.p}, dims={self.dims}"


_in_cells: weakref.WeakSet[FixedDropout] = weakref.WeakSet()  # those that a solve has held
_RECOMPUTED = (
    "a checkpoint within a cell recomputes it in the backward pass, where no solve holds the masks of FixedDropout, so "
    "that the gradient would be of another mask: checkpoint the layer, and not parts of its cell"
)


class Held:
    """The dropout masks and the parametrized tensors of one solve that evaluates these modules.

    What the solve around it holds, where there is one, stays as it is.

    Args:
        modules: Those that the cell may reach.
        called: Those that it may call, which must be functions of the state alone. None is all.

    Attributes:
        parts: The modules and all in them, each once.
        masks: The mask of each `FixedDropout` that drops, in a list that is empty until the first evaluation.
        weights: The parametrized tensors, such as those of spectral_norm or weight_norm, computed once, in the grad
            mode of the construction. A caller passes them to f, to be differentiated as any other argument.

    Raises:
        RuntimeError: A module draws another mask, or takes other statistics of the batch, at every step.
    """

    def __init__(self, *modules: nn.Module, called: tuple[nn.Module, ...] | None = None):
        may_call = None if called is None else {*parts_of(called)}
        masks, values = getattr(_thread, "held", None) or ({}, {})
        self.masks: dict[FixedDropout, list[Tensor]] = dict(masks)
        self._values: dict[nn.Module, Tensor] = dict(values)
        self._lists: list[nn.Module] = []
        weights = []
        self.parts = parts_of(modules)
        for part in self.parts:
            if isinstance(part, FixedDropout):
                if part.training and part.p > 0:
                    self.masks.setdefault(part, [])
                    _in_cells.add(part)
            elif part.training or isinstance(part, nn.modules.batchnorm._NormBase):
                if may_call is None or part in may_call:
                    _refuse(part, modules)
            if "parametrizations" in part._modules and parametrize.is_parametrized(part):
                for name, made_of in part.parametrizations.items():  # type: ignore[union-attr, operator]
                    _let_hold(made_of)
                    if made_of not in self._values:
                        self._lists.append(made_of)
                        weights.append(getattr(part, name))
        self.weights: tuple[Tensor, ...] = tuple(weights)

    @property
    def empty(self) -> bool:
        return not (self.masks or self._values or len(self.weights))

    @property
    def drawn(self) -> bool:
        return all(self.masks.values())

    def copy(self) -> "Held":
        """Returns what holds copies of the masks, for other weights."""
        other = object.__new__(Held)
        other.parts, other.weights = self.parts, self.weights
        other._values, other._lists = self._values, self._lists
        other.masks = {part: [mask.clone() for mask in drawn] for part, drawn in self.masks.items()}
        return other

    @contextlib.contextmanager
    def on(self, weights: tuple[Tensor, ...]) -> Iterator[None]:
        """Lets the modules use the masks and these weights, in this thread."""
        before = getattr(_thread, "held", None)
        _thread.held = self.masks, self._values | dict(zip(self._lists, weights, strict=True))
        try:
            yield
        finally:
            _thread.held = before


class _HeldList(parametrize.ParametrizationList):
    """A ParametrizationList that returns the value that this thread's solve holds, if any."""

    def forward(self) -> Tensor:
        held = getattr(_thread, "held", None)
        value = None if held is None else held[1].get(self)
        return super().forward() if value is None else value


def _let_hold(made_of: Any) -> None:
    if type(made_of) is parametrize.ParametrizationList:
        made_of.__class__ = _HeldList


def ready(module: nn.Module) -> None:
    """Prepares what is parametrized in a module for solves, which a compiler that traces one can't do."""
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList):
            _let_hold(part)


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules and all in them, each once; as `nn.Module.modules`, at a fifth of its price."""
    parts: dict[nn.Module, None] = {}
    stack = list(modules)
    while stack:
        part = stack.pop()
        if part is not None and part not in parts:
            parts[part] = None
            stack.extend(reversed(part._modules.values()))  # type: ignore[arg-type]  # some are None
    return list(parts)


def computed(part: nn.Module) -> list[Callable]:
    """Returns the pre-hooks of torch.nn.utils.weight_norm and spectral_norm, which compute a weight of the module."""
    return [hook for hook in part._forward_pre_hooks.values() if hasattr(hook, "compute_weight")]


def hooked(part: nn.Module) -> bool:
    """Returns whether a hook may change what goes into the module or comes out of it; those of FSDP do not."""
    if not (part._forward_hooks or part._forward_pre_hooks) or any(
        c.__name__ == "FSDPModule" for c in type(part).__mro__
    ):
        return False
    return bool(part._forward_hooks) or len(part._forward_pre_hooks) > len(computed(part))


def _refuse(part: nn.Module, modules: tuple[nn.Module, ...]) -> None:
    """Raises RuntimeError where a module makes a cell something else than a function of each sample's state."""
    if why := _no_function(part):
        path = next(path for module in modules for path, other in module.named_modules() if other is part)
        raise RuntimeError(f"the cell holds {type(part).__name__}{f' {path!r}' if path else ''}, which {why}")


def _no_function(part: nn.Module) -> str | None:
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        if part.training or part.running_mean is None:
            return (
                "mixes the samples of a batch by their statistics, and moves its running ones at every step: call its "
                "eval(), or use a GroupNorm or LayerNorm"
            )
    elif part.training and draws(part):
        return (
            "draws another mask at every step, so that there is no fixed point: use tritondeq.FixedDropout, which "
            "fix_dropout(cell) puts in its place, set its dropout to 0, or call eval()"
        )
    return None


def draws(module: nn.Module) -> bool:
    """Returns whether the module, none of ours, draws a mask at each call in train(), whatever mode it is in."""
    if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
        return bool(module.p)
    # the name in every DropPath; not by getattr, which is slow where a module lacks it
    share = vars(module).get("drop_prob", getattr(type(module), "drop_prob", None))
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        share = module.dropout
    return isinstance(share, int | float) and share > 0
