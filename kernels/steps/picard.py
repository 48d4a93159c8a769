"""A Picard step of any cell in one launch: z+ = z + damping (y - z), y = f(z), and whether a sample goes on.

The launch after evaluation k takes z_k and y = f(z_k), each [B, N], makes z_(k+1) and the squared norms of y - z_k and
y, and applies `rules.py` to every sample: residual, best, window, freeze, count. Samples wider than BLOCK_N are split
over several programs; the last of them sums the parts in a fixed order and judges, so bits do not depend on timing.

The best iterate is not copied while residuals fall: z_(k-2), whose buffer is overwritten, is saved first if it was the
best and z_(k-1) is not. A split sample learns that it has stopped after the launch: f sees z_(k+1) once, then where it
stopped.

Bytes of a launch: 3 B N of the state's dtype (z and y read, z+ written); none for samples that are done.
The reference is the loop with `tritondeq.solvers.Picard`, step by step.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import StepsOp, register
from ..tails import Tail
from . import tl_steps
from .base import Steps, refuses
from .tl_steps import evaluation, judge


@triton.jit(do_not_specialize=["limit"])
def _step_kernel(
    z_ptr,  # [B, N]: z_k
    y_ptrs,  # parts of y, each [B, N], any floating dtype
    v_ptrs,  # gains and weight of the tail, each [D]
    prev_ptr,  # [B, N]: z_(k-1)
    next_ptr,  # [B, N]: z_(k-2), then z_(k+1)
    best_ptr,  # [B, N]
    mask_ptr,  # [B, N] uint8, if HAS_MASK
    numbers_ptr,  # [1]: damping
    stats_ptr,  # [10, B]
    flags_ptr,  # [5, B]
    part_ptr,  # [B, 2, SPLITS]
    count_ptr,  # []
    B,
    N,
    D,
    eps,
    mix,
    limit,
    relative,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    INTERP: tl.constexpr,
):
    b, split, cols, mask, d = tl_steps.part_of_sample(N, D, SPLITS, BLOCK_N, TAIL)
    flags = flags_ptr + b
    phase = tl.load(flags + tl_steps.PHASE * B)
    if phase != tl_steps.DONE:
        offs = b * N + cols
        if phase == tl_steps.STOPPED:
            tl_steps.settle(z_ptr, prev_ptr, next_ptr, best_ptr, flags, B, offs, mask, SPLITS)
        else:
            k = tl.load(flags + tl_steps.STEPS * B) + 1
            if SPLITS == 1:  # before the sums, whose barriers hold loads up; else registers are dearer
                recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
            z, y, g, seen = evaluation(
                z_ptr, y_ptrs, v_ptrs, mask_ptr, offs, mask, d, D, eps, mix, HAS_MASK, TAIL, INTERP
            )
            rr, ss = tl_steps.dot2(g, g, seen, seen, INTERP)
            damping = tl.load(numbers_ptr)
            onward = tl.where(damping == 1.0, y, z + damping * (y - z))
            tl_steps.save_best(next_ptr, best_ptr, flags, B, offs, mask)
            if SPLITS == 1:
                go, rel, best, improved, before = judge(
                    recorded, k, stats_ptr, flags_ptr, count_ptr, b, B, limit, relative, rr, ss
                )
                tl.store(next_ptr + offs, tl.where(go, onward, z), mask=mask)
            else:
                tl.store(next_ptr + offs, onward, mask=mask)
                part = part_ptr + b * 2 * SPLITS + split
                tl.store(part, rr)
                tl.store(part + SPLITS, ss)
                if tl_steps.last_to_arrive(flags, B, SPLITS):
                    if SPLITS > 1:
                        recorded = tl_steps.record(stats_ptr + b, flags, B, k > 0)
                    rr = tl_steps.part_sum(part_ptr, b, 0, SPLITS, 2, BLOCK_S)
                    ss = tl_steps.part_sum(part_ptr, b, 1, SPLITS, 2, BLOCK_S)
                    judge(recorded, k, stats_ptr, flags_ptr, count_ptr, b, B, limit, relative, rr, ss)


class PicardSteps(Steps):
    """The steps of `tritondeq.solvers.Picard`, with its options."""

    period = 3
    kernel = _step_kernel

    def __init__(self, z: Tensor, mask: Tensor | None, tol: float, limit: int, tail: Tail, *, damping: float, **rules):
        super().__init__("steps.picard", z, mask, tol, limit, tail, numbers=(damping,), parts=2, **rules)


picard = register("steps.picard", StepsOp(PicardSteps, refuses, "one launch a step"))
