"""Whole solve of a small batch by the affine cell in one launch, W spread over the chip: a grid barrier a step.

    z* = act(W z* + u)                          z, u [B, D] rows, W [D, D], D <= 2048, B <= 64; act has act(0) = 0
    u* = W' (s u*) + g,  s = act'(pre)          its adjoint, pre = W z* + u; iterated as v = s (v W + g), v = s u

A tile of BLOCK_M rows is shared by SPLITS programs; each owns BLOCK_N features of it, and keeps its slice of W in
shared memory, as 1 to 3 bf16 terms. Delta form, as in affine.py: acc = W z + u and z stay in registers in float32, and
the programs of a tile tell each other only bf16 increments d of z, and their parts of ||g||^2 and ||f||^2. Each adds up
the same parts in the same order and applies `rules.py` to all rows of the tile, so all decide alike. What is kept of a
row is selected while it goes on, and no more when it has stopped. Evaluation k is

    f = act(acc), g = f - z:  store d = bf16(damping g) and the sums;  meet;  load all d and all sums
    stop, or z += d, acc += d W'

One barrier a step is enough, for d and the sums lie in two buffers in turn. Whoever writes those of evaluation k + 2,
where those of k lay, has met the others at k + 1, where each came after it had read those of k.

The barrier is a counter of each tile: a program adds 2 to it, then polls. It is built so that no error hangs or lies:

* All programs run at once, or CUDA raises: there is at most one for each multiprocessor, and the launch is cooperative.
* A poll is an atomic of one thread whose result reaches the others through shared memory: a program decides as one.
* Who has polled POLLS times sets the counter's lowest bit, and leaves. Who sees the bit leaves too. A program writes
  NaN for the rows that it had not stopped by then, and raises their status, by an atomic maximum, to NONFINITE, and
  their residual to infinity: whatever others found out, they can't take that back. Rows that every program had stopped
  before are right. The host need not look.
* Stores of all threads come before the arrival (a barrier of the program, then an atomic that releases), and loads
  after the poll (an atomic that acquires, then a barrier) and past L1. tests/kernels/test_offline_affine_grid.py finds
  this order in the PTX, and in tests/kernels/test_affine_grid.py programs meet that are processes.

No GPU has run it yet. dispatch.py takes it only where kernels with such barriers are asked for.

Bytes per call: W once per tile, u and z once (plus pre in the adjoint). Of a step: 2 B D SPLITS and 8 B SPLITS^2, from
L2. Where W's slice does not fit, a step would read W from L2, as a launch of affine_steps.py does: refused. A row's
bits do not depend on its batch mates, but through the tile that launch.py picks on how many they are. The reference is
affine.py's.
"""

import torch
import triton
import triton.language as tl

from . import costs, launch
from .affine import affine_adjoint_ref, affine_solve_ref
from .dispatch import Op, interpreting, register
from .formulas import ACTIVATIONS
from .tl_common import (
    FLOOR,
    INF,
    NONFINITE,
    act,
    act_slope,
    bf16_pair,
    row_sums,
    rules_start,
    rules_status,
    rules_update,
)

POLLS = 1 << 20  # of one barrier: about a second where a poll takes a microsecond; a paused program polls nothing


@triton.jit
def meet(turn_ptr, target, POLLS: tl.constexpr):
    """Arrives, and waits until the counter is at `target`; returns whether all have come."""
    tl.debug_barrier()
    seen = tl.atomic_add(turn_ptr, 2, sem="acq_rel", scope="gpu") + 2
    polls = 0
    while (seen - target < 0) & (seen & 1 == 0) & (polls < POLLS):  # the difference may wrap around
        seen = tl.atomic_add(turn_ptr, 0, sem="acq_rel", scope="gpu")
        polls += 1
    met = (seen - target >= 0) & (seen & 1 == 0)
    if not met:
        tl.atomic_or(turn_ptr, 1, sem="acq_rel", scope="gpu")
    return met


