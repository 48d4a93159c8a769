"""Keys and values of tokens that are solved, for those to come."""

from typing import NamedTuple

import torch
from torch import Tensor

ROOM = 64  # tokens a store begins with, at least


class Past(NamedTuple):
    """The first `tokens` of a store. Appending to it leaves it as it was: where others have appended before, a copy is
    appended to.
    """

    store: "Store"
    tokens: int


class Store:
    """Buffers whose capacity doubles, so that T tokens are copied O(T) times in all.

    Args:
        batch, heads, width: Of keys and values, [batch, heads, capacity, width].
        tokens: Room for so many at least.
    """

    def __init__(self, batch: int, heads: int, width: int, tokens: int, dtype: torch.dtype, device: torch.device):
        self.used, self.padded = 0, False
        capacity = max(tokens, ROOM)
        self.keys, self.values = (
            torch.zeros(batch, heads, capacity, width, dtype=dtype, device=device) for _ in range(2)
        )
        self.real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)

    def room(self, tokens: int, more: int) -> "Store":
        """A store with these first `tokens` and room for `more` that nobody has taken."""
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
        """Puts [B, heads, t, width] at tokens at, at + 1, ...; returns all keys and values up to there."""
        end = at + k.shape[2]
        self.keys[:, :, at:end], self.values[:, :, at:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]
