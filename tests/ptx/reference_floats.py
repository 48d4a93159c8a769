"""Floating-point numbers as signs and fractions: what a reference for the emulator computes with.

Values are registers' bits, as integers.
"""

import math
from fractions import Fraction

NAN = "nan"  # any of the patterns of a NaN
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "tf32": (8, 23), "f32": (8, 23), "f64": (11, 52)}  # exponent, mantissa


def bits_of(kind: str) -> int:
    """Returns the size of a type."""
    return {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32}.get(kind) or int(kind[1:])


def decode(bits: int, kind: str) -> tuple[int, Fraction | float]:
    """Returns the sign, 1 or -1, and the magnitude: a fraction, inf or nan."""
    exponents, mantissas = FORMATS[kind]
    sign = -1 if bits >> exponents + mantissas & 1 else 1
    exponent, mantissa = bits >> mantissas & (1 << exponents) - 1, bits & (1 << mantissas) - 1
    if exponent == (1 << exponents) - 1:
        return sign, math.nan if mantissa else math.inf
    least = 2 - (1 << exponents - 1) - mantissas  # exponent of the smallest denormal
    if exponent:
        return sign, (mantissa + (1 << mantissas)) * Fraction(2) ** (least + exponent - 1)
    return sign, mantissa * Fraction(2) ** least


def encode(sign: int, size: Fraction | float, kind: str, mode: str = "rn", mantissas: int | None = None) -> int | str:
    """Returns the bits of a magnitude, rounded to nearest even (rn), toward zero (rz) or to nearest, away (rna).

    Of tf32, `mantissas` is 10 and the bits are those of float32.
    """
    exponents, width = FORMATS[kind]
    mantissas = mantissas or width
    top = 1 << exponents + width if sign < 0 else 0
    if size != size:
        return NAN
    infinity = ((1 << exponents) - 1) << width
    if size == math.inf:
        return top | infinity
    if size == 0:
        return top
    size = Fraction(size)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    bias = (1 << exponents - 1) - 1
    exponent = max(exponent, 1 - bias)
    scaled = size / Fraction(2) ** (exponent - mantissas)
    whole = math.floor(scaled)
    rest = scaled - whole
    half = Fraction(1, 2)
    if mode == "rn" and (rest > half or rest == half and whole % 2) or mode == "rna" and rest >= half:
        whole += 1
    bits = ((exponent + bias << mantissas) + whole - (1 << mantissas)) << width - mantissas
    if bits >= infinity:
        bits = infinity - 1 if mode == "rz" else infinity
    return top | bits


def signed(bits: int, kind: str) -> int:
    """Returns the number that bits stand for in an integer type."""
    size = bits_of(kind)
    bits &= (1 << size) - 1
    return bits - (1 << size) if kind[0] == "s" and bits >> size - 1 else bits


def flush(bits: int) -> int:
    """Returns bits of float32 with denormals cut to zero."""
    return bits & 1 << 31 if bits >> 23 & 255 == 0 else bits


def _add(a, b):
    """Returns the exact sum of (sign, magnitude)."""
    if math.nan in (a[1], b[1]) or a[1] != a[1] or b[1] != b[1]:
        return 1, math.nan
    if math.inf in (a[1], b[1]):
        if a[1] == b[1] and a[0] != b[0]:
            return 1, math.nan
        return a if a[1] == math.inf else b
    total = a[0] * a[1] + b[0] * b[1]
    if total == 0:  # of two zeros of one sign, that sign; else +0
        return (a[0] if a[1] == 0 and b[1] == 0 and a[0] == b[0] else 1), Fraction(0)
    return (1 if total > 0 else -1), abs(total)


def _multiply(a, b):
    if a[1] != a[1] or b[1] != b[1] or {a[1], b[1]} == {0, math.inf}:
        return 1, math.nan
    return a[0] * b[0], (math.inf if math.inf in (a[1], b[1]) else a[1] * b[1])


