"""A Broyden step of any cell in one or two launches; `tritondeq.solvers.Broyden` has the equations, the reference.

The inverse Jacobian of g is H = -I + sum_i u_i v_i'. After evaluation k, with dz and dg the changes of z and g,

    left = H' dz = sum_i a_i v_i - dz       a_i = <u_i, dz>      den = <left, dg> = sum_i a_i b_i - <dz, dg>
    right = H dg = sum_i b_i u_i - dg       b_i = <v_i, dg>      new = <left, g>  = sum_i a_i c_i - <dz, g>
    u, v <- (dz - right) / den, left        c_i = <v_i, g>       z+  = y - sum_i c_i u_i - new u

A launch to MEASURE takes all inner products, which only need the old rings, and applies the rules as in picard.py. One
to MIX makes the new update in the slots of the oldest, and z+. They are one launch, but where several programs share a
sample and in float64.

The steps hold 2 m + 3 states: z_k, z_(k-1), the best iterate and the rings. The oldest update leaves H before the
newest is made, and its v makes room for g_k until then; a sample that stops has an update less.

Bytes of a step, in states B N of the dtype, memory m: (2m + 2) read, then (2m - 2) of them again and 4
written; in two launches (2m + 2) read, then (2m + 2) read and 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import StepsOp, register
from ..rules import SAFEGUARD
from ..tails import Tail
from ..tl_common import constant, product
from . import tl_steps
from .base import Steps, refuses
from .tl_steps import evaluation, judge

SAFE = constant(SAFEGUARD)
PARTS = constant(6)  # sums that are not made for each update
COEFS = constant(2)  # coefficients that are not: 1 / den and <left, g>


@triton.jit(do_not_specialize=["limit"])
def _step_kernel(
    z_ptr,  # [B, N]: z_k
    y_ptrs,  # parts of y, each [B, N], any floating dtype
    v_ptrs,  # gains and weight of the tail, each [D]
    next_ptr,  # [B, N]: z_(k-1), then z_(k+1) if MIX
    best_ptr,  # [B, N]
    mask_ptr,  # [B, N] uint8, if HAS_MASK
    u_ptr,  # [B, M, N]
    v_ptr,  # [B, M, N]
    coef_ptr,  # [B, 2 + 3 M]
    numbers_ptr,  # [1]: the rounding error of an inner product, relative to the norms
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    part_ptr,  # [B, 6 + 3 M, SPLITS]
    count_ptr,  # []
    B,
    N,
    D,
    eps,
    mix,
    limit,
    relative,
    M: tl.constexpr,
    WIDE: tl.constexpr,  # whether a ring has 2^31 elements or more, for which offsets take more registers
    MEASURE: tl.constexpr,
    MIX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    INTERP: tl.constexpr,
):
    WIDTH: tl.constexpr = PARTS + 3 * M
    stride = tl_steps.wide(N) if WIDE else N
    b, split, cols, mask, d = tl_steps.part_of_sample(N, D, SPLITS, BLOCK_N, TAIL)
    flags = flags_ptr + b
    phase = tl.load(flags + tl_steps.PHASE * B)
    row = b * N
    offs = row + cols
    us = u_ptr + row * M + cols
    vs = v_ptr + row * M + cols
    coef = coef_ptr + b * (COEFS + 3 * M)
    k = tl.load(flags + tl_steps.STEPS * B)
    if MEASURE:
        k += 1
        if phase == tl_steps.STOPPED:
            tl_steps.leave(flags, B, SPLITS)
        go = phase == tl_steps.ACTIVE
    else:
        go = phase != tl_steps.DONE
    if go:
        slot = tl.where(k > 1, (k + M - 2) % M, M)  # none at first
        z, y, g, seen = evaluation(z_ptr, y_ptrs, v_ptrs, mask_ptr, offs, mask, d, D, eps, mix, HAS_MASK, TAIL, INTERP)
        dz, dg = _changes(z, g, next_ptr, vs + slot * stride, mask_ptr, offs, mask, k, HAS_MASK)
        if MEASURE:
            if SPLITS == 1:  # before the sums, whose barriers hold loads up; else registers are dearer
                recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
            part = part_ptr + b * WIDTH * SPLITS + split
            sums = tl_steps.dot2(g, g, seen, seen, INTERP) + tl_steps.dot2(dz, g, dz, dz, INTERP)
            sums = sums + tl_steps.dot2(dz, dg, dg, dg, INTERP)
            for i in tl.static_range(PARTS):
                tl.store(part + i * SPLITS, sums[i])
            for i in range(M):
                known = mask & (cols < tl.where(i == slot, 0, N))  # the oldest update leaves H first
                u = tl.load(us + i * stride, mask=known, other=0.0)
                v = tl.load(vs + i * stride, mask=known, other=0.0)
                with_dg, with_g = tl_steps.dot2(v, dg, v, g, INTERP)
                tl.store(part + (PARTS + i) * SPLITS, tl.sum(product(u, dz), 0))
                tl.store(part + (PARTS + M + i) * SPLITS, with_dg)
                tl.store(part + (PARTS + 2 * M + i) * SPLITS, with_g)
            if tl_steps.last_to_arrive(flags, B, SPLITS):
                if SPLITS > 1:
                    recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
                rr = tl_steps.part_sum(part_ptr, b, 0, SPLITS, WIDTH, BLOCK_S)
                ss = tl_steps.part_sum(part_ptr, b, 1, SPLITS, WIDTH, BLOCK_S)
                go, rel, best, improved, before = judge(
                    recorded, k, stats_ptr, flags_ptr, count_ptr, b, B, limit, relative, rr, ss
                )
                if go:
                    _weigh(part_ptr, coef, numbers_ptr, b, rel <= SAFE * best, SPLITS, WIDTH, M, BLOCK_S)
                if MIX:
                    tl.debug_barrier()  # every warp sees the coefficients that one thread wrote
                    tl_steps.make_way(z_ptr, next_ptr, best_ptr, go, improved, before, offs, mask)
                    z = _mixed(z, y, g, dz, dg, coef, us, vs, slot, k, go, cols, mask, N, stride, M)
                    tl.store(next_ptr + offs, z, mask=mask)
        else:
            go = phase == tl_steps.ACTIVE
            improved = tl.load(flags + tl_steps.IMPROVED * B) != 0
            before = tl.load(flags + tl_steps.BEFORE * B) != 0
            tl_steps.make_way(z_ptr, next_ptr, best_ptr, go, improved, before, offs, mask)
            z = _mixed(z, y, g, dz, dg, coef, us, vs, slot, k, go, cols, mask, N, stride, M)
            tl.store(next_ptr + offs, z, mask=mask)


@triton.jit
def _changes(z, g, prev_ptr, before_ptr, mask_ptr, offs, mask, k, HAS_MASK: tl.constexpr):
    """Returns (dz, dg), zero at first; g_(k-1) is at `before_ptr`."""
    dz = tl.zeros_like(z)
    dg = tl.zeros_like(z)
    if k > 1:
        dz = z - tl.load(prev_ptr + offs, mask=mask, other=0.0)
        if HAS_MASK:
            dz = tl.where(tl.load(mask_ptr + offs, mask=mask, other=0) != 0, dz, 0.0)
        dg = g - tl.load(before_ptr, mask=mask, other=0.0)
    return dz, dg


@triton.jit
def _weigh(
    part_ptr,
    coef,
    numbers_ptr,
    b,
    safe,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Stores the coefficients of a sample's update and of its step; 1 / den is zero where no update is to be made."""
    new = -tl_steps.part_sum(part_ptr, b, 2, SPLITS, WIDTH, BLOCK_S)
    zz = tl_steps.part_sum(part_ptr, b, 3, SPLITS, WIDTH, BLOCK_S)
    den = -tl_steps.part_sum(part_ptr, b, 4, SPLITS, WIDTH, BLOCK_S)
    dd = tl_steps.part_sum(part_ptr, b, 5, SPLITS, WIDTH, BLOCK_S)
    size = tl.sqrt(zz) * tl.sqrt(dd)
    for i in range(M):
        along_u = tl_steps.part_sum(part_ptr, b, PARTS + i, SPLITS, WIDTH, BLOCK_S)
        along_v = tl_steps.part_sum(part_ptr, b, PARTS + M + i, SPLITS, WIDTH, BLOCK_S)
        weight = tl_steps.part_sum(part_ptr, b, PARTS + 2 * M + i, SPLITS, WIDTH, BLOCK_S)
        den += along_u * along_v
        new += along_u * weight
        size += tl.abs(along_u * along_v)
        tl.store(coef + COEFS + i, along_u)
        tl.store(coef + COEFS + M + i, along_v)
        tl.store(coef + COEFS + 2 * M + i, tl.where(safe, weight, 0.0))
    fine = (tl.abs(den) > tl.load(numbers_ptr) * size) & (tl.abs(den) < float("inf"))
    tl.store(coef, tl.where(fine, 1.0 / tl.where(fine, den, 1.0), 0.0))
    tl.store(coef + 1, tl.where(safe & fine, new, 0.0))


