"""Kernels that begin a solve by fused steps, and that finish it: one launch each."""

import triton
import triton.language as tl

from ..tl_common import INF, rules_status
from .tl_steps import (
    ACTIVE,
    ARRIVED,
    BAR,
    BASE,
    BEFORE,
    BEST,
    DONE,
    IMPROVED,
    LOW,
    MARK,
    PHASE,
    REL,
    STEPS,
    R,
    S,
    save_last_best,
    wide,
)


@triton.jit
def forget(stats, flags, B, tol, scale, mask):
    """Makes samples active, as before their first evaluation."""
    none = tl.where(mask, 0.0, 0.0)
    for i in tl.static_range(REL + 1):
        value = none
        if (i == BEST) | (i == MARK) | (i == LOW):
            value = none + INF
        elif i == BAR:
            value = none + tol
        elif i == BASE:
            value = none + scale
        tl.store(stats + i * B, value, mask=mask)
    for i in tl.static_range(ARRIVED + 1):
        tl.store(flags + i * B, tl.where(mask, ACTIVE if i == PHASE else 0, 0), mask=mask)


@triton.jit
def store_status(status, stats, B, tol, relative, mask):
    """Stores the outcome of samples, by their statistics."""
    state = ()
    for i in tl.static_range(R):
        state = state + (tl.load(stats + i * B, mask=mask, other=0.0),)
    r, s = tl.load(stats + R * B, mask=mask, other=0.0), tl.load(stats + S * B, mask=mask, other=0.0)
    tl.store(status, rules_status(state, r, s, relative, tol), mask=mask)


@triton.jit
def begin_kernel(
    start_ptr,  # [B, N]
    z_ptr,  # [B, N]
    best_ptr,  # [B, N]
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    count_ptr,  # []
    numbers_ptr,  # those of the solver, then tol and scale
    numbers,  # the same, rounded to float32
    B,
    N,
    EXACT: tl.constexpr,  # whether memory holds them already, in float64
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Begins a solve at `start`."""
    pid = tl.program_id(0)
    b = wide(pid // SPLITS)
    cols = (pid % SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(start_ptr + b * N + cols, mask=cols < N)
    tl.store(z_ptr + b * N + cols, start, mask=cols < N)
    tl.store(best_ptr + b * N + cols, start, mask=cols < N)
    LAST: tl.constexpr = len(numbers) - 1
    if pid % SPLITS == 0:
        if EXACT:
            tol, scale = tl.load(numbers_ptr + LAST - 1), tl.load(numbers_ptr + LAST)
        else:
            tol, scale = numbers[LAST - 1], numbers[LAST]
        forget(stats_ptr + b, flags_ptr + b, B, tol, scale, b < B)
    if pid == 0:
        tl.store(count_ptr, B)
        if not EXACT:
            for i in tl.static_range(len(numbers)):
                tl.store(numbers_ptr + i, numbers[i])


@triton.jit
def finish_kernel(
    z_ptr,  # [B, N]: z_k, the last iterate that was evaluated
    prev_ptr,  # [B, N]: z_(k-1); or `best`, where that has been saved
    best_ptr,  # [B, N]
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    status_ptr,  # [B] int32
    numbers_ptr,  # tol is the one at TOL
    B,
    N,
    relative,
    TOL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Leaves in `best` every sample's best iterate, and stores its status."""
    pid = tl.program_id(0)
    b = wide(pid // SPLITS)
    flags = flags_ptr + b
    if pid % SPLITS == 0:
        store_status(status_ptr + b, stats_ptr + b, B, tl.load(numbers_ptr + TOL), relative, b < B)
    if tl.load(flags + PHASE * B) != DONE:
        cols = (pid % SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
        save_last_best(z_ptr, prev_ptr, best_ptr, flags, B, b * N + cols, cols < N)


@triton.jit(do_not_specialize=["B", "tol", "scale"])
def begin_rows_kernel(
    u_ptr,  # [B, D]
    start_ptr,  # [B, D], unless ADJ
    d_ptr,  # [2, B, WIDTH] bf16
    value_ptr,  # [2, B, D]
    other_ptr,  # [B, D]
    best_ptr,  # [B, D]
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    count_ptr,  # []
    B,
    tol,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ADJ: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Begins the solve of a row, at `start`; the adjoint at zero."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    at, mask = row * D + cols, cols < D
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    first, other = u, tl.zeros_like(u)
    if not ADJ:
        first, other = tl.load(start_ptr + at, mask=mask, other=0.0), u
    tl.store(value_ptr + at, first, mask=mask)
    tl.store(best_ptr + at, first, mask=mask)
    tl.store(other_ptr + at, other, mask=mask)
    tl.store(d_ptr + (B + row) * WIDTH + cols, tl.zeros_like(u), mask=cols < WIDTH)
    forget(stats_ptr + row, flags_ptr + row, B, tol, scale, row < B)
    if row == 0:
        tl.store(count_ptr, B)


@triton.jit(do_not_specialize=["B", "tol"])
def finish_rows_kernel(
    value_ptr,  # [2, B, D]
    best_ptr,  # [B, D]
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    status_ptr,  # [B] int32
    B,
    tol,
    relative,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Leaves in `best` the best iterate of a row: that of its last evaluation or of the one before, if not saved."""
    row = tl.program_id(0).to(tl.int64)
    store_status(status_ptr + row, stats_ptr + row, B, tol, relative, row < B)
    improved = tl.load(flags_ptr + IMPROVED * B + row) != 0
    if improved | (tl.load(flags_ptr + BEFORE * B + row) != 0):
        steps = tl.load(flags_ptr + STEPS * B + row)
        where = tl.where(improved, steps, steps + 1) % 2
        cols = tl.arange(0, BLOCK_D)
        value = tl.load(value_ptr + (where.to(tl.int64) * B + row) * D + cols, mask=cols < D, other=0.0)
        tl.store(best_ptr + row * D + cols, value, mask=cols < D)
