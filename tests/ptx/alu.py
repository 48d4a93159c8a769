"""What arithmetic instructions compute: functions of arrays of registers' bits, one element a thread."""

from itertools import repeat

import numpy as np

from . import floats, integers
from .convert import cvt, saturate, view
from .floats import F4, F8, U2, flush
from .parse import TYPES, Instruction

_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": floats.fma, "neg": np.negative,
    "abs": np.abs, "sqrt": np.sqrt, "rcp": np.reciprocal, "copysign": lambda sign, x: np.copysign(x, sign),
}  # fmt: skip
_APPROXIMATE = {  # these are computed in float64, and rounded once
    "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
_INTEGER = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum,
    "div": integers.divide, "rem": integers.remainder,
}  # fmt: skip
_BITS = {
    "prmt": integers.permute, "lop3": integers.logic3, "bfi": integers.insert, "popc": integers.count_ones,
    "clz": integers.leading_zeros, "brev": integers.reverse,
}  # fmt: skip


def build(instruction: Instruction):
    """Returns what an arithmetic instruction computes.

    Returns:
        A function of the sources' bits (unsigned arrays [threads], or bool) that returns the result, as bits or in a
        dtype of the same size; and the types of the sources, as PTX spells them.
    """
    name, *modifiers = instruction.parts
    kind = modifiers[-1]
    if name == "cvt":
        return cvt(modifiers)
    if name == "setp":
        return _setp(modifiers)
    if name == "selp":
        return lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"]
    if name in _BITWISE:
        return _BITWISE[name], [kind] * (1 if name == "not" else 2)  # numpy's work on bool as on bits
    if name in ("shl", "shr"):
        dtype = TYPES[kind]
        shift = integers.shift_left if name == "shl" else integers.shift_right
        return lambda a, count: shift(view(a, dtype), count), [kind, "u32"]
    if name == "shf":
        return integers.funnel(modifiers[0] == "l", modifiers[1] == "wrap"), ["b32", "b32", "u32"]
    if name == "bfe":
        return lambda a, start, length: integers.extract(view(a, TYPES[kind]), start, length), [kind, "u32", "u32"]
    if name in _BITS:
        return _BITS[name], [kind] * (len(instruction.args) - 1)
    if kind in ("bf16", "bf16x2", "f16", "f16x2"):
        return _half(name, kind, "NaN" in modifiers)
    dtype = TYPES[kind]
    if dtype.kind == "f":
        return _float(name, modifiers, dtype, kind)
    return _integer(name, modifiers, dtype, kind)


def _setp(modifiers):
    comparison, kind = modifiers[0], modifiers[-1]
    join = next((_JOINS[part] for part in modifiers[1:-1] if part in _JOINS), None)
    load = _loader(kind, "ftz" in modifiers)
    compare = _compare(comparison, kind in ("bf16", "f16", "f32", "f64"))
    if join:
        return lambda a, b, p: join(compare(load(a), load(b)), p), [kind, kind, "pred"]
    return lambda a, b: compare(load(a), load(b)), [kind, kind]


def _compare(name: str, real: bool):
    """Returns a comparison; without a u in front, it is false where one of two floats is NaN."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if real and name == "ne":
        return lambda a, b: (a != b) & (a == a) & (b == b)
    if name in _COMPARISONS:
        return _COMPARISONS[name]
    if name == "neu":
        return np.not_equal
    ordered = _COMPARISONS[name[:-1]]
    return lambda a, b: ordered(a, b) | (a != a) | (b != b)


def _loader(kind: str, ftz: bool = False):
    """Returns what makes numbers of a register's bits."""
    if kind == "bf16":
        return floats.from_bf16
    dtype = TYPES[kind]
    return (lambda bits: flush(view(bits, dtype))) if ftz else (lambda bits: view(bits, dtype))


def _extreme(least: bool, nan: bool):
    """Returns min or max of floats: +0 is more than -0, and a NaN counts only if both are, or with `nan`."""
    pick = (np.minimum if nan else np.fmin) if least else (np.maximum if nan else np.fmax)

    def choose(a, b):
        out = pick(a, b)
        if not (out == 0).any():
            return out
        zeros, negative = (
            (a == 0) & (b == 0),
            (np.logical_or if least else np.logical_and)(np.signbit(a), np.signbit(b)),
        )
        return np.where(zeros, np.where(negative, out.dtype.type(-0.0), out.dtype.type(0.0)), out)

    return choose


def _float(name, modifiers, dtype, kind):
    if name in ("min", "max"):
        compute, arity = _extreme(name == "min", "NaN" in modifiers), 2
    elif name in _APPROXIMATE:
        exact, arity = _APPROXIMATE[name], 1
        compute = lambda x: exact(x.astype(F8)).astype(dtype)  # noqa: E731
    else:
        compute, arity = _FLOAT[name], 3 if name == "fma" else 1 if name in ("neg", "abs", "sqrt", "rcp") else 2
    finish = [flush] * ("ftz" in modifiers) + [saturate] * ("sat" in modifiers)
    load = _loader(kind, "ftz" in modifiers)
    if not finish:
        return lambda *args: compute(*map(view, args, repeat(dtype))), [kind] * arity

    def run(*args):
        out = compute(*map(load, args))
        for step in finish:
            out = step(out)
        return out

    return run, [kind] * arity


def _half(name, kind, nan):
    """Returns arithmetic of 16-bit floats, one or two in a register; of bfloat16, in float32 and rounded."""
    compute = _extreme(name == "min", nan) if name in ("min", "max") else _FLOAT[name]
    if kind.startswith("f16"):

        def one(*args):
            return compute(*(x.view(np.float16) for x in args)).view(U2)
    elif name in ("neg", "abs"):

        def one(x):
            return x ^ U2.type(0x8000) if name == "neg" else x & U2.type(0x7FFF)
    elif name == "fma":

        def one(*args):
            return floats.bf16_fma(*map(floats.from_bf16, args))
    else:

        def one(*args):
            return floats.to_bf16(compute(*map(floats.from_bf16, args)).astype(F4))

    arity = 3 if name == "fma" else 1 if name in ("neg", "abs") else 2
    return lambda *args: one(*(np.ascontiguousarray(x).view(U2) for x in args)).view(args[0].dtype), [kind] * arity


def _integer(name, modifiers, dtype, kind):
    if name not in ("mul", "mad"):
        compute = _INTEGER[name]
        return lambda *args: compute(*map(view, args, repeat(dtype))), [kind] * (1 if name in ("neg", "abs") else 2)
    multiply = {"lo": np.multiply, "hi": integers.multiply_high, "wide": integers.multiply_wide}[modifiers[0]]
    if name == "mul":
        return lambda a, b: multiply(view(a, dtype), view(b, dtype)), [kind] * 2
    total = integers.wide(dtype) if modifiers[0] == "wide" else dtype
    added = f"{kind[0]}{8 * total.itemsize}"
    return lambda a, b, c: multiply(view(a, dtype), view(b, dtype)) + view(c, total), [kind, kind, added]
