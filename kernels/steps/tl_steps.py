"""Jitted helpers of the fused solver steps: the rules of one sample, and its bookkeeping between launches."""

import triton
import triton.language as tl

from ..tl_common import INF, act, add2, constant, product, rules_update

# Rows of `stats` [10, B], in the dtype of the state: what rules_update changes, then the last norms and residual.
BEST, BAR, BASE, FIRST, PEAK, MARK, LOW, R, S, REL = (constant(i) for i in range(10))
# Rows of `flags` [5, B], int32. IMPROVED, BEFORE: whether the last evaluation, and the one before, became the best.
PHASE, STEPS, IMPROVED, BEFORE, ARRIVED = (constant(i) for i in range(5))
DONE, ACTIVE, STOPPED = (constant(i) for i in range(3))  # PHASE; STOPPED: by the last evaluation
# Of TAIL: act, which parts have a gain, whether there is a mix, and the block of a row, 0 where rows don't matter.
ACT, SCALED, MIXED, ROW = (constant(i) for i in range(4))


@triton.jit
def wide(n):
    """Returns a size, which is a plain number where it is 1, in 64 bits: several states may have 2^31 elements."""
    return tl.cast(n, tl.int64)


@triton.jit
def part_of_sample(N, D, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """Returns what this program does: (its sample, which part of it, columns, which of them exist, feature of each).

    A part has whole rows where the tail wants them. The sample is a number of 64 bits, for offsets.
    """
    pid = tl.program_id(0)
    b, split = wide(pid // SPLITS), pid % SPLITS
    i = tl.arange(0, BLOCK_N)
    if TAIL[ROW] == 0:
        cols = split * BLOCK_N + i
        return b, split, cols, cols < N, i
    else:
        d = i % TAIL[ROW]
        cols = (split * (BLOCK_N // TAIL[ROW]) + i // TAIL[ROW]) * D + d
        return b, split, cols, (d < D) & (cols < N), d


@triton.jit
def image(y_ptrs, v_ptrs, offs, mask, d, z, D, eps, mix, TAIL: tl.constexpr, INTERP: tl.constexpr):
    """Returns y = f(z) from the parts that f gave, in the dtype of z, as `tails.Tail` does."""
    y = tl.load(y_ptrs[0] + offs, mask=mask, other=0.0).to(z.dtype)
    for i in tl.static_range(1, len(y_ptrs)):
        part = tl.load(y_ptrs[i] + offs, mask=mask, other=0.0).to(z.dtype)
        if TAIL[SCALED][i]:
            part *= tl.load(v_ptrs[i - 1] + d, mask=d < D, other=0.0).to(z.dtype)
        y += part
    if TAIL[ACT] == "rms":
        weight = tl.load(v_ptrs[len(v_ptrs) - 1] + d, mask=d < D, other=0.0).to(z.dtype)
        y = tl.where(mask, rms(y, D, eps, TAIL[ROW]) * weight, 0.0)  # beyond the last row, where eps may be 0, too
    elif TAIL[ACT] != "identity":
        NAME: tl.constexpr = TAIL[ACT]  # Triton 3.4 takes no part of a tuple for a constant
        y = act(y, NAME, INTERP)
    if TAIL[MIXED]:
        y = z + mix * (y - z)
    return y


@triton.jit
def rms(s, D, eps, ROW: tl.constexpr):
    """Returns each row of D values over the root of its mean square; columns beyond D are 0."""
    if s.shape[0] == ROW:
        return s * (1.0 / tl.sqrt(tl.sum(product(s, s), 0) / D + eps))
    else:
        rows = tl.reshape(s, (s.shape[0] // ROW, ROW))
        rows *= (1.0 / tl.sqrt(tl.sum(product(rows, rows), 1) / D + eps))[:, None]
        return tl.reshape(rows, (s.shape[0],))


@triton.jit
def evaluation(
    z_ptr,
    y_ptrs,
    v_ptrs,
    mask_ptr,
    offs,
    mask,
    d,
    D,
    eps,
    mix,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Returns (z, y, y - z where it counts, y where it counts) of y = f(z)."""
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)
    y = image(y_ptrs, v_ptrs, offs, mask, d, z, D, eps, mix, TAIL, INTERP)
    g = y - z
    seen = y
    if HAS_MASK:
        counted = tl.load(mask_ptr + offs, mask=mask, other=0) != 0
        g = tl.where(counted, g, 0.0)
        seen = tl.where(counted, y, 0.0)
    return z, y, g, seen


@triton.jit
def record(stats, flags, B, mask):
    """Returns (whether the evaluation before became the best, what the rules store) of the samples under the mask."""
    before = tl.load(flags + IMPROVED * B, mask=mask, other=0)
    state = ()
    for i in tl.static_range(R):
        state = state + (tl.load(stats + i * B, mask=mask, other=0.0),)
    return before, state


@triton.jit
def _apply_rules(recorded, stats, flags, B, k, r, s, relative, mask):
    """Applies the rules to evaluation k of the samples under the mask, whose norms are r and s.

    Returns (rel, best, bar, whether this evaluation became the best, whether the one before did).
    """
    before, state = recorded
    tl.debug_barrier()  # every warp has read what another is about to overwrite
    rel, improved, state = rules_update(state, k, r, s, relative, mask, mask)
    after = state + (r, s, rel)
    for i in tl.static_range(REL + 1):
        tl.store(stats + i * B, after[i], mask=mask)
    tl.store(flags + STEPS * B, k, mask=mask)
    tl.store(flags + BEFORE * B, before, mask=mask)
    tl.store(flags + IMPROVED * B, improved.to(tl.int32), mask=mask)
    return rel, state[0], state[1], improved, before != 0


@triton.jit
def judge(recorded, k, stats_ptr, flags_ptr, count_ptr, b, B, limit, relative, rr, ss):
    """Applies the rules to the squared norms of one sample's evaluation k, the last one if it is number `limit`.

    Returns (whether it goes on, rel, best, whether this evaluation became it, whether the one before did).
    """
    flags = flags_ptr + b
    r, s = tl.sqrt(rr), tl.sqrt(ss)
    rel, best, bar, improved, before = _apply_rules(recorded, stats_ptr + b, flags, B, k, r, s, relative, k > 0)
    go = (best > bar) & (k < limit)
    if not go:
        tl.store(flags + PHASE * B, STOPPED)
        tl.atomic_add(count_ptr, -1, sem="relaxed")
    return go, rel, best, improved, before


@triton.jit
def judge_rows(
    stats_ptr,
    flags_ptr,
    part_ptr,
    count_ptr,
    rows,
    active,
    k,
    B,
    limit,
    relative,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Judges evaluation k of the active rows, in float32, and marks those that stop as DONE.

    Their parts [2, SPLITS, B] are added up always in the same order.
    """
    offs_s = tl.arange(0, BLOCK_S)
    parts = part_ptr + offs_s[:, None].to(tl.int64) * B + rows[None, :]
    mask = (offs_s < SPLITS)[:, None] & active[None, :]
    r = tl.sqrt(tl.sum(tl.load(parts, mask=mask, other=0.0), 0))
    s = tl.sqrt(tl.sum(tl.load(parts + SPLITS * B, mask=mask, other=0.0), 0))
    flags = flags_ptr + rows
    recorded = record(stats_ptr + rows, flags, B, active)
    rel, best, bar, improved, before = _apply_rules(recorded, stats_ptr + rows, flags, B, k, r, s, relative, active)
    # by `where`, for Triton 3.9 interprets a scalar that joins a mask as int32, which no store takes
    stopped = active & (best <= tl.where(k >= limit, INF, bar))
    tl.store(flags + PHASE * B, DONE, mask=stopped)
    tl.atomic_add(count_ptr, -tl.sum(stopped.to(tl.int32), 0), sem="relaxed")


@triton.jit
def last_to_arrive(flags, B, SPLITS: tl.constexpr):
    """Returns whether every other program of this sample has come here before; all have read its flags then."""
    tl.debug_barrier()
    last = True
    if SPLITS > 1:
        last = tl.atomic_add(flags + ARRIVED * B, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(flags + ARRIVED * B, 0)
    return last


@triton.jit
def leave(flags, B, SPLITS: tl.constexpr):
    """Marks as done a sample that stopped, once all its programs have seen it."""
    if last_to_arrive(flags, B, SPLITS):
        tl.store(flags + PHASE * B, DONE)


@triton.jit
def make_way(z_ptr, next_ptr, best_ptr, go, improved, before, offs, mask):
    """Saves z_(k-1), which is about to be overwritten, if it is the best; or z_k if it is, of a sample that stopped."""
    if improved:
        if not go:
            tl.store(best_ptr + offs, tl.load(z_ptr + offs, mask=mask), mask=mask)
    elif before:
        tl.store(best_ptr + offs, tl.load(next_ptr + offs, mask=mask), mask=mask)


@triton.jit
def save_best(next_ptr, best_ptr, flags, B, offs, mask):
    """Saves z_(k-2), which is about to be overwritten, if it is the best: z_(k-1) was no better."""
    if (tl.load(flags + BEFORE * B) != 0) & (tl.load(flags + IMPROVED * B) == 0):
        tl.store(best_ptr + offs, tl.load(next_ptr + offs, mask=mask), mask=mask)


@triton.jit
def save_last_best(z_ptr, prev_ptr, best_ptr, flags, B, offs, mask):
    """Saves the best iterate if it is z_k or, next, z_(k-1); else it has been saved."""
    improved, before = tl.load(flags + IMPROVED * B) != 0, tl.load(flags + BEFORE * B) != 0
    make_way(z_ptr, prev_ptr, best_ptr, False, improved, before, offs, mask)


@triton.jit
def settle(z_ptr, prev_ptr, next_ptr, best_ptr, flags, B, offs, mask, SPLITS: tl.constexpr):
    """Saves the best iterate of a sample that stopped at z_(k-1), and leaves all buffers where it stopped."""
    save_last_best(prev_ptr, next_ptr, best_ptr, flags, B, offs, mask)
    at = tl.load(prev_ptr + offs, mask=mask)
    tl.store(z_ptr + offs, at, mask=mask)
    tl.store(next_ptr + offs, at, mask=mask)
    leave(flags, B, SPLITS)


@triton.jit
def part_sum(part_ptr, b, i, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns sum i of a sample over its programs, always in the same order; parts are [B, WIDTH, SPLITS]."""
    offs = tl.arange(0, BLOCK_S)
    row = part_ptr + (b * WIDTH + i) * SPLITS
    return tl.sum(tl.load(row + offs, mask=offs < SPLITS, other=0.0), 0)


@triton.jit
def part_sums(part_ptr, b, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns all sums of a sample, a tuple."""
    sums = ()
    for i in tl.static_range(WIDTH):
        sums = sums + (part_sum(part_ptr, b, i, SPLITS, WIDTH, BLOCK_S),)
    return sums


@triton.jit
def dot2(a, b, c, d, INTERP: tl.constexpr):
    """Returns (<a, b>, <c, d>) in one reduction."""
    if INTERP:
        return tl.sum(a * b, 0), tl.sum(c * d, 0)
    else:
        return tl.reduce((product(a, b), product(c, d)), 0, add2)
