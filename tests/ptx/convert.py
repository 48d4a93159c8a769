"""What cvt computes."""

import numpy as np

from .floats import F4, F8, U2, U4, flush, from_bf16, narrow, to_bf16, to_tf32
from .parse import TYPES

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(modifiers: list[str]):
    """Returns (the function of registers' bits, the types of its arguments) of a cvt with these modifiers."""
    *how, to, source = modifiers
    if to in ("f16x2", "bf16x2"):
        one = _one(how, to[:-2], source)
        return lambda upper, lower: one(upper).view(U2).astype(U4) << U4.type(16) | one(lower).view(U2), [source] * 2
    return _one(how, to, source), [source]


def _one(how: list[str], to: str, source: str):
    """Returns the conversion of one number."""
    ftz, toward_zero = "ftz" in how, "rz" in how
    integral = next((_TO_INTEGRAL[part] for part in how if part in _TO_INTEGRAL), None)

    def load(bits):
        if source == "bf16":
            return from_bf16(bits)
        x = view(bits, TYPES[source])
        return flush(x) if ftz and source == "f32" else x

    def convert(bits):
        x = load(bits)
        if integral is not None:
            x = integral(x)
        if to == "bf16":
            return to_bf16(x, toward_zero)
        if to == "tf32":
            return to_tf32(x)
        dtype = TYPES[to]
        if x.dtype.kind == "f" and dtype.kind != "f":
            return _saturated(x.astype(F8), dtype)
        if x.dtype.kind == "f" and dtype.itemsize < x.dtype.itemsize:
            x = narrow(x, dtype, toward_zero)
        x = x.astype(dtype)
        if "sat" in how:
            x = saturate(x)
        return flush(x) if ftz and dtype == F4 else x

    return convert


def saturate(x: np.ndarray) -> np.ndarray:
    """Returns floats cut to [0, 1], with 0 for NaN and -0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _saturated(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns integral float64 as integers, the nearest where they do not fit, 0 for NaN."""
    limits = np.iinfo(dtype)
    inside = (x > float(limits.min)) & (x < float(limits.max))
    out = np.where(inside, x, 0.0).astype(dtype)
    out[x >= float(limits.max)] = limits.max  # of 64 bits, the limit as a float is the first that does not fit
    out[x <= float(limits.min)] = limits.min
    return out


def view(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a register's bits as a dtype that may be narrower: the lower bits, then."""
    if bits.dtype.itemsize != dtype.itemsize:
        bits = bits.astype(f"u{dtype.itemsize}")
    return bits.view(dtype)
