"""Tensor cores: which lane holds what of a matrix, where it lies in shared memory, and how products are summed."""

import numpy as np

from . import floats

WIDTHS = {"bf16": 2, "f16": 2, "tf32": 4}  # bytes of an element
_LANES = np.arange(32)
_ROW, _COLUMN = _LANES >> 2, _LANES & 3
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # by mode: bytes of a row, bits of its number that count


def conflicts(addresses: np.ndarray, size: int, threads: np.ndarray) -> int:
    """Returns the extra passes through the banks of shared memory, summed over warps, by phases of 128 bytes."""
    count = max(1, size // 4)
    words = (addresses.astype(np.int64) >> 2)[:, None] + np.arange(count)
    phases = (threads.astype(np.int64) >> 5) * 64 + (threads & 31) // max(1, 32 // count)
    total = 0
    for phase in np.unique(phases):
        total += int(np.bincount(np.unique(words[phases == phase]) & 31).max()) - 1
    return total


def a_places(depth: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and columns of A [16, depth] that lanes hold, [32, registers, elements of a register].

    Args:
        depth: Columns of A.
        width: Bytes of an element.
    """
    per = 4 // width
    register, element = np.arange(depth * width // 8)[None, :, None], np.arange(per)[None, None, :]
    rows = _ROW[:, None, None] + 8 * (register & 1) + 0 * element
    return rows, _COLUMN[:, None, None] * per + element + 4 * per * (register >> 1)


def b_places(depth: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and columns of B [depth, 8] that lanes hold, as of A."""
    per = 4 // width
    register, element = np.arange(depth * width // 16)[None, :, None], np.arange(per)[None, None, :]
    rows = _COLUMN[:, None, None] * per + element + 4 * per * register
    return rows, _ROW[:, None, None] + 0 * rows


def c_places(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and columns of an accumulator [16, columns] that lanes hold, [32, columns / 2]."""
    register = np.arange(columns // 2)[None, :]
    rows = _ROW[:, None] + 8 * (register >> 1 & 1)
    return rows, _COLUMN[:, None] * 2 + (register & 1) + 8 * (register >> 2)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns the float64 values of elements: uint16 of bf16 and f16, uint32 of tf32."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "bf16":
        return floats.from_bf16(bits).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def matrix(registers: np.ndarray, places, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Returns the matrices [warps, *shape] in float64 that registers [warps, 32, registers] hold."""
    elements = registers[..., None] if kind == "tf32" else registers.view(np.uint16).reshape(*registers.shape, 2)
    out = np.empty((len(registers), *shape))
    out[:, places[0], places[1]] = decode(elements, kind)
    return out


def accumulate(left: np.ndarray, right: np.ndarray, added: np.ndarray, truncates: bool) -> np.ndarray:
    """Returns left [.., 16, depth] @ right [.., depth, n] + added in float32.

    As tensor cores do, the products of a chunk of 16 are added to the accumulator as if exactly (in float64 here), and
    the sum is cut to float32, toward zero; without `truncates` all is summed and rounded to nearest.
    """
    if not truncates:
        return (left @ right + added).astype(np.float32)
    out = added.astype(np.float32)
    for i in range(0, left.shape[-1], 16):
        exact = left[..., i : i + 16] @ right[..., i : i + 16, :] + out.astype(np.float64)
        out = floats.narrow(exact, np.dtype(np.float32), toward_zero=True)
    return out


def descriptor(bits: int, rows: int, depth: int, transposed: bool, width: int) -> np.ndarray:
    """Returns where in shared memory the elements of an operand of wgmma lie, [rows, depth].

    Args:
        bits: The matrix descriptor.
        rows: Rows of A, or columns of B.
        depth: Columns of A, or rows of B.
        transposed: Whether neighbours along the depth do not lie side by side.
        width: Bytes of an element.
    """
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = bits >> 62 & 3
    span, swizzled = _SWIZZLES[mode]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if not transposed:
        per = span // width
        at = (
            row // 8 * stride
            + row % 8 * span
            + (column // per * leading + column % per * width if mode == 0 else column * width)
        )
    else:
        per = span // 2
        outer = (
            (row // per * stride + column // 8 * leading)
            if mode == 0
            else (row // per * leading + column // 8 * stride)
        )
        at = outer + column % 8 * span + row % per * 2
    at = at + start
    return at ^ ((at >> 7 & swizzled) << 4)
