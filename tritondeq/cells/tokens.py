"""Masks and rotary positions of attention, and keys and values of solved tokens, for the tokens to come."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layout import describe
from .base import features_of

ROOM = 64  # tokens that a store has room for at first, at least


def tokens_of(x: Any, features: int, cell: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns (x [B, T, features] with zeros in place of padding, mask [B, T] or None), for x or (x, mask)."""
    mask = None
    if isinstance(x, tuple | list) and len(x) == 2:
        x, mask = x
    features_of(x, features, cell)
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, tokens, {features}] for {type(cell).__name__}, got shape {tuple(x.shape)}")
    if mask is None:
        return x, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True: a real token), got {describe(mask)}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be [batch, tokens] = {tuple(x.shape[:2])}, got shape {tuple(mask.shape)}")
    return x.masked_fill(~mask.unsqueeze(-1), 0.0), mask


def with_padding(x: Any, mask: Any) -> tuple[Any, Any]:
    """Returns (x, mask), as tokens_of takes it; ValueError where x is such a pair already."""
    if isinstance(x, tuple | list):
        raise ValueError("mask was given twice: pass padding as mask=mask or as (x, mask)")
    return x, mask


def attention_mask(at: int, tokens: int, real: Tensor | None, causal: bool, device: torch.device) -> Tensor:
    """Returns where tokens at, at + 1, ... attend to those from 0 on: bool, for [B, 1, tokens, at + tokens].

    Every token attends to at least one: not all of torch's attention gives a finite value and gradient without any.
    """
    if real is not None and not causal:
        return (real | ~real.any(1, keepdim=True))[:, None, None]
    queries = torch.arange(at, at + tokens, device=device).unsqueeze(1)
    keys = torch.arange(at + tokens, device=device)
    if real is None:
        return (keys <= queries)[None, None]
    return (((keys <= queries) & real.unsqueeze(1)) | (keys == queries)).unsqueeze(1)


def rotary_angles(at: int, tokens: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of position * base^(-2 i / width), [tokens, width], both halves alike."""
    wide: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    frequency = base ** -(torch.arange(0, width, 2, **wide) / width)
    angle = torch.outer(torch.arange(at, at + tokens, **wide), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + width / 2) of each head [B, heads, T, width] by their angles."""
    first, second = t.chunk(2, dim=-1)
    return torch.addcmul(t * cos, torch.cat((-second, first), dim=-1), sin).to(t.dtype)


class Past(NamedTuple):
    """The first `tokens` of a store, which is None before there are any.

    Appending leaves it as it was: where other tokens have been appended before, a copy of the store takes these.
    """

    store: "Store | None"
    tokens: int


class Store:
    """Buffers [batch, heads, capacity, width] whose capacity doubles, so that T tokens are copied O(T) times in all."""

    def __init__(self, batch: int, heads: int, width: int, tokens: int, dtype: torch.dtype, device: torch.device):
        self.used, self.padded = 0, False
        capacity = max(tokens, ROOM)
        self.keys = torch.zeros(batch, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)

    def room(self, tokens: int, more: int) -> "Store":
        """Returns a store with these first `tokens` and free room for `more`."""
        free = self.used == tokens
        capacity = self.real.shape[1]
        if free and tokens + more <= capacity:
            return self
        store = self if free else object.__new__(Store)
        store.used, store.padded = tokens, self.padded
        capacity = max(tokens + more, 2 * capacity if free else capacity)
        for name, dim in (("keys", 2), ("values", 2), ("real", 1)):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:dim], capacity, *old.shape[dim + 1 :])
            new.narrow(dim, 0, tokens).copy_(old.narrow(dim, 0, tokens))
            setattr(store, name, new)
        return store

    def write(self, at: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [B, heads, t, width] to tokens at, at + 1, ...; returns all keys and values up to there."""
        end = at + k.shape[2]
        self.keys[:, :, at:end], self.values[:, :, at:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]
