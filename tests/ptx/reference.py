"""What PTX's manual has of arithmetic, in Python's integers and fractions: a reference for the emulator.

Values are registers' bits, as integers.
"""

import math
from fractions import Fraction

from .reference_floats import FORMATS, NAN, bits_of, compute, decode, encode, flush, saturate, signed, value


def _pairs(one, args):
    """Returns what a function of 16 bits makes of both halves."""
    return [one([x >> shift & 0xFFFF for x in args]) for shift in (0, 16)]


def _integer(name, modifiers, args, kind):
    size = bits_of(kind)
    x = [signed(bits, kind) for bits in args]
    if name in ("mul", "mad"):
        product = x[0] * x[1]
        if modifiers[0] == "wide":
            total = product + (signed(args[2], f"{kind[0]}{2 * size}") if name == "mad" else 0)
            return total & (1 << 2 * size) - 1
        part = product >> size if modifiers[0] == "hi" else product
        return part + (x[2] if name == "mad" else 0) & (1 << size) - 1
    if name in ("div", "rem"):
        if x[1] == 0:
            return (1 << size) - 1 if name == "div" else args[0]
        quotient = abs(x[0]) // abs(x[1]) * (1 if (x[0] < 0) == (x[1] < 0) else -1)
        out = quotient if name == "div" else x[0] - quotient * x[1]
    else:
        out = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max,
            "neg": lambda a: -a, "abs": abs,
        }[name](*x)  # fmt: skip
    return out & (1 << size) - 1


