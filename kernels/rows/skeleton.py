"""The skeleton of every whole-solve kernel: rows z [B, D] that are solved alone, all steps of a solve in one launch.

A program keeps the cell's weights in shared memory and a tile of rows in registers, and iterates each row until it has
stopped. When all but REFILL rows of a tile have, they are stored and their lanes take the next of the program's share
of the batch: cost follows the mean number of steps and not the largest, and no result changes. Bytes per call: inputs
and results of a row once, weights once per program; nothing per step. With SPLIT a program makes the bf16 terms of its
weights itself; otherwise terms.py has made them in a launch.

A cell is two pairs of jitted functions, for the solve and for its adjoint:

    start(inputs, vectors, D, ACT, INTERP) -> carry
        what the cell carries of a row whose z is 0: a tuple of tiles [BLOCK_B, .] and vectors [BLOCK_B]. Inputs are
        tiles of the injection; in the adjoint, of the cotangent and of what the cell saved at the solution.
    step(z, d, go, inputs, vectors, carry, w, D, ACT, INTERP) -> f, carry
        f at z, an increment d (bf16) after its last call; z is the sum of all d to the bit. Where `go` is False, d is
        zero and nothing that f is made of may change.

Delta form: a cell carries acc = W z + u in fp32, and only bf16 increments go through the tensor cores. What rounding
takes from one comes back in the next, so the fixed point is accurate to fp32. Weights are sums of 1 to 3 bf16 terms;
two leave a relative error of 2^-17, 2^-16 at worst.

STREAM, where the terms of a cell's only matrix don't fit together: W0 stays, and carry[0] = u + W0 z + W1 zs with zs
behind z. `lag` is z - zs, and `drift` bounds its norm by the sum of the steps in it. A row pushes its lag through W1,
read from L2, when drift passes LAG / 2 * max(defect, tol * size). An evaluation can only become the best, and so stop
its row, where drift <= LAG * max(defect, tol * size): its residual is then off by LAG * ||W1|| of max(residual, tol) at
most, where ||W1|| is about 2^-9 ||W||, that is 3% at ||W|| = 1.

The best iterate is the last one, unless a row failed: then that row is solved a second time, up to its best. That is
the same to the bit, and costs a solve that succeeds neither time nor registers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .. import bound, devices, launch
from ..dispatch import interpreting
from ..reference import RIDGE
from ..rules import EPS
from ..tl_anderson import anderson_step
from ..tl_common import WINDOW, bf16_pair, constant, row_sums, rules_size, rules_start, rules_status, rules_update
from .terms import bf16_terms
from .tl_rows import choose, copies, load_inputs, load_terms, load_vector, push, split_terms

MEMORY = 4  # most differences that Anderson can store in registers
LAG = constant(16.0)


@triton.jit(do_not_specialize=["B", "max_steps"])
def rows_kernel(
    w_ptrs,  # of each matrix, [TERMS, out, in] bf16, or with SPLIT [out, in] fp32
    v_ptrs,  # of each vector, fp32
    x_ptrs,  # of each input, [B, .] fp32
    z0_ptr,  # [B, D], if HAS_Z0
    d_ptr,  # [programs, BLOCK_B, BLOCK_D], if STREAM
    z_ptr,  # [B, D]
    steps_ptr,  # [B]
    residual_ptr,  # [B]
    status_ptr,  # [B]
    B,
    tol,
    max_steps,
    relative,
    scale,
    damping,
    ridge,
    START: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    MATRICES: tl.constexpr,  # sizes, as in tl_rows.py
    VECTORS: tl.constexpr,
    INPUTS: tl.constexpr,
    TRANSPOSE: tl.constexpr,  # whether dots take W', as solves do, or W
    FROM_CARRY: tl.constexpr,  # whether carry[0] is the result, and not z
    HAS_Z0: tl.constexpr,
    TERMS: tl.constexpr,
    MEMORY: tl.constexpr,
    STREAM: tl.constexpr,
    SPLIT: tl.constexpr,  # whether programs make the terms, each its own
    REFILL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Solves rows pid, pid + programs, ... of the batch, a tile at a time."""
    RESIDENT: tl.constexpr = 1 if STREAM else TERMS
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    d_ptr += pid.to(tl.int64) * BLOCK_B * BLOCK_D
    w = ()
    for i in tl.static_range(len(MATRICES)):
        if SPLIT:
            w = w + (split_terms(w_ptrs[i], MATRICES, i, TERMS, TRANSPOSE, INTERP),)
        else:
            w = w + (load_terms(w_ptrs[i], MATRICES, i, RESIDENT, TRANSPOSE, INTERP),)
    vectors = ()
    for i in tl.static_range(len(VECTORS)):
        vectors = vectors + (load_vector(v_ptrs[i], VECTORS, i),)
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    share = (B - pid + programs - 1) // programs  # rows pid, pid + programs, ...
    taken = 0
    zero = tl.zeros((BLOCK_B,), tl.int32)
    rows = zero
    go = zero > 0  # lanes whose row goes on
    again = go  # lanes whose row starts again, up to its best
    inputs = load_inputs(x_ptrs, rows, go, INPUTS)
    carry = START(inputs, vectors, D, ACT, INTERP)
    z = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    d, near = bf16_pair(z, INTERP)
    none = d
    k = zero
    best = zero  # evaluation of the best z
    limit = zero  # evaluation at which a row stops at the latest
    state = rules_start(tol, scale, BLOCK_B)
    r = tl.zeros((BLOCK_B,), tl.float32)
    s = r
    if STREAM:
        lag = z
        drift = r
    if MEMORY > 0:
        last = z
        dx = copies(none, MEMORY - 1)  # [BLOCK_B, BLOCK_D] each, oldest first; the newest pair is made in the loop
        dg = dx
        gram = copies(r, MEMORY * (MEMORY - 1) // 2)  # of dg, lower triangle

    while (tl.max((go | again).to(tl.int32), 0) > 0) | (taken < share):
        new = ~(go | again)
        number = taken + tl.cumsum(new.to(tl.int32), 0) - 1
        new = new & (number < share)
        taken += tl.sum(new.to(tl.int32), 0)
        begin = new | again
        rows = tl.where(new, pid + number * programs, rows)
        limit = tl.where(again, best, tl.where(new, max_steps, limit))
        fresh = load_inputs(x_ptrs, rows, begin, INPUTS)
        inputs = choose(begin, fresh, inputs)
        carry = choose(begin, START(fresh, vectors, D, ACT, INTERP), carry)
        state = choose(begin, rules_start(tol, scale, BLOCK_B), state)
        z, d = choose(begin, (tl.zeros_like(z), none), (z, d))
        k, best = choose(begin, (zero, zero), (k, best))
        mask = begin[:, None] & (offs_d < D)
        if HAS_Z0:
            rest = tl.load(z0_ptr + rows.to(tl.int64)[:, None] * D + offs_d, mask=mask, other=0.0)
            parts = 0
            while (parts < 3) & (tl.sum(tl.sum((rest != 0.0).to(tl.int32), 1), 0) > 0):
                parts += 1  # three bf16 parts hold all its bits, and a zero needs none
                part, near = bf16_pair(rest, INTERP)
                rest -= near
                z += near
                f, carry = STEP(z, part, begin, inputs, vectors, carry, w, D, ACT, INTERP)
                if STREAM:
                    carry = push(carry, part, d_ptr, w_ptrs[0], MATRICES, TERMS, TRANSPOSE, BLOCK_B, BLOCK_K, INTERP)
        if STREAM:
            lag, drift = choose(begin, (tl.zeros_like(z), tl.zeros_like(r)), (lag, drift))
        if MEMORY > 0:  # gram is left: whatever it has of pairs that are zero, their weights are
            dx = choose(begin, copies(none, MEMORY - 1), dx)
            dg = choose(begin, copies(none, MEMORY - 1), dg)

        held = go | begin
        go = held
        running = tl.sum(go.to(tl.int32), 0)
        idle = tl.where(taken < share, REFILL, 0)
        turn = 0
        while running > idle:
            f, carry = STEP(z, d, go, inputs, vectors, carry, w, D, ACT, INTERP)
            g = f - z
            k += go.to(tl.int32)
            tiles = (g * g, f * f)
            if MEMORY > 0:
                newest, near = bf16_pair(tl.where((k > 1)[:, None], g - last, 0.0), INTERP)
                dx = dx + (d,)
                dg = dg + (newest,)
                for j in tl.static_range(MEMORY):
                    tiles = tiles + (dg[j].to(tl.float32) * g,)
                for j in tl.static_range(MEMORY):
                    tiles = tiles + (dg[j].to(tl.float32) * near,)
            sums = row_sums(tiles, 2 * MEMORY + 2, INTERP)
            r, s = choose(go, (tl.sqrt(sums[0]), tl.sqrt(sums[1])), (r, s))
            exact = go
            if STREAM:
                reach = tl.maximum(r, tol * rules_size(state, s, relative))
                exact = go & (drift <= LAG * reach)
            rel, improved, state = rules_update(state, k, r, s, relative, go, exact)
            best = tl.where(improved, k, best)
            go = go & (state[0] > state[1]) & (k < limit)
            if MEMORY > 0:
                step, dx, dg, gram = anderson_step(g, dx, dg, gram, sums, rel, state[0], damping, ridge, MEMORY)
                last = g
            else:
                step = damping * g
            d, near = bf16_pair(tl.where(go[:, None], step, 0.0), INTERP)
            z += near
            running = tl.sum(go.to(tl.int32), 0)
            turn += 1
            if STREAM:
                lag += near
                drift += tl.where(go, tl.sqrt(tl.sum(step * step, 1)) if MEMORY > 0 else damping * r, 0.0)
                due = go & ~(drift <= 0.5 * LAG * reach)
                if tl.max(due.to(tl.int32), 0) > 0:
                    e, near = bf16_pair(tl.where(due[:, None], lag, 0.0), INTERP)
                    lag -= near
                    drift = tl.where(due, drift * 0.00390625, drift)
                    carry = push(carry, e, d_ptr, w_ptrs[0], MATRICES, TERMS, TRANSPOSE, BLOCK_B, BLOCK_K, INTERP)
            elif turn % WINDOW == 0:
                # memory may have changed, so Triton leaves W in shared memory; without, it spreads W over registers
                tl.debug_barrier()

        done = held & ~go
        first = done & (limit == max_steps)
        offs = rows.to(tl.int64)[:, None] * D + offs_d
        tl.store(z_ptr + offs, carry[0] if FROM_CARRY else z, mask=done[:, None] & (offs_d < D))
        tl.store(steps_ptr + rows, k, mask=first)
        tl.store(residual_ptr + rows, state[0], mask=first)
        tl.store(status_ptr + rows, rules_status(state, r, s, relative, tol), mask=first)
        again = first & (best < k)


@dataclass(frozen=True, eq=False)
class Rows:
    """One direction of a cell: the solve, or its adjoint.

    Attributes:
        op: Name of the op, by which launch parameters are found.
        start, step: Jitted functions.
        transpose: Whether dots take W', or W.
        from_carry: Whether carry[0] is the result, and not z.
    """

    op: str
    start: Any
    step: Any
    transpose: bool = True
    from_carry: bool = False

    def solve(
        self, act, matrices, vectors, inputs, z0=None, *,
        tol, max_steps, relative=1.0, scale=0.0, damping=1.0, memory=0, ridge=1e-8, terms=2,
    ):  # fmt: skip
        """Solves all rows in one launch; D is the width of z, the inputs of the first matrix. Tensors are fp32.

        Args:
            act: ACT of `start` and `step`.
            matrices: Each [out, in].
            vectors: Each [.].
            inputs: Each [B, .].
            z0: Start, [B, D]; zero if None.
            tol: Residual at which a row has converged.
            max_steps: Most evaluations, at least 1.
            relative: 1 where the residual is relative to ||f(z)||, 0 where it is not; see rules.py.
            scale: Least of what it is relative to.
            damping: Factor of the step, in (0, 1].
            memory: 0 for Picard, 1 to 4 for Anderson with as many stored differences.
            ridge: Of Anderson's Gram matrix scaled to a unit diagonal; at least 4e-7 in fp32.
            terms: bf16 terms of each matrix: 1 (its values are bf16), 2 or 3.

        Returns:
            z [B, D] of the lowest residual seen, steps [B] int32, residual [B] of that z, status [B] int32 (rules.py).
        """
        shapes = tuple([tuple(w.shape) for w in matrices])
        batch, width = inputs[0].shape[0], shapes[0][1]
        z = inputs[0].new_empty(batch, width)
        residual = z.new_empty(batch)
        steps, status = z.new_empty(batch, dtype=torch.int32), z.new_empty(batch, dtype=torch.int32)
        if batch == 0:
            return z, steps, residual, status
        device = z.device
        problem = {"batch": batch, "shapes": shapes, "terms": terms, "memory": memory}
        limits = {"shared": devices.shared_memory(device), "chip": devices.chip(device)}
        config = launch.parameters(self.op, device, **problem, **limits)
        programs = config.pop("programs") * devices.multiprocessors(device)
        programs = min(launch.cdiv(batch, config["BLOCK_B"]), programs)
        scratch = z
        if config["STREAM"]:
            dtype = torch.float32 if interpreting() else torch.bfloat16
            scratch = z.new_empty((programs, config["BLOCK_B"], config["BLOCK_D"]), dtype=dtype)
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
        weights = tuple(matrices) if config["SPLIT"] else bf16_terms(tuple(matrices), terms)
        flat = tuple([v.contiguous() for v in vectors]) or (z,)  # an empty tuple may be no argument of a launch
        constants = self._constants(
            *(act, shapes, tuple([w.stride()[-2:] for w in weights]), tuple([len(v) for v in vectors])),
            *(tuple([(x.shape[1], x.stride(0)) for x in inputs]), z0 is not None, terms, memory, tuple(config.items())),
        )
        bound.launch(
            *(rows_kernel, (programs,), device, weights, flat, tuple(inputs), z if z0 is None else z0.contiguous()),
            *(scratch, z, steps, residual, status, batch, tol, max_steps, float(relative), max(scale, EPS)),
            *(damping, max(ridge, RIDGE)),
            constants=constants,
        )
        return z, steps, residual, status

    @lru_cache(1024)  # noqa: B019  the instances are constants of modules
    def _constants(self, act, shapes, strides, vectors, inputs, warm, terms, memory, config) -> bound.Constants:
        """Returns the constants of a launch for these shapes, strides, widths and launch parameters."""
        return bound.Constants(
            rows_kernel,
            START=self.start,
            STEP=self.step,
            D=shapes[0][1],
            ACT=act,
            MATRICES=tuple([(*s, *map(launch.block, s), *at) for s, at in zip(shapes, strides, strict=True)]),
            VECTORS=tuple([(n, launch.block(n)) for n in vectors]),
            INPUTS=tuple([(n, launch.block(n), stride) for n, stride in inputs]),
            TRANSPOSE=self.transpose,
            FROM_CARRY=self.from_carry,
            HAS_Z0=warm,
            TERMS=terms,
            MEMORY=memory,
            INTERP=interpreting(),
            enable_fp_fusion=True,
            **dict(config),
        )


def refuses(op, shapes, dtype, terms, solver_memory, device) -> str | None:
    """Returns why torch must solve a cell with weights of these shapes, in this many terms, or None.

    `solver_memory` is how many differences Anderson stores, 0 for Picard.
    """
    if dtype == torch.float64:
        return "float64 state, and the kernel's is float32"
    if solver_memory > MEMORY:
        return f"Anderson memory {solver_memory}, and the registers hold {MEMORY}"
    if len(shapes) == 1 and not launch.can_stream():
        one, all_terms = (launch.row_bytes(shapes, 16, resident, terms) for resident in (1, terms))
        if one <= devices.shared_memory(device) < all_terms:
            return f"{terms} terms of W, of which Triton 3.4 compiles no kernel that reads them from memory"
    return launch.too_large(op, shapes, terms, solver_memory, device)
