"""An Anderson step of any cell in one or two launches; `tritondeq.solvers.Anderson` has the equation, the reference.

After evaluation k a launch to MEASURE makes g = y - z_k, and into the rings dG = g_k - g_(k-1) and
dH = z_k - z_(k-1) + damping dG; one new row of the Gram matrix, <dG_i, dG>, and <dG_i, g>; the rules, as in picard.py;
and each sample's small system, in registers. One to MIX makes z_(k+1) = z_k + damping g - sum_i gamma_i dH_i. They are
one launch, but for samples wider than BLOCK_N, in float64, and for more differences than `launch.one_launch` allows,
where registers would spill. Several programs share a wide sample; the last of them sums the parts, in one order always,
and does what is done once a sample.

The steps hold 2 m + 3 states: z_k, z_(k-1), the best iterate and the rings. g_k waits in dG where the next difference
goes; with `half` it has a separate state, and dG takes m / 2.

Bytes of a step, in states B N of the dtype, memory m: (2m + 2) read and 4 written, and what has just been written of dH
read again; in two launches (m + 3) read and 3 written, then (m + 2) read and 1 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import StepsOp, interpreting, register
from ..rules import SAFEGUARD
from ..tails import Tail
from ..tl_anderson import anderson_weights
from ..tl_common import bf16_pair, constant
from . import base, tl_steps
from .tl_steps import evaluation, judge

MEMORY = 8  # most differences: their small system lies in registers
SAFE = constant(SAFEGUARD)


@triton.jit(do_not_specialize=["limit"])
def _step_kernel(
    z_ptr,  # [B, N]: z_k
    y_ptrs,  # parts of y, each [B, N], any floating dtype
    v_ptrs,  # gains and weight of the tail, each [D]
    next_ptr,  # [B, N]: z_(k-1), then z_(k+1) if MIX
    best_ptr,  # [B, N]
    mask_ptr,  # [B, N] uint8, if HAS_MASK
    g_ptr,  # [B, N]: g_(k-1), then g_k, if HALF; else both are in dG
    dg_ptr,  # [B, M, N], or bf16 if HALF
    dh_ptr,  # [B, M, N]
    gram_ptr,  # [B, M, M]: <dG_i, dG_j>
    gamma_ptr,  # [B, M]: mixing weights, unless one launch does both
    numbers_ptr,  # [2]: damping, ridge
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    part_ptr,  # [B, 2 + 2 M, SPLITS]
    count_ptr,  # []
    B,
    N,
    D,
    eps,
    mix,
    limit,
    relative,
    M: tl.constexpr,
    HALF: tl.constexpr,
    MEASURE: tl.constexpr,
    MIX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    INTERP: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 + 2 * M
    stride = tl_steps.wide(N)
    b, split, cols, mask, d = tl_steps.part_of_sample(N, D, SPLITS, BLOCK_N, TAIL)
    flags = flags_ptr + b
    phase = tl.load(flags + tl_steps.PHASE * B)
    row = b * N
    offs = row + cols
    dhs = dh_ptr + row * M + cols
    damping = tl.load(numbers_ptr)
    if not MEASURE:
        if phase != tl_steps.DONE:
            onward = tl.load(z_ptr + offs, mask=mask, other=0.0)
            improved = tl.load(flags + tl_steps.IMPROVED * B) != 0
            before = tl.load(flags + tl_steps.BEFORE * B) != 0
            tl_steps.make_way(z_ptr, next_ptr, best_ptr, phase == tl_steps.ACTIVE, improved, before, offs, mask)
            if phase == tl_steps.ACTIVE:
                y = tl_steps.image(y_ptrs, v_ptrs, offs, mask, d, onward, D, eps, mix, TAIL, INTERP)
                onward = tl.where(damping == 1.0, y, onward + damping * (y - onward))
                gamma = ()
                for i in tl.static_range(M):
                    gamma = gamma + (tl.load(gamma_ptr + b * M + i),)
                onward = _mixed(onward, gamma, dhs, mask, stride, M)
            tl.store(next_ptr + offs, onward, mask=mask)
    elif phase == tl_steps.STOPPED:
        tl_steps.leave(flags, B, SPLITS)
    elif phase != tl_steps.DONE:
        dgs = dg_ptr + row * M + cols
        k = tl.load(flags + tl_steps.STEPS * B) + 1
        if SPLITS == 1:  # before the sums, whose barriers hold loads up; else registers are dearer
            recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
        slot = (k + M - 2) % M
        z, y, g, seen = evaluation(z_ptr, y_ptrs, v_ptrs, mask_ptr, offs, mask, d, D, eps, mix, HAS_MASK, TAIL, INTERP)
        dg = tl.zeros_like(g)
        onward = tl.where(damping == 1.0, y, z + damping * (y - z))
        if k > 1:
            dg = g - tl.load(g_ptr + offs if HALF else dgs + slot * stride, mask=mask, other=0.0)
            dh = z - tl.load(next_ptr + offs, mask=mask, other=0.0) + damping * dg
            tl.store(dhs + slot * stride, dh, mask=mask)
            if HALF:
                dg_half, near = bf16_pair(dg.to(tl.float32), INTERP)
                tl.store(dgs + slot * stride, dg_half, mask=mask)
                dg = near.to(g.dtype)
            elif M > 1:
                tl.store(dgs + slot * stride, dg, mask=mask)
        if HALF:
            tl.store(g_ptr + offs, g, mask=mask)
        part = part_ptr + b * WIDTH * SPLITS + split
        sums = tl_steps.dot2(g, g, seen, seen, INTERP)
        if not MIX:
            tl.store(part, sums[0])
            tl.store(part + SPLITS, sums[1])
        for i in tl.static_range(M):
            old = tl.load(dgs + i * stride, mask=mask & (cols < tl.where(i == slot, 0, N)), other=0.0)
            old = tl.where(i == slot, dg, old.to(g.dtype))
            more = tl_steps.dot2(old, g, old, dg, INTERP)
            if MIX:
                sums = sums + more
            else:
                tl.store(part + (2 + 2 * i) * SPLITS, more[0])
                tl.store(part + (3 + 2 * i) * SPLITS, more[1])
        if not HALF:  # where the oldest difference has been read for the last time
            tl.store(dgs + (k - 1) % M * stride, g, mask=mask)
        if tl_steps.last_to_arrive(flags, B, SPLITS):
            if SPLITS > 1:
                recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
            total = sums if MIX else tl_steps.part_sums(part_ptr, b, SPLITS, WIDTH, BLOCK_S)
            go, rel, best, improved, before = judge(
                recorded, k, stats_ptr, flags_ptr, count_ptr, b, B, limit, relative, total[0], total[1]
            )
            gamma = _weigh(total, gram_ptr, numbers_ptr, b, slot, rel, best, M)
            if MIX:
                tl_steps.make_way(z_ptr, next_ptr, best_ptr, go, improved, before, offs, mask)
                if go:  # a barrier lies between the store of dH and its loads, which other threads may do
                    onward = _mixed(onward, gamma, dhs, mask, stride, M)
                else:
                    onward = tl.load(z_ptr + offs, mask=mask, other=0.0)
                tl.store(next_ptr + offs, onward, mask=mask)
            else:
                for i in tl.static_range(M):
                    tl.store(gamma_ptr + b * M + i, gamma[i])


@triton.jit
def _weigh(sums, gram_ptr, numbers_ptr, b, slot, rel, best, M: tl.constexpr):
    """Stores the new row of a sample's Gram matrix; returns its mixing weights."""
    one = tl.arange(0, 1)  # the helpers want vectors
    at = slot + one
    gram_ptr += b * M * M + one
    dots = ()
    new = ()
    for i in tl.static_range(M):
        dots = dots + (sums[2 + 2 * i] + one * 0.0,)
        new = new + (sums[3 + 2 * i] + one * 0.0,)
    gram = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1):
            # what one thread is about to overwrite is not read
            old = tl.load(gram_ptr + i * M + j, mask=(at != i) & (at != j), other=0.0)
            gram = gram + (tl.where(slot == i, new[j], tl.where(slot == j, new[i], old)),)
    for i in tl.static_range(M):  # of the lower triangle, the one that is read
        tl.store(gram_ptr + tl.where(slot > i, slot * M + i, i * M + slot), new[i])
    plain = ~(rel + one * 0.0 <= SAFE * best)
    weights = anderson_weights(gram, dots, plain, tl.load(numbers_ptr + 1), M)
    gamma = ()
    for i in tl.static_range(M):
        gamma = gamma + (tl.sum(weights[i], 0),)
    return gamma


