"""Integer and bit instructions as functions of numpy arrays, one element a thread."""

import numpy as np

U1, U4, U8, I8 = (np.dtype(t) for t in ("u1", "u4", "u8", "i8"))


def wide(dtype: np.dtype) -> np.dtype:
    """Returns the integer dtype of twice the size."""
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def multiply_wide(a, b):
    """Returns products in twice the size."""
    to = wide(a.dtype)
    return a.astype(to) * b.astype(to)


def multiply_high(a, b):
    """Returns the upper halves of products."""
    if a.dtype.itemsize < 8:
        return (multiply_wide(a, b) >> a.dtype.itemsize * 8).astype(a.dtype)
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)


def divide(a, b):
    """Returns quotients, cut toward zero; all ones where b is zero."""
    quotient, _ = _divide(a, b)
    return np.where(b == 0, ~np.zeros_like(a), quotient)


def remainder(a, b):
    """Returns remainders, of the sign of a; a where b is zero."""
    quotient, divisor = _divide(a, b)
    return np.where(b == 0, a, a - quotient * divisor)


def _divide(a, b):
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    below = ((a < 0) != (divisor < 0)) & (quotient * divisor != a)  # numpy rounds down
    return quotient + below.astype(a.dtype), divisor


def shift_left(a, count):
    """Returns a shifted by a uint32 count; 0 where that is the width or more."""
    far = count >= 8 * a.dtype.itemsize
    return np.where(far, a.dtype.type(0), a << np.where(far, 0, count).astype(a.dtype))


def shift_right(a, count):
    """Returns a shifted by a uint32 count, where the sign, or 0 of an unsigned a, comes in from the left."""
    most = 8 * a.dtype.itemsize - 1
    near = a >> np.minimum(count, most).astype(a.dtype)
    return near if a.dtype.kind == "i" else np.where(count > most, a.dtype.type(0), near)


def funnel(left: bool, wrap: bool):
    """Returns shf: the upper word of two words shifted left, or the lower one shifted right."""

    def shift(low, high, count):
        count = (count & 31 if wrap else np.minimum(count, 32)).astype(U8)
        both = high.astype(U8) << U8.type(32) | low.astype(U8)
        return ((both << count) >> U8.type(32) if left else both >> count).astype(U4)

    return shift


def permute(a, b, selectors):
    """Returns prmt: four of the eight bytes of a and b; a selector's upper bit spreads the sign of its byte."""
    source = np.stack([a, b], 1).view(U1)
    out = np.zeros_like(a)
    for i in range(4):
        selector = selectors >> U4.type(4 * i) & U4.type(15)
        byte = np.take_along_axis(source, (selector & 7).astype(np.int64)[:, None], 1)[:, 0]
        byte = np.where(selector & 8, np.where(byte & 128, U1.type(255), U1.type(0)), byte)
        out |= byte.astype(U4) << U4.type(8 * i)
    return out


def extract(a, start, length):
    """Returns bfe: `length` bits of a (32 bits) from `start` on, the sign spread in front of them if a is signed."""
    start, length = (np.minimum(x & 255, 64 - 1).astype(I8) for x in (start, length))
    length = np.minimum(length, 32)
    field = a.astype(I8) >> start & (I8.type(1) << length) - 1
    if a.dtype.kind == "i":
        sign = a.astype(I8) >> np.minimum(start + length - 1, 31).clip(0) & 1
        field = np.where(length > 0, field - (sign << length), 0)
    return field.astype(U4)


def insert(a, b, start, length):
    """Returns bfi: b, in which the lowest `length` bits of a replace those from `start` on."""
    start, length = ((x & 255).astype(I8) for x in (start, length))
    inside = np.minimum(start, 32)
    mask = ((I8.type(1) << np.minimum(length, 32)) - 1) << inside
    return np.where(start < 32, (b & ~mask) | (a.astype(I8) << inside & mask), b).astype(U4)


def logic3(a, b, c, table):
    """Returns lop3: of each triple of bits, the bit of the table that it numbers; the table is the same for all."""
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def count_ones(a):
    """Returns how many bits are set, as uint32."""
    return np.unpackbits(np.ascontiguousarray(a).view(U1).reshape(len(a), -1), axis=1).sum(1).astype(U4)


def leading_zeros(a):
    """Returns how many zeros stand before the first bit that is set, as uint32."""
    return np.array([8 * a.dtype.itemsize - int(x).bit_length() for x in a], U4)


def reverse(a):
    """Returns the bits in reverse order."""
    size = 8 * a.dtype.itemsize
    return np.array([int(f"{int(x):0{size}b}"[::-1], 2) for x in a], a.dtype)
