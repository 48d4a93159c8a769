"""Jitted helpers of the row-tile skeleton: loads of weights and rows, and tuples of tiles.

Sizes are tuples of constants: of a matrix (out, in, block of out, block of in, stride of out, stride of in), of a
vector (width, block), of a tensor of rows (width, block, stride from row to row).
"""

import triton
import triton.language as tl

from ..tl_common import bf16_pair, constant

APART = constant(1 << 20)  # is for fp8, and no fp8 is here; where it is not 0, Triton lets no dot begin with a sum


@triton.jit
def load_matrix(w_ptr, rows, cols, OUT: tl.constexpr, IN: tl.constexpr, TRANSPOSE: tl.constexpr, INTERP: tl.constexpr):
    """Loads tile [rows, cols] of W [OUT, IN], or of W', zero beyond them: what tl.dot multiplies by from the right."""
    if TRANSPOSE:
        offs = cols[None, :] * IN + rows[:, None]
        mask = (rows[:, None] < IN) & (cols[None, :] < OUT)
    else:
        offs = rows[:, None] * IN + cols[None, :]
        mask = (rows[:, None] < OUT) & (cols[None, :] < IN)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    return w.to(tl.float32) if INTERP else w


@triton.jit
def load_terms(
    w_ptr, SIZES: tl.constexpr, NTH: tl.constexpr, TERMS: tl.constexpr, TRANSPOSE: tl.constexpr, INTERP: tl.constexpr
):
    """Loads the first terms of matrix NTH, whole."""
    OUT: tl.constexpr = SIZES[NTH][0]
    IN: tl.constexpr = SIZES[NTH][1]
    rows = tl.arange(0, SIZES[NTH][3] if TRANSPOSE else SIZES[NTH][2])
    cols = tl.arange(0, SIZES[NTH][2] if TRANSPOSE else SIZES[NTH][3])
    w = ()
    for t in tl.static_range(TERMS):
        w = w + (load_matrix(w_ptr + t * OUT * IN, rows, cols, OUT, IN, TRANSPOSE, INTERP),)
    return w


@triton.jit
def split_terms(
    w_ptr, SIZES: tl.constexpr, NTH: tl.constexpr, TERMS: tl.constexpr, TRANSPOSE: tl.constexpr, INTERP: tl.constexpr
):
    """Loads matrix NTH, fp32 of any strides and whole, as its terms."""
    rows = tl.arange(0, SIZES[NTH][3] if TRANSPOSE else SIZES[NTH][2])
    cols = tl.arange(0, SIZES[NTH][2] if TRANSPOSE else SIZES[NTH][3])
    out, into = (cols[None, :], rows[:, None]) if TRANSPOSE else (rows[:, None], cols[None, :])
    offs = out * SIZES[NTH][4] + into * SIZES[NTH][5]
    rest = tl.load(w_ptr + offs, mask=(out < SIZES[NTH][0]) & (into < SIZES[NTH][1]), other=0.0)
    w = ()
    for _ in tl.static_range(TERMS):
        part, near = bf16_pair(rest, INTERP)
        w = w + (part,)
        rest -= near
    return w


@triton.jit
def load_vector(v_ptr, SIZES: tl.constexpr, NTH: tl.constexpr):
    """Loads vector NTH, zero beyond its width."""
    offs = tl.arange(0, SIZES[NTH][1])
    return tl.load(v_ptr + offs, mask=offs < SIZES[NTH][0], other=0.0)


@triton.jit
def load_rows(x_ptr, rows, mask, SIZES: tl.constexpr, NTH: tl.constexpr):
    """Loads a tile of these rows of tensor NTH, zero beyond their width and where the mask is False."""
    offs = tl.arange(0, SIZES[NTH][1])[None, :]
    at = rows.to(tl.int64)[:, None] * SIZES[NTH][2] + offs
    return tl.load(x_ptr + at, mask=mask[:, None] & (offs < SIZES[NTH][0]), other=0.0)


@triton.jit
def load_inputs(x_ptrs, rows, mask, SIZES: tl.constexpr):
    """Loads a tile of these rows of every tensor."""
    tiles = ()
    for i in tl.static_range(len(SIZES)):
        tiles = tiles + (load_rows(x_ptrs[i], rows, mask, SIZES, i),)
    return tiles


@triton.jit
def choose(mask, a, b):
    """Returns tiles and vectors with the rows of `a` where the mask is True, else those of `b`."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(mask[:, None] if len(a[i].shape) == 2 else mask, a[i], b[i]),)
    return out


@triton.jit
def copies(x, N: tl.constexpr):
    """Returns a tuple of N times x."""
    out = ()
    for _ in tl.static_range(N):
        out = out + (x,)
    return out


@triton.jit
def dot(acc, d, w):
    """Returns acc + d W, for all terms of W in shared memory, of which the first is the largest.

    Tensor cores cut their sum to float32, toward zero, after every 16 columns. What is cut of `acc` would add up over a
    whole solve; of a product alone it is as small as the increment.
    """
    new = tl.dot(d, w[len(w) - 1], max_num_imprecise_acc=APART)
    for t in tl.static_range(1, len(w)):
        new = tl.dot(d, w[len(w) - 1 - t], new)
    return acc + new


@triton.jit
def feed(acc, x, pushed, go, w, INTERP: tl.constexpr):
    """Returns acc + (x - pushed) W in bf16 for rows that go on, and what has been pushed by then.

    So `acc` follows x W, and what rounding takes from one increment comes back in the next.
    """
    d, near = bf16_pair(tl.where(go[:, None], x - pushed, 0.0), INTERP)
    return dot(acc, d, w), pushed + near


@triton.jit
def push(
    carry,
    d,
    d_ptr,  # scratch of this program, [BLOCK_B, block of D]: a tile in registers can't be sliced
    w_ptr,  # [TERMS, D, D]
    SIZES: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Returns `carry` with d W on its first tile, for all terms of the lone W but the first, read from memory."""
    new = tl.zeros_like(carry[0])
    D: tl.constexpr = SIZES[0][0]
    BLOCK_D: tl.constexpr = SIZES[0][2]
    offs_b = tl.arange(0, BLOCK_B)[:, None] * BLOCK_D
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    tl.debug_barrier()
    tl.store(d_ptr + offs_b + offs_d[None, :], d)
    tl.debug_barrier()
    for t in tl.static_range(1, TERMS):
        for k in range(0, BLOCK_D, BLOCK_K):
            part = tl.load(d_ptr + offs_b + k + offs_k[None, :])
            w = load_matrix(w_ptr + (TERMS - t) * D * D, k + offs_k, offs_d, D, D, TRANSPOSE, INTERP)
            new = tl.dot(part, w, new)
    return (carry[0] + new,) + carry[1:]
