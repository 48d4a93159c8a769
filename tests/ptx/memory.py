"""Memory: global memory is the tensors that a launch was given, and each program has its shared memory."""

import ctypes

import numpy as np

from .errors import Fault


class Space:
    """One range of memory.

    Attributes:
        base: Address of its first byte.
        size: Its bytes.
        name: How reports call it.
        granule: Bytes of the places by which accesses are watched, a power of two.
        views: Its memory as unsigned integers, by their width in bytes; view[0] lies at `start`.
        start: The last multiple of 16 up to `base`.
        shadow: Who accessed it (shadow.py), once that is watched.
        written: Of shared memory, which granules were written. None of global memory.
        copied: Of shared memory, which granules cp.async wrote last.
    """

    def __init__(self, base: int, size: int, name: str, granule: int, buffer: np.ndarray | None = None):
        self.base, self.size, self.name, self.granule = base, size, name, granule
        self.start = base & ~15
        if buffer is None:
            room = -(-(base + size - self.start) // 16) * 16
            buffer = np.ctypeslib.as_array((ctypes.c_uint8 * room).from_address(self.start))
        self.views = {width: buffer.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.shadow = self.written = self.copied = None

    def index(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Returns where in views[width] the `count` elements of each access lie, [accesses, count]."""
        return _steps(addresses, self.start, width, count)

    def granules(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Returns the granules of accesses of `size` bytes, [accesses, granules of one]."""
        return _steps(addresses, self.base, self.granule, max(1, size // self.granule))


def _steps(addresses: np.ndarray, start: int, width: int, count: int) -> np.ndarray:
    kind = addresses.dtype.type
    first = ((addresses - kind(start)) >> kind(width.bit_length() - 1)).astype(np.int64)[:, None]
    return first if count == 1 else first + np.arange(count)


def shared(size: int, granule: int) -> Space:
    """Returns the shared memory of a program, all ones, of which nothing was written."""
    size = max(16, size)
    space = Space(0, size, "shared", granule, np.full(-(-size // 16) * 16, 255, np.uint8))
    space.written, space.copied = (np.zeros(-(-size // granule) + 1, bool) for _ in range(2))
    return space


class Global:
    """The tensors that a launch was given. Those that overlap are one space.

    Args:
        tensors: Address, bytes, bytes of an element and name of each.
    """

    def __init__(self, tensors: list[tuple[int, int, int, str]]):
        merged: list[tuple[int, int, int, str]] = []
        for base, size, item, name in sorted(tensors):
            if size == 0:
                continue
            if merged and base < merged[-1][0] + merged[-1][1]:
                first, length, least, names = merged[-1]
                names = names if name in names.split("+") else f"{names}+{name}"
                merged[-1] = (first, max(length, base + size - first), min(least, item), names)
            else:
                merged.append((base, size, item, name))
        self.spaces = [Space(base, size, name, item) for base, size, item, name in merged]
        self.bases = np.array([space.base for space in self.spaces], np.uint64)
        self.ends = np.array([space.base + space.size for space in self.spaces], np.uint64)

    def parts(self, addresses: np.ndarray, size: int) -> list[tuple[Space, slice | np.ndarray]]:
        """Returns each space that is accessed, with the numbers of the accesses of `size` bytes that lie in it.

        Raises:
            Fault: An access lies in no tensor.
        """
        at = np.searchsorted(self.bases, addresses, side="right") - 1
        one = at[0] if len(at) else -1
        if one >= 0 and (at == one).all() and addresses.max() <= self.ends[one] - np.uint64(size):
            return [(self.spaces[one], slice(None))]
        bad = np.ones(len(at), bool)
        if self.spaces:
            bad = (at < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(at, 0)])
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            near = (
                self.spaces[max(int(at[i]), 0)] if self.spaces else Space(0, 0, "no tensor", 1, np.zeros(0, np.uint8))
            )
            raise Fault(
                f"out of bounds: {int(bad.sum())} of {len(addresses)} accesses of {size} bytes lie in no tensor; the "
                f"first at byte {int(addresses[i]) - near.base} of {near.name} [{near.size} bytes]"
            )
        return [(self.spaces[s], np.flatnonzero(at == s)) for s in np.unique(at)]
