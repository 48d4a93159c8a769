"""Every arithmetic instruction against fractions and integers of Python's."""

import random
from itertools import product

import numpy as np
import pytest

from . import reference
from .forms import ARITHMETIC, CONVERSIONS, expand
from .harness import compute
from .reference_floats import FORMATS, NAN, bits_of, is_nan

# What is computed to a double's precision and then rounded may be the neighbour of the true value.
APPROXIMATE = {"rsqrt", "ex2", "lg2", "sin", "cos", "tanh"}


def float_bits(kind: str) -> list[int]:
    """Returns zeros, denormals, ties, limits, infinities, NaNs and plain numbers of a floating-point type."""
    exponents, mantissas = FORMATS[kind]
    one, infinity = ((1 << exponents - 1) - 1) << mantissas, ((1 << exponents) - 1) << mantissas
    least = 1 << mantissas
    some = [0, 1, 3, least - 1, least, least + 1, one, one + 1, one - 1, one + least, one + (1 << mantissas - 1)]
    some += [one + 3 * least + 5, one - 2 * least + 1, infinity - 1, infinity, infinity + (1 << mantissas - 1) + 1]
    some += [one + 7 * least + 1, one - 8 * least, one // 2 + 3, infinity - 3 * least]
    if kind == "f32":  # ties of narrower types, the limits of integers, halves
        some += [0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x3F800FFF, 0x3FC00000, 0x40200000, 0x33000000]
        some += [
            0x477FF000,
            0x477FEFFF,
            0x7F7F8000,
            0x4EFFFFFF,
            0x4F000000,
            0x4F7FFFFF,
            0x5F000000,
            0x437F8000,
            0x33800001,
        ]
    if kind == "f64":
        some += [0x3FF0000010000000, 0x3FF0000030000000, 0x3FF0000010000001, 0x36A0000000000000, 0x380FFFFFFFFFFFFF]
        some += [0x41DFFFFFFFC00000, 0x41E0000000000000, 0x43E0000000000000, 0x43EFFFFFFFFFFFFF, 0x47EFFFFFF0000000]
        some += [0x40EFFDFFFFFFFFFF, 0x40EFFE0000000000, 0x3E90000000000001]
    top = 1 << exponents + mantissas
    return some + [x | top for x in some]


def integer_bits(size: int) -> list[int]:
    top = 1 << size - 1
    some = [
        0,
        1,
        2,
        3,
        7,
        31,
        32,
        33,
        100,
        top - 1,
        top,
        top + 1,
        2 * top - 1,
        2 * top - 2,
        2 * top - 7,
        top + top // 3,
    ]
    return sorted({x % (2 * top) for x in [*some, 0x12345678_9ABCDEF0 % (2 * top), size - 1, size, size + 1]})


def values(kind: str, rng: random.Random) -> list[int]:
    """Returns bits of a type that are worth trying."""
    if kind == "pred":
        return [0, 1]
    if kind in ("f16x2", "bf16x2"):
        halves = float_bits(kind[:-2])
        return [rng.choice(halves) << 16 | one for one in halves]
    size = bits_of(kind)
    known = float_bits(kind) if kind in FORMATS else integer_bits(size)
    return known + [rng.getrandbits(size) for _ in range(8)]


def inputs(opcode: str, kinds: list[str]) -> list[list[int]]:
    """Returns operands of many threads: all pairs of what is worth trying, or some of all triples."""
    rng = random.Random(opcode)
    if opcode.startswith(("bfe", "bfi", "shf", "sh")):  # counts below and beyond the width
        counts = [*range(0, 36, 3), 31, 32, 33, 63, 64, 65, 128, 255, 256, 2**31, 2**32 - 1]
        many = [counts if kind == "u32" and i else values(kind, rng) for i, kind in enumerate(kinds)]
    else:
        many = [values(kind, rng) for kind in kinds]
    pairs = list(product(*many)) if len(kinds) < 3 else []
    most = 120 if opcode.startswith("setp") else 500
    rows = (
        rng.sample(pairs, min(most, len(pairs))) if pairs else [[rng.choice(one) for one in many] for _ in range(most)]
    )
    if len(kinds) == 1:
        rows = [[one] for one in many[0]]
    rows += _cancelling(opcode, rng)
    return [list(column) for column in zip(*rows, strict=True)]


def _cancelling(opcode: str, rng: random.Random) -> list[list[int]]:
    """Returns operands of fma whose sum lies at, or just off, a tie of the result."""
    name, kind = opcode.split(".")[0], opcode.split(".")[-1]
    if name != "fma" or kind not in FORMATS:
        return []
    exponents, mantissas = FORMATS[kind]
    bias = (1 << exponents - 1) - 1
    negative = 1 << exponents + mantissas

    def power(exponent: int, mantissa: int = 0) -> int:
        return (max(0, bias + exponent) << mantissas) + mantissa

    rows = []
    for _ in range(150):
        x, y, z = (power(0, rng.getrandbits(mantissas)) for _ in range(3))
        rows += [[x, y, z ^ negative], [x, y, power(-rng.randrange(3 * mantissas), rng.getrandbits(mantissas))]]
        half, tiny = power(-mantissas - 1), power(-rng.randrange(mantissas, 3 * mantissas))  # half of one's last place
        rows += [[half, power(0), x], [half + 1, tiny, x], [power(0, 1), half, x], [tiny, tiny, half], [x, y, tiny]]
        # a product that is a tie, and an addend too small for a sum in twice the precision
        factor = power(0, 1 << mantissas // 2)
        rows += [
            [factor, factor + 1, 1],
            [factor, factor, 1],
            [factor, power(0, 1 << mantissas - mantissas // 2 - 1), tiny],
        ]
    return rows


def array(bits: list[int], kind: str) -> np.ndarray:
    return np.array(bits, bool if kind == "pred" else f"u{bits_of(kind) // 8}")


def check(opcode: str, args: list[list[int]], given: list | None = None) -> None:
    """Compares what the emulator computes with the reference; `given` replaces operands in the text."""
    kinds, to = reference.operands(opcode)
    arrays = [array(column, kind) for column, kind in zip(args, kinds, strict=True)]
    got = compute(opcode, kinds, to, [text if text is not None else x for text, x in zip(given, arrays, strict=True)]
                  if given else arrays)  # fmt: skip
    for row, bits in zip(zip(*args, strict=True), got.tolist(), strict=True):
        expected = reference.result(opcode, list(row))
        pairs = [(bits, expected, to)]
        if isinstance(expected, list):
            pairs = [(bits >> 16 * i & 0xFFFF, half, to[:-2]) for i, half in enumerate(expected)]
        for found, true, kind in pairs:
            right = is_nan(found, kind) if true == NAN else found == true
            if opcode.split(".")[0] in APPROXIMATE and true != NAN:
                right = abs(found - true) <= 1
            shown = [hex(x) for x in row], hex(found), true if true == NAN else hex(true)
            assert right, (opcode, *shown)


@pytest.mark.parametrize("form", [*ARITHMETIC, *CONVERSIONS])
def test_it_computes_what_the_manual_has(form):
    for opcode in expand(form):
        kinds, _ = reference.operands(opcode)
        if opcode == "lop3.b32":
            for table in (0, 0x01, 0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFF):
                args = inputs(opcode, kinds[:3])
                check(opcode, [*args, [table] * len(args[0])], [None, None, None, table])
        else:
            check(opcode, inputs(opcode, kinds))


@pytest.mark.parametrize(
    "opcode, text, bits",
    [
        ("add.f32", "0f3F800000", 0x3F800000), ("add.f64", "0d3FF0000000000000", 0x3FF0000000000000),
        ("add.s32", "-5", 2**32 - 5), ("add.s64", "-0x10", 2**64 - 16), ("and.b32", "0x7770U", 0x7770),
        ("add.f64", "1.5", 0x3FF8000000000000), ("and.b16", "255", 255), ("xor.b64", "-9223372036854775808", 1 << 63),
    ],
)  # fmt: skip
def test_numbers_in_the_text(opcode, text, bits):
    kinds, _ = reference.operands(opcode)
    first = values(kinds[0], random.Random(0))
    check(opcode, [first, [bits] * len(first)], [None, text])


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_a_comparison_joined_with_a_negation(join):
    rows = list(product([1, 2], [1, 2], [0, 1]))
    a, b, p = (array([row[i] for row in rows], kind) for i, kind in enumerate(("u32", "u32", "pred")))
    got = compute(f"setp.lt.{join}.u32", ["u32", "u32", "pred"], "pred", [a, b, p], negate=True)
    assert got.tolist() == [reference.result(f"setp.lt.{join}.u32", [x, y, 1 - z]) for x, y, z in rows]