def _bits(name, modifiers, args, kind):
    size = bits_of(kind)
    full = (1 << size) - 1
    if name == "not":
        return ~args[0] & full
    if name in ("and", "or", "xor"):
        return {"and": args[0] & args[1], "or": args[0] | args[1], "xor": args[0] ^ args[1]}[name]
    if name == "shl":
        return args[0] << args[1] & full if args[1] < size else 0
    if name == "shr":
        return signed(args[0], kind) >> min(args[1], size) & full
    if name == "shf":
        count = args[2] % 32 if modifiers[1] == "wrap" else min(args[2], 32)
        both = args[1] << 32 | args[0]
        return (both << count >> 32 if modifiers[0] == "l" else both >> count) & full
    if name == "prmt":
        source = list((args[1] << 32 | args[0]).to_bytes(8, "little"))
        out = []
        for i in range(4):
            selector = args[2] >> 4 * i & 15
            byte = source[selector & 7]
            out.append((255 if byte & 128 else 0) if selector & 8 else byte)
        return int.from_bytes(bytes(out), "little")
    if name == "lop3":
        return sum((args[3] >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i
                   for i in range(32) for a, b, c in [args[:3]])  # fmt: skip
    if name == "bfe":
        start, length = args[1] & 255, args[2] & 255
        sign = 0 if kind == "u32" or length == 0 else args[0] >> min(start + length - 1, 31) & 1
        return sum((args[0] >> start + i & 1 if i < length and start + i <= 31 else sign) << i for i in range(32))
    if name == "bfi":
        start, length = args[2] & 255, args[3] & 255
        out = args[1]
        for i in range(length):
            if start + i <= 31:
                out = out & ~(1 << start + i) | (args[0] >> i & 1) << start + i
        return out
    if name == "popc":
        return bin(args[0]).count("1")
    if name == "clz":
        return size - args[0].bit_length()
    return int(f"{args[0]:0{size}b}"[::-1], 2)  # brev


def _holds(name, a, b, real: bool):
    if real:
        a, b = value(a), value(b)
        unordered = a != a or b != b
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if unordered:
            return name.endswith("u")
        name = name[:2]
    return {
        "eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
        "lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b,
    }[name]  # fmt: skip


def _setp(modifiers, args, kind):
    real = kind in FORMATS
    a, b = (flush(x) if "ftz" in modifiers else x for x in args[:2])
    a, b = ((decode if real else signed)(x, kind) for x in (a, b))
    holds = _holds(modifiers[0], a, b, real)
    join = next((part for part in modifiers[1:] if part in ("and", "or", "xor")), None)
    if join:
        holds = {"and": holds and args[2], "or": holds or args[2], "xor": holds != args[2]}[join]
    return bool(holds)


def _cvt(modifiers, args):
    *how, to, source = modifiers
    if to in ("f16x2", "bf16x2"):
        return [_convert(how, to[:-2], source, x) for x in reversed(args)]
    return _convert(how, to, source, args[0])


def _convert(how, to, source, bits):
    mode = "rz" if "rz" in how else "rna" if "rna" in how else "rn"
    if source not in FORMATS:
        number = signed(bits, source)
        if to not in FORMATS:
            return number & (1 << bits_of(to)) - 1
        return encode(-1 if number < 0 else 1, Fraction(abs(number)), to, mode)
    if "ftz" in how and source == "f32":
        bits = flush(bits)
    sign, size = decode(bits, source)
    integral = next((part for part in how if part in ("rni", "rzi", "rmi", "rpi")), None)
    if integral and size == size and size != math.inf:
        number = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[integral](sign * size)
        size = Fraction(abs(number))
    if to not in FORMATS:
        unsigned = to[0] == "u"
        least, most = (0 if unsigned else -(1 << bits_of(to) - 1)), (1 << bits_of(to) - (0 if unsigned else 1)) - 1
        number = (
            0 if size != size else most if size == math.inf and sign > 0 else least if size == math.inf else sign * size
        )
        return int(max(least, min(most, number))) & (1 << bits_of(to)) - 1
    if "sat" in how:
        sign, size = saturate((sign, size))
    out = encode(sign, size, to, mode, 10 if to == "tf32" else None)
    return flush(out) if "ftz" in how and to == "f32" and out != NAN else out


def operands(opcode: str) -> tuple[list[str], str]:
    """Returns the types of an arithmetic instruction's sources, and of its result.

    Raises:
        KeyError: The opcode is not one that this reference computes.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1]
    if name == "cvt":
        return [kind] * (2 if modifiers[-2] in ("f16x2", "bf16x2") else 1), modifiers[-2]
    if name == "setp":
        return [kind, kind] + ["pred"] * bool({"and", "or", "xor"} & set(modifiers)), "pred"
    if "wide" in modifiers:
        double = f"{kind[0]}{2 * bits_of(kind)}"
        return [kind, kind] + [double] * (name == "mad"), double
    special = {
        "selp": [kind, kind, "pred"], "shl": [kind, "u32"], "shr": [kind, "u32"], "shf": ["b32", "b32", "u32"],
        "bfe": [kind, "u32", "u32"], "bfi": ["b32", "b32", "u32", "u32"], "lop3": ["b32"] * 3 + ["u32"],
    }  # fmt: skip
    if name in special:
        return special[name], kind
    counts = {
        **dict.fromkeys(("add", "sub", "mul", "div", "rem", "min", "max", "copysign", "and", "or", "xor"), 2),
        **dict.fromkeys(("neg", "abs", "not", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), 1),
        **dict.fromkeys(("popc", "clz", "brev"), 1), "fma": 3, "mad": 3, "prmt": 3,
    }  # fmt: skip
    return [kind] * counts[name], "u32" if name in ("popc", "clz") else kind


def result(opcode: str, args: list[int]) -> int | str | list:
    """Returns the bits of an instruction's result, or NAN; of a pair in one register, both halves, the lower first."""
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1]
    if name == "cvt":
        return _cvt(modifiers, args)
    if name == "setp":
        return _setp(modifiers, args, kind)
    if name == "selp":
        return args[0] if args[2] else args[1]
    if kind in ("f16x2", "bf16x2"):
        return _pairs(lambda halves: compute(name, modifiers, halves, kind[:-2]), args)
    if kind in FORMATS:
        return compute(name, modifiers, args, kind)
    if kind[0] == "b" or kind == "pred" or name in ("shr", "bfe"):
        return _bits(name, modifiers, args, kind)
    return _integer(name, modifiers, args, kind)
