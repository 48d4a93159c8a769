"""Jitted helpers that whole-solve kernels share: activations, rounding, row sums, dots with W, the rules of a row.

INTERP stands wherever Triton's interpreter computes something else than a GPU: it has no inline assembly, truncates in
`.to(bfloat16)` and multiplies the raw bits of bf16 in `tl.dot`. There a bf16 value is held in fp32.
"""

import triton
import triton.language as tl

from . import rules
from .dispatch import interpreting


def constant(value):
    """Returns a module-level number for kernels to read.

    The interpreter gets the plain number: from Triton 3.8 on, it makes no tensor of `constexpr * tensor`.
    """
    return value if interpreting() else tl.constexpr(value)


WINDOW, PROGRESS, SHARE = map(constant, (rules.WINDOW, rules.PROGRESS, rules.SHARE))
FLOOR, FLOOR_FP64 = map(constant, (rules.FLOOR, rules.FLOOR_FP64))
GROWTH, STEADY, INF = map(constant, (rules.GROWTH, rules.STEADY, float("inf")))
CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE = map(constant, range(5))  # as rules.py numbers the outcomes


@triton.jit
def bf16_pair(x, INTERP: tl.constexpr):
    """Returns x rounded to nearest even, as bf16 (fp32 in the interpreter) and as fp32."""
    if INTERP:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        near = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        return near, near
    else:
        # the packed conversion: a plain cast that is cast back is one scalar instruction per element
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=r,=r,=r,f,f",
            [x],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )


@triton.jit
def tanh(x, INTERP: tl.constexpr):
    """Returns tanh x to a relative 1e-6: 1 - 2 / (e^2x + 1) loses small x, where a polynomial takes over."""
    if INTERP:
        q = 1.0 / (tl.exp2(tl.where(x > 43.0, 126.0, x * 2.8853900817779268)) + 1.0)
    else:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 2.8853900817779268], dtype=tl.float32, is_pure=True, pack=1
        )
        q = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e + 1.0], dtype=tl.float32, is_pure=True, pack=1
        )
    x2 = x * x
    return tl.where(x2 < 0.01, x * (1.0 + x2 * (x2 * 0.13333333 - 0.33333334)), 1.0 - 2.0 * q)


@triton.jit
def sine(x, COSINE: tl.constexpr):
    """Returns sin x or cos x to 1e-6 for |x| <= 1e4: n * pi is exact in parts to 3e4. libdevice's slow path spills."""
    if COSINE:
        whole = tl.floor(x * 0.3183098861837907)
        n = whole + 0.5
    else:
        whole = tl.floor(x * 0.3183098861837907 + 0.5)
        n = whole
    y = x - n * 3.140625 - n * 0.0009670257568359375 - n * 6.2771141529083251953e-7 - n * 1.2154201256553420e-10
    y2 = y * y
    p = y2 * (y2 * 2.6083159809786593e-6 - 1.981069071916863e-4) + 8.333078585565090e-3
    p = y + y * (y2 * (y2 * p - 0.16666659712791443))
    odd = whole - 2.0 * tl.floor(whole * 0.5)
    sign = 1.0 - 2.0 * odd
    if COSINE:
        sign = -sign
    return p * sign


@triton.jit
def fast_tanh(x, INTERP: tl.constexpr):
    """Returns the hardware's tanh, one instruction, to a relative 2^-11 (PTX ISA); exact in the interpreter."""
    if INTERP:
        return tanh(x, INTERP)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_sigmoid(x, INTERP: tl.constexpr):
    """Returns the sigmoid by the hardware's tanh: off by up to 2^-12."""
    return 0.5 + 0.5 * fast_tanh(0.5 * x, INTERP)


@triton.jit
def act(x, ACT: tl.constexpr, INTERP: tl.constexpr):
    """Returns the activation of that name. NaN stays NaN."""
    if ACT == "tanh":
        return tanh(x, INTERP)
    elif ACT == "fast_tanh":
        return fast_tanh(x, INTERP)
    elif ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "fast_gelu":  # Hendrycks and Gimpel 2016: off by 5e-4 at most
        return x * (0.5 + 0.5 * fast_tanh(x * (0.7978845608 + 0.035677408137 * x * x), INTERP))
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "fast_silu":
        return x * fast_sigmoid(x, INTERP)
    elif ACT == "sin":
        return sine(x, False)
    elif ACT == "abs":
        return tl.abs(x)
    elif ACT == "reflected_tanh":
        return 2.0 * tanh(x, INTERP) - x
    else:
        return x


