"""Solving token by token: what `DEQ.step` stores between two steps, and which caches fit."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .cells import Cell
from .layout import describe, pytree


@dataclass(frozen=True)
class Cache:
    """What `DEQ.step` stores of the tokens so far."""

    layer: object  # the token of the layer; a copy of the layer has another
    like: dict[str, Any]  # batch size, dtype and device of x
    past: Any = field(repr=False)  # what the cell's `remember` returned


def past_of(cell: nn.Module, x: Any, cache: Any, layer: object) -> tuple[Any, dict[str, Any]]:
    """Returns (the cell's `past`, None for the first tokens, and what a cache for x is like), or raises as `step`."""
    if not isinstance(cell, Cell) or type(cell).extend is Cell.extend or type(cell).remember is Cell.remember:
        raise TypeError(f"step needs a causal cell that defines extend and remember, got {type(cell).__name__}")
    first = next((leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise TypeError(f"x must hold a tensor [batch, tokens, ...], got {describe(x)}")
    like = {"batch size": first.shape[0], "dtype": first.dtype, "device": first.device}
    if cache is None:
        return None, like
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be what step returned, or None, got {describe(cache)}")
    if cache.layer is not layer:
        raise ValueError("cache must be what a step of this layer returned, got that of another layer")
    for name, value in like.items():
        if cache.like[name] != value:
            raise ValueError(f"cache must fit x: it is for {name} {cache.like[name]}, and x has {name} {value}")
    return cache.past, like
