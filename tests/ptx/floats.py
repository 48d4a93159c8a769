"""Floating-point arithmetic that numpy lacks: bfloat16, TF32, flushed denormals and correctly rounded fma."""

from fractions import Fraction

import numpy as np

F4, F8, U2, U4, U8 = (np.dtype(t) for t in ("f4", "f8", "u2", "u4", "u8"))
_TINY = np.float32(2.0**-126)
_LOW = U8.type((1 << 28) - 1)
_ONE = U8.type(1)


def flush(x: np.ndarray) -> np.ndarray:
    """Returns float32 with zeros of the same sign in place of denormals."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Returns the float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(U4) << U4.type(16)).view(F4)


def to_bf16(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Returns the bits (uint16) of float32 values in bfloat16, rounded to nearest even or toward zero."""
    bits = np.ascontiguousarray(x).view(U4)
    rounded = bits >> U4.type(16)
    if not toward_zero:
        # in 64 bits, where the largest NaN does not overflow
        rounded = (bits.astype(U8) + U8.type(0x7FFF) + rounded.astype(U8) % U8.type(2)) >> U8.type(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(U2)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Returns the bits (uint32) of float32 values in TF32, rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x).view(U4)
    return np.where(np.isfinite(x), (bits + U4.type(0x1000)) & U4.type(0xFFFFE000), bits)


def narrow(x: np.ndarray, dtype: np.dtype, toward_zero: bool = False) -> np.ndarray:
    """Returns floats in a narrower dtype, rounded to nearest even or toward zero."""
    near = x.astype(dtype)
    if not toward_zero:
        return near
    return np.where(np.abs(near.astype(x.dtype)) > np.abs(x), np.nextafter(near, dtype.type(0)), near)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a * b + c rounded once, in the arguments' dtype: float16, float32 or float64."""
    if a.dtype == F8:
        return _fma64(a, b, c)
    return fma_odd(a, b, c).astype(a.dtype)


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a * b + c of float32 or narrower in float64, such that rounding it to float32 or narrower is right.

    The product is exact. Rounding the sum twice goes wrong where float64's rounding makes a tie of it: there the sum is
    rounded to odd instead, which keeps it to the right side.
    """
    product, c = a.astype(F8) * b.astype(F8), c.astype(F8)
    total = product + c
    if not (total.view(U8) & _LOW == 0).any():  # no tie, of normal or denormal float32, has other low bits
        return total
    return _to_odd(total, _error(product, c, total))


def bf16_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a * b + c of bfloat16 values, given in float32, as bits of bfloat16, rounded once."""
    total = _to_odd(*_sum(a.astype(F8) * b.astype(F8), c.astype(F8)))
    cut = narrow(total, F4, toward_zero=True)
    bits = cut.view(U4) | (cut.astype(F8) != total) * (np.isfinite(total) & np.isfinite(cut))
    return to_bf16(bits.astype(U4).view(F4))


def _error(a, b, total):
    """Returns what the float64 sum of a and b lacks, exactly."""
    rest = total - a
    return (a - (total - rest)) + (b - rest)


def _sum(a, b):
    total = a + b
    return total, _error(a, b, total)


def _to_odd(total, error):
    """Returns sums in float64 rounded to odd: where they are inexact, the neighbour whose last bit is odd."""
    bits = total.view(U8)
    move = (error != 0) & np.isfinite(error) & (bits & _ONE == 0)
    away = (error > 0) == (total > 0)
    return np.where(move, np.where(away, bits + _ONE, bits - _ONE), bits).view(F8)


def _fma64(a, b, c):
    """As Boldo and Melquiond do: an exact product, exact sums, and one rounding to odd before the last to nearest."""
    high, low = _product(a, b)
    first, first_rest = _sum(c, low)
    second, second_rest = _sum(high, first)
    out = second + _to_odd(*_sum(first_rest, second_rest))
    plain = (a == 0) | (b == 0) | ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    out = np.where(plain, a * b + c, out)
    size = np.abs(high)
    safe = (size > 1e-250) & (size < 1e290) & (np.abs(a) < 1e290) & (np.abs(b) < 1e290) & (np.abs(c) < 1e290)
    for i in np.flatnonzero(~safe & ~plain):  # where the parts of the product overflow or vanish
        out[i] = _exact(a[i], b[i], c[i])
    return out


def _product(a, b):
    """Returns the float64 product and what it lacks, by Dekker."""
    high = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return high, a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2)


def _halves(x):
    scaled = x * F8.type((1 << 27) + 1)
    first = scaled - (scaled - x)
    return first, x - first


def _exact(a, b, c):
    """Returns a * b + c of finite numbers, of which a and b are not 0, rounded once."""
    total = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    try:
        return float(total)
    except OverflowError:
        return np.copysign(np.inf, float(total.numerator > 0) - 0.5)
