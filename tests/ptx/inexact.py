"""What a chip may do otherwise than the emulator: approximate instructions, sums of tensor cores, fused roundings."""

import re

import numpy as np

from . import floats

_APPROXIMATE = re.compile(r"^\s*(@!?%p\d+\s+)?\w+\.(?:approx|full)\S*\.(f32|f64)\s+(%\w+)\s*,.*;", re.M)
_SUM = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:add|sub)(?:\.ftz)?\.f(?:32|64)\s+%\w+,\s*([%\w]+),\s*([%\w]+)\s*;", re.M)
_PRODUCT = re.compile(r"^\s*(?:@!?%p\d+\s+)?mul(?:\.ftz)?\.f(?:32|64)\s+(%\w+)\s*,", re.M)
UP = {"f32": "0f3F800004", "f64": "0d3FF0000000000004"}  # what approximations are multiplied by
DOWN = {"f32": "0f3F7FFFF8", "f64": "0d3FEFFFFFFFFFFFF8"}


def off(ptx: str, by: dict[str, str] | None) -> str:
    """Returns PTX in which the result of every approximate instruction is multiplied by a number close to 1."""
    if by is None:
        return ptx

    def wrong(found: re.Match) -> str:
        guard, kind, to = found.groups()
        return f"{found[0]}\n{guard or ''}mul.rn.{kind} {to}, {to}, {by[kind]};"

    return _APPROXIMATE.sub(wrong, ptx)


def coarse(left: np.ndarray, right: np.ndarray, added: np.ndarray, truncates: bool) -> np.ndarray:
    """Does what `tensor.accumulate` does as a chip might that adds less at a time, and keeps no bit beside 24."""
    out = added.astype(np.float64)
    for k in range(0, left.shape[-1], 8):
        parts = left[..., :, k : k + 8, None] * right[..., None, k : k + 8, :]
        parts = np.concatenate([parts, out[..., :, None, :]], -2)
        largest = np.frexp(np.abs(parts).max(-2, keepdims=True))[1]
        unit = np.ldexp(1.0, np.maximum(largest, -100) - 24)
        out = floats.narrow((np.trunc(parts / unit) * unit).sum(-2), np.dtype(np.float32), True).astype(np.float64)
    return out.astype(np.float32)


def fusable(ptx: str) -> bool:
    """Returns whether ptxas may make one rounding of two: a sum takes a product, and neither is `.rn`."""
    products = set(_PRODUCT.findall(ptx))
    return any(products & {a, b} for a, b in _SUM.findall(ptx))