def _divide(a, b):
    if a[1] != a[1] or b[1] != b[1] or (a[1] == b[1] == 0) or (a[1] == b[1] == math.inf):
        return 1, math.nan
    sign = a[0] * b[0]
    if b[1] == math.inf or a[1] == 0:
        return sign, Fraction(0)
    return sign, (math.inf if b[1] == 0 or a[1] == math.inf else a[1] / b[1])


def _root(a):
    if a[1] != a[1] or (a[0] < 0 and a[1]):
        return 1, math.nan
    if a[1] in (0, math.inf):
        return a
    scale = 1 << 800  # the root of an integer, to far more bits than any type has; its rest keeps it off a tie
    root = Fraction(math.isqrt(math.floor(a[1] * scale * scale)), scale)
    return 1, (root if root * root == a[1] else root + Fraction(1, 2 * scale))


def _elementary(name, a):
    """Returns a function's value to the precision of a double."""
    x = a[0] * float(a[1]) if a[1] == a[1] else math.nan
    if x != x:
        return 1, math.nan
    if name in ("sin", "cos"):
        y = math.nan if math.isinf(x) else getattr(math, name)(x)
    elif name == "ex2":
        y = 0.0 if x < -2000 else math.inf if x > 2000 else 2.0**x
    elif name == "lg2":
        y = math.nan if x < 0 else -math.inf if x == 0 else math.inf if x == math.inf else math.log2(x)
    elif name == "rsqrt":
        y = math.nan if x < 0 else math.copysign(math.inf, x) if x == 0 else 1 / math.sqrt(x)
    else:
        y = math.tanh(x)
    if y != y:
        return 1, math.nan
    return int(math.copysign(1, y)), (math.inf if math.isinf(y) else Fraction(abs(y)))


def value(a):
    return a[0] * a[1]


def _least(a, b, largest: bool, nan: bool):
    if a[1] != a[1] or b[1] != b[1]:
        return (1, math.nan) if nan or (a[1] != a[1] and b[1] != b[1]) else (b if a[1] != a[1] else a)
    key = lambda one: (value(one), one[0])  # noqa: E731  -0 is less than +0
    return (max if largest else min)(a, b, key=key)


def compute(name, modifiers, args, kind):
    """Returns the bits of a floating-point instruction's result."""
    ftz = "ftz" in modifiers
    if name in ("neg", "abs") and not ftz:
        top = 1 << bits_of(kind) - 1
        return args[0] ^ top if name == "neg" else args[0] & ~top
    if ftz:
        args = [flush(x) for x in args]
    x = [decode(bits, kind) for bits in args]
    if name == "add":
        out = _add(*x)
    elif name == "sub":
        out = _add(x[0], (-x[1][0], x[1][1]))
    elif name == "mul":
        out = _multiply(*x)
    elif name == "fma":
        out = _add(_multiply(x[0], x[1]), x[2])
    elif name == "div":
        out = _divide(*x)
    elif name == "rcp":
        out = _divide((1, Fraction(1)), x[0])
    elif name == "sqrt":
        out = _root(x[0])
    elif name in ("min", "max"):
        out = _least(*x, name == "max", "NaN" in modifiers)
    elif name in ("neg", "abs"):
        out = (-x[0][0] if name == "neg" else 1), x[0][1]
    elif name == "copysign":
        out = x[0][0], x[1][1]
    else:
        out = _elementary(name, x[0])
    if "sat" in modifiers:
        out = saturate(out)
    bits = encode(*out, kind)
    return flush(bits) if ftz and bits != NAN else bits


def saturate(x):
    if x[1] != x[1] or x[0] < 0 or x[1] == 0:
        return 1, Fraction(0)
    return 1, min(x[1], Fraction(1))


def is_nan(bits: int, kind: str) -> bool:
    """Returns whether bits are a NaN."""
    size = decode(bits, kind)[1]
    return size != size
