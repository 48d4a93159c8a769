"""Anderson mixing for whole-solve kernels: one small system a row, in registers."""

import triton
import triton.language as tl

from . import rules
from .tl_common import constant

SAFEGUARD = constant(rules.SAFEGUARD)
GAMMA_MAX = constant(1e10)  # a mixing weight beyond it, or NaN, is no weight


@triton.jit
def cholesky_solve(a, b, N: tl.constexpr):
    """Returns x of A x = b for each row; `a` is the lower triangle of A, row by row, a tuple of vectors."""
    low = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1):
            s = a[i * (i + 1) // 2 + j]
            for p in tl.static_range(j):
                s = s - low[i * (i + 1) // 2 + p] * low[j * (j + 1) // 2 + p]
            if i == j:
                low = low + (1.0 / tl.sqrt(s),)  # the diagonal is stored inverted
            else:
                low = low + (s * low[j * (j + 1) // 2 + j],)
    y = ()
    for i in tl.static_range(N):
        s = b[i]
        for p in tl.static_range(i):
            s = s - low[i * (i + 1) // 2 + p] * y[p]
        y = y + (s * low[i * (i + 1) // 2 + i],)
    x = ()  # grows from the last unknown to the first
    for q in tl.static_range(N):
        s = y[N - 1 - q]
        for p in tl.static_range(q):
            s = s - low[(N - 1 - p) * (N - p) // 2 + N - 1 - q] * x[q - 1 - p]
        x = (s * low[(N - 1 - q) * (N - q) // 2 + N - 1 - q],) + x
    return x


@triton.jit
def anderson_weights(gram, dots, plain, ridge, N: tl.constexpr):
    """Returns the mixing weights of each row, argmin || g - sum_j gamma_j dG_j ||.

    The Gram matrix is scaled to a unit diagonal, to which `ridge` is added. `gram` has <dG_i, dG_j>, the lower triangle
    row by row, `dots` has <dG_j, g>, and `plain` marks rows that take a plain step.
    """
    scale = ()
    for i in tl.static_range(N):
        square = gram[i * (i + 1) // 2 + i]
        # an empty slot, or one that is zero by now, is masked
        scale = scale + (tl.where(square > 0.0, 1.0 / tl.sqrt(tl.where(square > 0.0, square, 1.0)), 0.0),)
    a = ()
    b = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            a = a + (gram[i * (i + 1) // 2 + j] * scale[i] * scale[j],)
        a = a + (tl.zeros_like(scale[0]) + 1.0 + ridge,)
        b = b + (dots[i] * scale[i],)
    x = cholesky_solve(a, b, N)
    ok = ~plain
    for i in tl.static_range(N):
        ok = ok & (tl.abs(x[i] * scale[i]) < GAMMA_MAX)
    gamma = ()
    for i in tl.static_range(N):
        gamma = gamma + (tl.where(ok, x[i] * scale[i], 0.0),)
    return gamma


@triton.jit
def anderson_step(g, dx, dg, gram, sums, rel, best, damping, ridge, N: tl.constexpr):
    """Returns damping g - sum_j gamma_j (dX_j + damping dG_j) of each row, and the history less its oldest pair.

    `g` is a tile of defects, `dx` and `dg` are N tiles each, oldest first: increments of z and of g. `gram` has
    <dG_i, dG_j> of all pairs but the newest, the lower triangle, and `sums` has <dG_j, g> from 2 on and
    <dG_j, dG_newest> from 2 + N on.
    """
    dots = ()
    for j in tl.static_range(N):
        gram = gram + (sums[2 + N + j],)
        dots = dots + (sums[2 + j],)
    gamma = anderson_weights(gram, dots, rel > SAFEGUARD * best, ridge, N)
    step = damping * g
    for j in tl.static_range(N):
        step -= gamma[j][:, None] * (dx[j].to(tl.float32) + damping * dg[j].to(tl.float32))
    less_x = ()
    less_g = ()
    less_gram = ()
    for i in tl.static_range(1, N):
        less_x = less_x + (dx[i],)
        less_g = less_g + (dg[i],)
        for j in tl.static_range(1, i + 1):
            less_gram = less_gram + (gram[i * (i + 1) // 2 + j],)
    return step, less_x, less_g, less_gram