@triton.jit
def _mixed(z, gamma, dhs, mask, stride, M: tl.constexpr):
    """Returns z_(k+1), from where the plain step leads."""
    for i in tl.static_range(M):
        z -= gamma[i] * tl.load(dhs + i * stride, mask=mask, other=0.0)
    return z


class AndersonSteps(base.Steps):
    """The steps of `tritondeq.solvers.Anderson`, with its options."""

    period = 2
    kernel, apart = _step_kernel, True

    def __init__(
        self, z: Tensor, mask: Tensor | None, tol: float, limit: int, tail: Tail, *,
        memory, damping, ridge, half, **rules,
    ):  # fmt: skip
        numbers = damping, max(ridge, 4 * torch.finfo(z.dtype).eps)
        batch, width = z.shape
        self.dh = z.new_empty(batch, memory, width)
        # the interpreter has no bf16: there a rounded value is held in the dtype of the state
        self.dg = self.dh.new_empty(self.dh.shape, dtype=torch.bfloat16 if half and not interpreting() else z.dtype)
        self.g = z.new_empty(z.shape) if half else self.dg
        self.gram, self.gamma = z.new_empty(batch, memory, memory), z.new_empty(batch, memory)
        super().__init__(
            "steps.anderson", z, mask, tol, limit, tail, numbers, 2 + 2 * memory, memory, HALF=half, **rules
        )

    def reset(self, z: Tensor) -> None:
        """Begins a solve at `z` without a history."""
        super().reset(z)
        for history in (self.dg, self.dh, self.gram, self.gamma):
            history.zero_()


def refuses(*, memory: int, **problem) -> str | None:
    """Returns why torch must take these steps, or None."""
    if memory > MEMORY:
        return f"Anderson memory {memory}, and the registers hold a system of {MEMORY}"
    return base.refuses(memory=memory, **problem)


anderson = register("steps.anderson", StepsOp(AndersonSteps, refuses, "one or two launches a step"))