@triton.jit
def _mixed(z, y, g, dz, dg, coef, us, vs, slot, k, go, cols, mask, N, stride, M: tl.constexpr):
    """Puts the new update in the place of the oldest, and g_k in that of the next.

    Returns z_(k+1), or z_k of a sample that stops.
    """
    new = tl.zeros_like(z)
    left = tl.zeros_like(z)
    if go:
        z = y
        right = -dg
        left = -dz
        for i in range(M):
            known = mask & (cols < tl.where(i == slot, 0, N))
            u = tl.load(us + i * stride, mask=known, other=0.0)
            left += tl.load(coef + COEFS + i) * tl.load(vs + i * stride, mask=known, other=0.0)
            right += tl.load(coef + COEFS + M + i) * u
            z -= tl.load(coef + COEFS + 2 * M + i) * u
        over = tl.load(coef)
        new = (dz - right) * over
        left = tl.where(over != 0.0, left, 0.0)
        z -= tl.load(coef + 1) * new
    # nothing where the sample has just stopped, so that its rings stay what H is made of; a lone update leaves at once
    made = mask & (cols < tl.where((slot < M) & ((M > 1) | (not go)), N, 0))
    tl.store(us + slot * stride, new, mask=made)
    tl.store(vs + slot * stride, left, mask=made)
    if go:
        tl.store(vs + (k - 1) % M * stride, g, mask=mask)
    return z