@triton.jit
def act_slope(x, ACT: tl.constexpr, INTERP: tl.constexpr):
    """Returns the derivative of `act`."""
    if ACT == "tanh" or ACT == "fast_tanh":
        t = tanh(x, INTERP)
        return (1.0 - t) * (1.0 + t)
    elif ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "gelu" or ACT == "fast_gelu":
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "silu" or ACT == "fast_silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "sin":
        return sine(x, True)
    elif ACT == "abs":
        return tl.where(x > 0.0, 1.0, -1.0)
    elif ACT == "reflected_tanh":
        t = tanh(x, INTERP)
        return 2.0 * (1.0 - t) * (1.0 + t) - 1.0
    else:
        return x * 0.0 + 1.0


@triton.jit
def product(a, b):
    """Returns a * b for a sum over lanes, whose bits have to be the same in each.

    A plain product would be fused into the sum's first addition where a lane has no other: a b + c, of which c, the
    neighbour's, is rounded and a b is not. Lanes that hold different bits of one sum part in a branch that asks for it.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def add2(a0, a1, b0, b1):
    """Adds pairs, for tl.reduce."""
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _add10(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9


@triton.jit
def row_sums(tiles, N: tl.constexpr, INTERP: tl.constexpr):
    """Returns sums over columns of N tiles, N even and at most 10, in one reduction: one round of barriers for all."""
    if INTERP:
        sums = ()
        for i in tl.static_range(N):
            sums = sums + (tl.sum(tiles[i], 1),)
        return sums
    elif N == 2:
        return tl.reduce(tiles, 1, add2)
    elif N == 4:
        return tl.reduce(tiles, 1, _add4)
    elif N == 6:
        return tl.reduce(tiles, 1, _add6)
    elif N == 8:
        return tl.reduce(tiles, 1, _add8)
    else:
        return tl.reduce(tiles, 1, _add10)


@triton.jit
def rules_start(tol, scale, BLOCK_B: tl.constexpr):
    """Returns (best, bar, base, first, peak, mark, low) of rows before their first evaluation: see rules.py."""
    unknown = tl.full((BLOCK_B,), INF, tl.float32)
    zero = tl.zeros((BLOCK_B,), tl.float32)
    return unknown, zero + tol, zero + scale, zero, zero, unknown, unknown


@triton.jit
def rules_size(state, s, relative):
    """Returns what a defect is relative to where the norm of the image is s."""
    return tl.maximum(relative * s, state[2])


@triton.jit
def _residual(state, r, s, relative):
    return s * 0.0 + r / rules_size(state, s, relative)  # NaN where s is not finite


@triton.jit
def rules_update(state, k, r, s, relative, live, counts):
    """Takes the norms of evaluation k where `live`; returns (rel, improved, state).

    Where `counts`, which is within `live`, is false the evaluation is not exact enough to become the best.
    """
    begins = live & (k == 1)
    share = relative * (SHARE * s)
    rel = _residual(state, r, s, relative)
    best, bar, base, first, peak, mark, low = state
    base = tl.where(begins & (share > base) & (share < INF), share, base)
    improved = (rel < best) & counts
    best = tl.where(improved, rel, best)
    first = tl.where(begins, s, first)
    peak = tl.where(begins, r, peak)
    ends = live & (k % WINDOW == 0)
    tests = ends & ((k // WINDOW & (k // WINDOW - 1)) == 0)
    floor = FLOOR_FP64 if best.dtype == tl.float64 else FLOOR
    # never at the first test, where mark and low are infinite
    stalled = tests & (best > PROGRESS * mark) & (best <= floor) & (s >= PROGRESS * low)
    bar = tl.where(stalled | (ends & ~(rel < INF)), INF, bar)
    peak = tl.where(ends & (r > peak), r, peak)
    mark = tl.where(tests, best, mark)
    low = tl.where(tests & (s < low), s, low)
    return rel, improved, (best, bar, base, first, peak, mark, low)


@triton.jit
def rules_status(state, r, s, relative, tol):
    """Returns the outcome of each row, from its last norms."""
    best, bar, base, first, peak, mark, low = state
    outcome = tl.where(best <= tol, CONVERGED, tl.where(bar == INF, PLATEAU, MAX_STEPS))
    outcome = tl.where((s > GROWTH * first) & (r > STEADY * peak), GROWING, outcome)
    return tl.where(_residual(state, r, s, relative) < INF, outcome, NONFINITE)
