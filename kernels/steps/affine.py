"""Solver steps of the affine cell, one launch each: the GEMM with the step in its epilogue.

    z* = act(W z* + u)                          z, u [B, D] rows, W [D, D]; act has act(0) = 0
    u* = W' (s u*) + g,  s = act'(pre)          its adjoint, pre = W z* + u; iterated as v = s (v W + g), v = s u

Delta form, as in rows/skeleton.py, whose torch reference is the one of rows/affine.py. The launch of evaluation k, by
programs with a tile of the output each, computes

    acc_k = acc_(k-1) + d_k W',   z_k = z_(k-1) + d_k,   g = act(acc_k) - z_k,   d_(k+1) = bf16(damping g)

and the sums of g^2 and act(acc_k)^2 over the tile's columns. The last program of a row tile to end adds these in a
fixed order and applies `rules.py` to its rows: bits do not depend on timing, and what is known after the launch is
known of its evaluation. Rows that have stopped are stored no more, and tiles of them return.

d alternates between two buffers, for a program reads whole rows of d_k and writes its tile of d_(k+1); so does what is
returned, z or in the adjoint acc, whose value of evaluation k-2 is saved before it is overwritten if it is the best.
Which buffer it is follows from the row's count of steps: every launch has the same arguments, as a graph needs.

Bytes of a launch: 22 B D (acc, z read and written, d read twice and written; 26 in the adjoint, which reads pre) and W
once. No GEMM is done for a start at zero; another start is multiplied as three bf16 parts, which hold all its bits.
A row's bits do not depend on its batch mates, but through the tile that launch.py picks on how many they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices, launch
from ..dispatch import CellOp, interpreting, register
from ..formulas import ACTIVATIONS
from ..rows.terms import bf16_terms
from ..tl_common import act, act_slope, bf16_pair, row_sums
from .base import Samples
from .tl_ends import begin_rows_kernel, finish_rows_kernel
from .tl_steps import ACTIVE, ARRIVED, BEFORE, DONE, IMPROVED, PHASE, STEPS, judge_rows

MOST = 4096  # features; wider cells are left to cuBLAS
LARGE = 1 << 20  # elements of a state from which cuBLAS and a second launch are taken, except in float32


@triton.jit
def _halves(x):
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
    return (left, right)


@triton.jit
def _columns(x, SUB: tl.constexpr):
    """Returns x [M, N] as a tuple of SUB tiles [M, N / SUB], left to right; SUB is a power of two up to 32."""
    tiles = (x,)
    for i in tl.static_range(5):
        if SUB > 2**i:
            finer = ()
            for j in tl.static_range(len(tiles)):
                finer = finer + _halves(tiles[j])
            tiles = finer
    return tiles


@triton.jit
def _product(acc, d, w_ptr, WIDTH: tl.constexpr, TERMS: tl.constexpr, INTERP: tl.constexpr):
    """Returns acc + d W for BLOCK_K columns of d, with all terms of W at these pointers.

    Tensor cores cut the sum with their accumulator to float32, toward zero, after every 16 columns. Three terms are for
    tolerances that this would miss at a thousand columns: there each block has a sum of its own, the least term first.
    """
    if TERMS == 3:
        new = tl.zeros_like(acc)
        for t in tl.static_range(TERMS):
            term = tl.load(w_ptr + (TERMS - 1 - t) * WIDTH * WIDTH)
            new = tl.dot(d, term.to(tl.float32) if INTERP else term, new)
        acc += new
    else:
        for t in tl.static_range(TERMS):
            term = tl.load(w_ptr + t * WIDTH * WIDTH)
            acc = tl.dot(d, term.to(tl.float32) if INTERP else term, acc)
    return acc


@triton.jit(do_not_specialize=["B", "limit"])
def _step_kernel(
    d_ptr,  # [2, B, WIDTH] bf16
    w_ptr,  # [TERMS, WIDTH, WIDTH] bf16, zero beyond D
    value_ptr,  # [2, B, D]: z; acc in the adjoint
    other_ptr,  # [B, D]: acc; v in the adjoint
    pre_ptr,  # [B, D], adjoint only
    best_ptr,  # [B, D]: of value
    moved_ptr,  # []: whether the start is not zero, if START
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    part_ptr,  # [2, SPLITS, B]
    count_ptr,  # []
    B,
    limit,
    relative,
    depth,  # D, or up to the end of its last BLOCK_K
    damping,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ACT: tl.constexpr,
    ADJ: tl.constexpr,
    START: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INTERP: tl.constexpr,
):
    SPLITS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    DEPTH: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    # GROUP row tiles side by side share the columns of W in L2
    pid = tl.program_id(0)
    first = pid // (GROUP * SPLITS) * GROUP
    group = tl.minimum((B + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    tile = first + pid % (GROUP * SPLITS) % group
    column = pid % (GROUP * SPLITS) // group

    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    flags = flags_ptr + rows
    active = tl.load(flags + PHASE * B, mask=rows < B, other=DONE) == ACTIVE
    if tl.max(active.to(tl.int32), 0) == 0:
        return
    k = tl.max(tl.load(flags + STEPS * B, mask=active, other=0), 0) + 1  # the same for all that are active
    fading = active & (tl.load(flags + BEFORE * B, mask=active, other=0) != 0)
    fading = fading & (tl.load(flags + IMPROVED * B, mask=active, other=1) == 0)  # evaluation k - 2 was the best
    fades = tl.max(fading.to(tl.int32), 0) != 0
    last = ((k + 1) % 2).to(tl.int64)
    now = (k % 2).to(tl.int64)

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, B - 1)[:, None]  # what lies beyond is not stored
    if ADJ:
        w = w_ptr + offs_k[:, None] * WIDTH + offs_n[None, :]
    else:
        w = w_ptr + offs_n[None, :] * WIDTH + offs_k[:, None]
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if START and ADJ:
        pass  # v starts at zero
    elif START:
        if tl.load(moved_ptr) != 0:
            z_rows = value_ptr + last * B * D + inside * D
            for i in range(0, DEPTH if INTERP else depth, BLOCK_K):
                cols = i + offs_k[None, :]
                rest = tl.load(z_rows + cols, mask=cols < D, other=0.0)
                for _ in tl.static_range(3):  # bf16 parts hold all bits of a float32
                    part, near = bf16_pair(rest, INTERP)
                    rest -= near
                    dot = _product(dot, part, w, WIDTH, TERMS, INTERP)
                w += BLOCK_K
    else:
        d = d_ptr + now * B * WIDTH + inside * WIDTH + offs_k[None, :]
        # a depth that the compiler knew would be unrolled, and spill registers
        for _ in range(0, DEPTH if INTERP else depth, BLOCK_K):
            part = tl.load(d)
            dot = _product(dot, part.to(tl.float32) if INTERP else part, w, WIDTH, TERMS, INTERP)
            d += BLOCK_K
            w += BLOCK_K * WIDTH if ADJ else BLOCK_K

    # offsets in a tile are 32 bits wide: 64 of each element would take its registers
    origin = tile.to(tl.int64) * BLOCK_M
    fresh_ptr = value_ptr + (now * B + origin) * D
    value_ptr += (last * B + origin) * D
    other_ptr += origin * D
    pre_ptr += origin * D
    best_ptr += origin * D
    onward_ptr = d_ptr + (last * B + origin) * WIDTH
    d_ptr += (now * B + origin) * WIDTH
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    dots = _columns(dot, SUB)
    rr = tl.zeros((BLOCK_M,), tl.float32)
    ss = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(SUB):
        cols = column * BLOCK_N + i * (BLOCK_N // SUB) + tl.arange(0, BLOCK_N // SUB)
        mask = active[:, None] & (cols < D)[None, :]
        offs = offs_m * D + cols[None, :]
        offs_d = offs_m * WIDTH + cols[None, :]
        near = tl.load(d_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + offs, mask=mask, other=0.0)
        other = tl.load(other_ptr + offs, mask=mask, other=0.0)
        if ADJ:
            value += dots[i]
            other += near
            f = act_slope(tl.load(pre_ptr + offs, mask=mask, other=0.0), ACT, INTERP) * value
            g = f - other
        else:
            other += dots[i]
            value += near
            f = act(other, ACT, INTERP)
            g = f - value
        onward, near = bf16_pair(damping * g, INTERP)
        if fades:
            old = fading[:, None] & (cols < D)[None, :]
            tl.store(best_ptr + offs, tl.load(fresh_ptr + offs, mask=old, other=0.0), mask=old)
        tl.store(fresh_ptr + offs, value, mask=mask)
        tl.store(other_ptr + offs, other, mask=mask)
        tl.store(onward_ptr + offs_d, onward, mask=mask)
        sums = row_sums((g * g, f * f), 2, INTERP)
        rr += sums[0]
        ss += sums[1]
    tl.store(part_ptr + column.to(tl.int64) * B + rows, rr, mask=active)
    tl.store(part_ptr + (SPLITS + column).to(tl.int64) * B + rows, ss, mask=active)

    tl.debug_barrier()
    arrived = flags_ptr + ARRIVED * B + tile
    if tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived, 0)
        judge_rows(stats_ptr, flags_ptr, part_ptr, count_ptr, rows, active, k, B, limit, relative, SPLITS, BLOCK_S)


class AffineSteps(Samples):
    """The steps of one solve with their evaluations: `take` needs no y, and `onward` returns none.

    `reset` reads u and W again, so that a captured solve sees them change.
    """

    def __init__(self, w, u, start, pre, activation, tol, limit, damping, terms, relative=1.0, scale=0.0):
        batch, features = u.shape
        super().__init__(batch, u.dtype, u.device, scale)
        shape = {"batch": batch, "features": features, "terms": terms, "shared": devices.shared_memory(u.device)}
        configs = [launch.parameters("steps.affine", u.device, start=start, **shape) for start in (False, True)]
        wide = max(config[block] for config in configs for block in ("BLOCK_N", "BLOCK_K"))
        width = launch.cdiv(features, wide) * wide
        self.known = {"B": batch, "limit": limit, "damping": damping, "D": features, "WIDTH": width, "TERMS": terms}
        self.known |= {"ACT": activation, "ADJ": pre is not None, "INTERP": interpreting()}
        self.known |= {"relative": float(relative), "tol": float(tol), "scale": float(self.scale)}
        self.launches = []  # of a later step, of the first
        for config in configs:
            splits = launch.cdiv(features, config["BLOCK_N"])
            depth = launch.cdiv(features, config["BLOCK_K"]) * config["BLOCK_K"]
            grid = (launch.cdiv(batch, config["BLOCK_M"]) * splits,)
            self.launches.append((grid, config | {"depth": depth, "BLOCK_S": launch.power_of_two(splits)}))
        self.weight, self.u = w, u
        self.w = u.new_empty((terms, width, width), dtype=torch.bfloat16)
        self.d = u.new_zeros((2, batch, width), dtype=torch.bfloat16)
        self.value, self.other, self.best = u.new_empty((2, *u.shape)), *(u.new_empty(u.shape) for _ in range(2))
        self.pre = self.best if pre is None else pre.contiguous()
        least = min(config["BLOCK_N"] for config in configs)
        self.part = u.new_empty(2, launch.cdiv(features, least), batch)
        self.moved = torch.empty((), dtype=torch.bool, device=u.device)
        self.reset(start)

    def reset(self, z: Tensor | None) -> None:
        """Begins a solve at `z`, in the same memory; the adjoint begins at zero, and asks for None."""
        bf16_terms((self.weight,), len(self.w), (self.w,))
        u = self.u.contiguous()
        start = u if z is None else z.contiguous()
        given = {"u_ptr": u, "start_ptr": start, "BLOCK_D": launch.power_of_two(self.d.shape[2]), "num_warps": 4}
        self.launch_kernel(begin_rows_kernel, (len(u),), **self.known, **given)
        if z is not None:
            torch.any(start, out=self.moved)
        self.start = True

    def take(self, y: None = None) -> None:
        """Launches an evaluation, and the step before it."""
        grid, config = self.launches[self.start]
        self.launch_again(self.start, _step_kernel, grid, {}, **self.known, **config, START=self.start)
        self.start = False

    def onward(self, left: int | None = None) -> None:
        pass  # the next evaluation makes its iterate

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (z or u* [B, D], status, steps, residual, each [B]) after the last `take`."""
        block = launch.power_of_two(self.u.shape[1])
        self.launch_kernel(finish_rows_kernel, (len(self.u),), **self.known, BLOCK_D=block, num_warps=4)
        return self.best, *self.outcome()