@triton.jit
def _weights(
    w_ptr,
    cols,
    stride_wn,
    stride_wk,
    D: tl.constexpr,
    TERMS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERP: tl.constexpr,
):
    """These columns of W', or of W, in bf16 terms: CHUNKS * TERMS tiles [GROUPS, BLOCK_K, BLOCK_N]."""
    w = ()
    for i in tl.static_range(CHUNKS):
        depth = (i * GROUPS + tl.arange(0, GROUPS)[:, None, None]) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
        at = w_ptr + depth.to(tl.int64) * stride_wk + cols.to(tl.int64)[None, None, :] * stride_wn
        rest = tl.load(at, mask=(depth < D) & (cols < D)[None, None, :], other=0.0)
        for _ in tl.static_range(TERMS):
            term, near = bf16_pair(rest, INTERP)
            rest -= near
            w = w + (term,)
    return w


@triton.jit
def _whole_rows(
    x_ptr,
    rows,
    stride,
    mask,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows as others wrote them, past L1: CHUNKS tiles [GROUPS, BLOCK_M, BLOCK_K]."""
    x = ()
    for i in tl.static_range(CHUNKS):
        depth = (i * GROUPS + tl.arange(0, GROUPS)[:, None, None]) * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        at = x_ptr + rows[None, :, None] * stride + depth
        x = x + (tl.load(at, mask=mask[None, :, None] & (depth < D), other=0.0, cache_modifier=".cg"),)
    return x


@triton.jit
def _product(d, w, TERMS: tl.constexpr, CHUNKS: tl.constexpr):
    """d W, each warp a part of the depth; [BLOCK_M, BLOCK_N]."""
    dot = tl.zeros((d[0].shape[0], d[0].shape[1], w[0].shape[2]), tl.float32)
    for i in tl.static_range(CHUNKS):
        for t in tl.static_range(TERMS):
            dot = tl.dot(d[i], w[i * TERMS + t], dot)
    return tl.sum(dot, 0)


@triton.jit(do_not_specialize=["B", "max_steps"])
def grid_kernel(
    w_ptr,  # [D, D] fp32, at stride_wn for each output of a step and stride_wk for each input
    u_ptr,  # [B, D]: u; g in the adjoint
    start_ptr,  # [B, D]: z0; pre in the adjoint
    d_ptr,  # [2, tiles * BLOCK_M, D] bf16
    part_ptr,  # [2, 2, SPLITS, tiles * BLOCK_M]
    turn_ptr,  # [tiles], zero
    z_ptr,  # [B, D]
    status_ptr,  # [B], zero
    steps_ptr,  # [B], zero
    residual_ptr,  # [B], zero: the bits of a float32
    B,
    tol,
    max_steps,
    damping,
    stride_wn,
    stride_wk,
    D: tl.constexpr,
    ACT: tl.constexpr,
    ADJ: tl.constexpr,
    TERMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    POLLS: tl.constexpr,
    INTERP: tl.constexpr,
):
    # B <= 64 and D <= 2048: all offsets but W's fit 32 bits
    column = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    height = tl.num_programs(0) // SPLITS * BLOCK_M
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)[:, None]
    offs = rows[:, None] * D + cols[None, :]
    go = rows < B
    mask = go[:, None] & (cols < D)[None, :]
    turn_ptr += tile

    w = _weights(w_ptr, cols, stride_wn, stride_wk, D, TERMS, CHUNKS, GROUPS, BLOCK_K, INTERP)
    acc = tl.load(u_ptr + offs, mask=mask, other=0.0)
    if ADJ:
        slope = act_slope(tl.load(start_ptr + offs, mask=mask, other=0.0), ACT, INTERP)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        kept = acc
    else:
        z = tl.load(start_ptr + offs, mask=mask, other=0.0)
        kept = z
        rest = _whole_rows(start_ptr, rows, D, go, D, CHUNKS, GROUPS, BLOCK_K)
        moved = 0
        for i in tl.static_range(CHUNKS):
            moved += tl.sum(tl.sum(tl.sum((rest[i] != 0.0).to(tl.int32), 2), 1), 0)
        pushed = 0
        while (pushed < 3) & (moved != 0):  # three bf16 parts hold all bits of a float32
            pushed += 1
            first = ()
            left = ()
            for i in tl.static_range(CHUNKS):
                part, near = bf16_pair(rest[i], INTERP)
                first = first + (part,)
                left = left + (rest[i] - near,)
            acc += _product(first, w, TERMS, CHUNKS)
            rest = left

    lost = rows < 0  # rows that go on where the programs do not meet
    count = tl.zeros((BLOCK_M,), tl.int32)
    state = rules_start(tol, BLOCK_M)
    r = tl.zeros((BLOCK_M,), tl.float32)
    s = r
    k = 0
    target = 0
    running = tl.sum(go.to(tl.int32), 0)
    while running > 0:
        k += 1
        target += 2 * SPLITS
        now = k % 2
        if ADJ:
            f = slope * acc
        else:
            f = act(acc, ACT, INTERP)
        g = f - z
        d, moves = bf16_pair(damping * g, INTERP)
        sums = row_sums((g * g, f * f), 2, INTERP)
        d_now = d_ptr + now * height * D
        parts = part_ptr + now * 2 * SPLITS * height + rows
        tl.store(d_now + offs, d, mask=mask & go[:, None])
        tl.store(parts + column * height, sums[0])
        tl.store(parts + (SPLITS + column) * height, sums[1])

        met = meet(turn_ptr, target, POLLS)
        # of a row that has stopped these are old, or were never written: nobody looks at its z and acc any more
        news = _whole_rows(d_now, rows, D, rows >= 0, D, CHUNKS, GROUPS, BLOCK_K)
        parts = parts[None, :] + offs_s * height
        rr = tl.load(parts, mask=offs_s < SPLITS, other=0.0, cache_modifier=".cg")
        ss = tl.load(parts + SPLITS * height, mask=offs_s < SPLITS, other=0.0, cache_modifier=".cg")
        dot = _product(news, w, TERMS, CHUNKS)
        live = go & (rows < tl.where(met, B, 0))
        lost = lost | (go & ~live)
        r = tl.where(live, tl.sqrt(tl.sum(rr, 0)), r)
        s = tl.where(live, tl.sqrt(tl.sum(ss, 0)), s)
        count += live.to(tl.int32)
        rel, improved, state = rules_update(state, k, r, s, live, live, FLOOR)
        kept = tl.where(improved[:, None], acc if ADJ else z, kept)
        go = live & (state[0] > state[1]) & (count < max_steps)
        z += moves
        acc += dot
        running = tl.sum(go.to(tl.int32), 0)

    tl.store(z_ptr + offs, tl.where(lost[:, None], float("nan"), kept), mask=mask)
    tells = lost | (rows < tl.where(column == 0, B, 0))
    status = tl.where(lost, NONFINITE, rules_status(state, r, s, tol))
    residual = tl.where(lost, INF, state[0]).to(tl.int32, bitcast=True)  # as ordered as what is not negative
    tl.atomic_max(status_ptr + rows, status, mask=tells, sem="relaxed")
    tl.atomic_max(steps_ptr + rows, count, mask=tells, sem="relaxed")
    tl.atomic_max(residual_ptr + rows, residual, mask=tells, sem="relaxed")


def _solve(w, u, start, strides, adjoint, *, activation, tol, max_steps, damping=1.0, memory=0, terms=2):
    batch, features = u.shape
    z = torch.empty_like(u, memory_format=torch.contiguous_format)
    of = {"shared": launch.shared_memory(u.device), "processors": launch.multiprocessors(u.device)}
    config = launch.parameters("affine_grid", u.device, batch=batch, features=features, terms=terms, **of)
    tiles, splits = -(-batch // config["BLOCK_M"]), -(-features // config["BLOCK_N"])
    words = torch.zeros(tiles + 3 * batch, dtype=torch.int32, device=u.device)
    status, steps, residual = words[tiles:].view(3, batch)
    if batch:
        d = u.new_empty((2, tiles * config["BLOCK_M"], features), dtype=None if interpreting() else torch.bfloat16)
        part = u.new_empty(2, 2, splits, tiles * config["BLOCK_M"])
        tensors = (w, u.contiguous(), start.contiguous(), d, part, words, z, status, steps, residual)
        numbers = (batch, tol, max_steps, damping, *strides)
        known = {"D": features, "ACT": activation, "ADJ": adjoint, "TERMS": terms, "SPLITS": splits, "POLLS": POLLS}
        known |= {"BLOCK_S": triton.next_power_of_2(splits), "INTERP": interpreting()}
        options = {"enable_fp_fusion": True, "launch_cooperative_grid": True}
        with launch.on(u.device):
            grid_kernel[(tiles * splits,)](*tensors, *numbers, **options, **config, **known)
    return z, steps, residual.view(torch.float32), status


def affine_grid_solve(w, u, z0=None, **options):
    """z* = act(W z* + u) for rows u.

    Args:
        w: W, [D, D] fp32; row n gives output n.
        u: [B, D] fp32.
        z0: Start, [B, D] fp32; zero if None.
        options: activation, tol, max_steps, damping and terms, as `affine_solve` has them; memory is 0.
    Returns:
        What `affine_solve` does. A row at which the programs did not meet is NaN, its status NONFINITE and its residual
        infinite.
    """
    return _solve(w, u, torch.zeros_like(u) if z0 is None else z0, w.stride(), False, **options)


def affine_grid_adjoint(w, pre, g, **options):
    """u* = W' (act'(pre) u*) + g for rows g; residuals are those of v = act'(pre) u.

    Args:
        w: As in `affine_grid_solve`, and so are the options.
        pre: W z* + u, [B, D] fp32.
        g: [B, D] fp32.
    Returns:
        u* [B, D], steps, residual and status as `affine_grid_solve`'s.
    """
    return _solve(w, g, pre, w.stride()[::-1], True, **options)


def refuses(*, rows, features, dtype, terms, cell, activation="tanh", solver_memory=0, device=None) -> str | None:
    """Why it must be solved in another way, or None; `cell` is what torch would multiply in, a key of costs.RATES."""
    if rows == 0:
        return "an empty batch"
    if not launch.FEATURES < features <= launch.GRID_FEATURES or rows > launch.GRID_ROWS:
        most = f"{launch.FEATURES + 1} to {launch.GRID_FEATURES} features of at most {launch.GRID_ROWS} rows"
        return f"{features} features of {rows} rows, and a grid barrier is for {most}"
    if dtype == torch.float64:
        return "float64 state, and the kernel's is float32"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if solver_memory:
        return f"Anderson memory {solver_memory}, and the solve with a grid barrier is Picard's"
    shared, processors = launch.shared_memory(device), launch.multiprocessors(device)
    shape = {"batch": rows, "features": features, "terms": terms, "shared": shared, "processors": processors}
    if launch.parameters("affine_grid", **shape) is None:
        return f"{features} features of {rows} rows do not fit on {processors} multiprocessors of {shared} bytes"
    here, apart = costs.grid_seconds(cell=cell, **shape)
    return f"{rows} x {features}: the steps are predicted to be faster alone" if here > apart else None


affine_grid = register(
    "affine_grid",
    Op(
        affine_grid_solve,
        affine_grid_adjoint,
        affine_solve_ref,
        affine_adjoint_ref,
        refuses,
        "one Triton launch with a grid barrier a step",
    ),
)