class BroydenSteps(Steps):
    """The steps of `tritondeq.solvers.Broyden`, with its options."""

    period = 2
    kernel, apart = _step_kernel, True

    def __init__(self, z: Tensor, mask: Tensor | None, tol: float, limit: int, tail: Tail, *, memory: int, **rules):
        batch, width = z.shape
        self.u, self.v = (z.new_empty(batch, memory, width) for _ in range(2))
        self.coef = z.new_empty(batch, int(COEFS) + 3 * memory)
        numbers, parts = (torch.finfo(z.dtype).eps,), int(PARTS) + 3 * memory
        wide = memory * width >= 2**31
        super().__init__("steps.broyden", z, mask, tol, limit, tail, numbers, parts, memory, WIDE=wide, **rules)

    def reset(self, z: Tensor) -> None:
        """Begins a solve at `z` without any updates."""
        super().reset(z)
        for history in (self.u, self.v, self.coef):
            history.zero_()

    def estimate(self) -> tuple[Tensor, Tensor]:
        return self.u, self.v

    def resume(self, estimate: tuple[Tensor, Tensor]) -> None:
        u, v = estimate
        self.u.copy_(v)
        self.v.copy_(u)


broyden = register("steps.broyden", StepsOp(BroydenSteps, refuses, "one or two launches a step"))
