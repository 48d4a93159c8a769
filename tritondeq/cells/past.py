"""Keys and values of solved tokens, for the tokens to come."""

from typing import NamedTuple

import torch
from torch import Tensor

ROOM = 64  # tokens that a store has room for at first, at least


class Past(NamedTuple):
    """The first `tokens` of a store, which is None before there are any.

    Appending leaves it as it was: where other tokens have been appended before, a copy of the store takes these.
    """

    store: "Store | None"
    tokens: int


class Store:
    """Buffers [batch, heads, capacity, width] whose capacity doubles, so that T tokens are copied O(T) times in all.

    Args:
        batch: Number of sequences.
        heads: Number of heads of keys and values.
        width: Width of a head.
        tokens: The number of tokens that there is room for, at least.
        dtype: Of keys and values.
        device: Of all buffers.
    """

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