def affine_steps_solve(
    w, u, z0, *, activation, tol, max_steps, relative=1.0, scale=0.0, damping=1.0, memory=0, terms=2
) -> AffineSteps:
    """Returns the steps of z* = act(W z* + u) from z0; they end with what rows/affine.py's `affine_solve` returns.

    They take its arguments too, but z0 is given, and only read; `damping` may be up to 2, and `memory` is 0.
    """
    return AffineSteps(w, u, z0, None, activation, tol, max_steps, damping, terms, relative, scale)


def affine_steps_adjoint(
    w, pre, g, *, activation, tol, max_steps, relative=1.0, scale=0.0, damping=1.0, memory=0, terms=2
) -> AffineSteps:
    """Returns the steps of u* = W' (act'(pre) u*) + g for g [B, D], with the options of `affine_steps_solve`.

    Residuals are those of v = act'(pre) u, which starts at zero; pre = W z* + u is [B, D].
    """
    return AffineSteps(w, g, None, pre, activation, tol, max_steps, damping, terms, relative, scale)


def refuses(*, rows, features, dtype, terms, cell, activation="tanh", solver_memory=0) -> str | None:
    """Returns why the loop must call the cell, or None; `cell` is torch's precision: "fp32", "tf32" or "bf16".

    Torch's float32 product takes no tensor cores and is slower at any size. In the others cuBLAS is the faster one, and
    one launch fewer is worth more up to LARGE elements of the state; no GPU has measured where the two meet.
    """
    if rows == 0:
        return "an empty batch"
    if not launch.FEATURES < features <= MOST:
        return f"{features} features, and the steps with the GEMM in them are for {launch.FEATURES + 1} to {MOST}"
    if dtype == torch.float64:
        return "float64 state, and the kernel's is float32"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if solver_memory:
        return f"Anderson memory {solver_memory}, and the steps with the GEMM in them are Picard's"
    if cell != "fp32" and rows * features > LARGE:
        return f"{rows} x {features} in {cell}: more than {LARGE} elements are left to cuBLAS and a step after it"
    return None


LABEL = "one launch a step and its GEMM"
affine_steps = register("steps.affine", CellOp(affine_steps_solve, affine_steps_adjoint, refuses, LABEL))
