"""Whole solve of the affine cell in one launch.

    z* = act(W z* + u)                          z, u [B, D] rows, W [D, D], D <= 256; act has act(0) = 0
    u* = W' (s u*) + g,  s = act'(pre)          its adjoint, pre = W z* + u; iterated as v = s (v W + g), v = s u

A program owns a tile of rows, keeps W in shared memory and its rows in registers, and iterates until every row of the
tile has stopped. Bytes per call: u and z once (plus pre in the adjoint), W once per program; nothing per step.

Delta form: acc = W z + u is carried in fp32 and only the bf16 increments d of z go through the tensor cores. What
rounding takes from one increment comes back in the next one, so the fixed point is accurate to fp32. W itself is a sum
of 1 to 3 bf16 terms; two leave a relative error of 2^-17 in it, 2^-16 at worst.

STREAM, where the terms don't fit together: W0 stays, and acc = u + W0 z + W1 zs with zs behind z. `lag` is z - zs, and
`drift` bounds its norm by the sum of the steps in it. A row pushes its lag through W1, which is read from L2, when
drift passes LAG / 2 * max(defect, tol * norm). An evaluation can only become the best one, and so stop its row, where
drift <= LAG * max(defect, tol * norm): its residual is then off by at most LAG * ||W1|| of max(residual, tol), where
||W1|| is about 2^-9 ||W||, that is 3% at ||W|| = 1.

The best iterate is the last one, unless a row failed: then its tile is solved a second time, each row up to its best.
That is the same to the bit, for a row depends on no other, and costs a solve that succeeds neither time nor registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .dispatch import Op, interpreting, register
from .rules import SAFEGUARD, Rules
from .tl_anderson import anderson_step
from .tl_common import (
    FLOOR,
    WINDOW,
    act,
    act_slope,
    bf16_pair,
    dot_resident,
    dot_streamed,
    dot_whole,
    load_matrix,
    row_sums,
    rules_start,
    rules_status,
    rules_update,
)

FEATURES = 256  # most of them
MEMORY = 4  # most differences that Anderson can store in registers
RIDGE = 4e-7  # least ridge in fp32: the rounding of a Gram matrix of unit diagonal
LAG = tl.constexpr(16.0)

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "sin": torch.sin,
    "identity": lambda x: x,
}
SLOPES = {
    "tanh": lambda x: 1 - torch.tanh(x) ** 2,
    "relu": lambda x: (x > 0).to(x.dtype),
    "gelu": lambda x: 0.5 + 0.5 * torch.erf(x * 0.5**0.5) + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5,
    "sin": torch.cos,
    "identity": torch.ones_like,
}


def iterate(f, z: Tensor, tol, max_steps, damping, memory, ridge) -> tuple[Tensor, Rules]:
    """The kernel's loop in torch: (kept z, rules) of z = f(z) for rows z [B, D]."""
    rules = Rules(len(z), z.dtype, z.device, tol)
    kept, pairs, step, last = z, [], None, None
    for k in range(1, max_steps + 1):
        image = f(z)
        defect = image - z
        rel, improved = rules.update(k, defect.norm(dim=-1), image.norm(dim=-1))
        kept = torch.where(improved[:, None], z, kept)
        if k == max_steps or not rules.active.any():
            break
        if memory and k > 1:
            pairs = [*pairs, (step, defect - last)][-memory:]
        step, last = damping * defect, defect
        if pairs:
            dx, dg = (torch.stack(side, -1) for side in zip(*pairs, strict=True))
            gamma = _anderson_weights(dg, defect, ridge)
            plain = (rel > SAFEGUARD * rules.best) | ~gamma.isfinite().all(-1)
            gamma = torch.where(plain[:, None], 0.0, gamma)
            step = step - ((dx + damping * dg) @ gamma[..., None])[..., 0]
        step = torch.where(rules.active[:, None], step, 0.0)
        z = z + step
    return kept, rules


def _anderson_weights(dg: Tensor, defect: Tensor, ridge: float) -> Tensor:
    """argmin || defect - dg gamma || for dg [B, D, m], the Gram matrix scaled to a unit diagonal plus ridge."""
    if dg.dtype == torch.float32:
        ridge = max(ridge, RIDGE)
    gram = dg.mT @ dg
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    gram = gram * scale[..., None] * scale[..., None, :]
    gram.diagonal(dim1=-2, dim2=-1).fill_(1 + ridge)
    factor, _ = torch.linalg.cholesky_ex(gram)
    dots = (dg.mT @ defect[..., None]) * scale[..., None]
    return torch.cholesky_solve(dots, factor)[..., 0] * scale


def affine_solve_ref(w, u, z0=None, *, activation, tol, max_steps, damping=1.0, memory=0, ridge=1e-8, terms=2):
    """`affine_solve` in torch, in the dtype of `u`; `terms` means nothing here."""

    def f(z):
        return ACTIVATIONS[activation](torch.addmm(u, z, w.T))

    z0 = torch.zeros_like(u) if z0 is None else z0
    z, rules = iterate(f, z0, tol, max_steps, damping, memory, ridge)
    return z, rules.steps, rules.best, rules.status()


def affine_adjoint_ref(w, pre, g, *, activation, tol, max_steps, damping=1.0, memory=0, ridge=1e-8, terms=2):
    """`affine_adjoint` in torch, in the dtype of `g`; `terms` means nothing here."""
    slope = SLOPES[activation](pre)

    def f(v):
        return slope * torch.addmm(g, v, w)

    v, rules = iterate(f, torch.zeros_like(g), tol, max_steps, damping, memory, ridge)
    return torch.addmm(g, v, w), rules.steps, rules.best, rules.status()


@triton.jit(do_not_specialize=["B", "max_steps"])
def _solve_kernel(
    w_ptr,  # [TERMS, D, D] bf16
    u_ptr,  # [B, D]; g in the adjoint
    pre_ptr,  # [B, D], adjoint only
    z0_ptr,  # [B, D], if HAS_Z0
    d_ptr,  # [programs, BLOCK_B, BLOCK_D], if STREAM
    z_ptr,  # [B, D]; u* in the adjoint
    steps_ptr,  # [B]
    residual_ptr,  # [B]
    status_ptr,  # [B]
    B,
    tol,
    max_steps,
    damping,
    ridge,
    D: tl.constexpr,
    ACT: tl.constexpr,
    ADJ: tl.constexpr,
    HAS_Z0: tl.constexpr,
    TERMS: tl.constexpr,
    MEMORY: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERP: tl.constexpr,
):
    RESIDENT: tl.constexpr = 1 if STREAM else TERMS
    TRANSPOSE: tl.constexpr = not ADJ
    offs_d = tl.arange(0, BLOCK_D)
    d_ptr += tl.program_id(0).to(tl.int64) * BLOCK_B * BLOCK_D
    w = ()
    for t in tl.static_range(RESIDENT):
        w = w + (load_matrix(w_ptr + t * D * D, offs_d, offs_d, D, TRANSPOSE, INTERP),)

    tile = tl.program_id(0)
    limit = tl.zeros((BLOCK_B,), tl.int32) + max_steps  # evaluation at which a row stops at the latest
    replay = 0
    while tile * BLOCK_B < B:
        rows = tile.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_b = rows < B
        offs = rows[:, None] * D + offs_d[None, :]
        mask = mask_b[:, None] & (offs_d[None, :] < D)
        acc = tl.load(u_ptr + offs, mask=mask, other=0.0)
        z = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        if ADJ:
            slope = act_slope(tl.load(pre_ptr + offs, mask=mask, other=0.0), ACT, INTERP)
        if HAS_Z0:
            z = tl.load(z0_ptr + offs, mask=mask, other=0.0)
            acc = dot_whole(acc, z, w, d_ptr, w_ptr, D, TERMS, STREAM, TRANSPOSE, BLOCK_B, BLOCK_D, BLOCK_K, INTERP)
        if STREAM:
            lag = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
            drift = tl.zeros((BLOCK_B,), tl.float32)
        if MEMORY > 0:
            last = z
            d, near = bf16_pair(tl.zeros((BLOCK_B, BLOCK_D), tl.float32), INTERP)
            dx = ()  # [BLOCK_B, BLOCK_D] each, oldest first; the newest pair is made in the loop
            dg = ()
            gram = ()  # of dg, lower triangle
            for _ in tl.static_range(MEMORY - 1):
                dx = dx + (d,)
                dg = dg + (d,)
            for _ in tl.static_range(MEMORY * (MEMORY - 1) // 2):
                gram = gram + (tl.zeros((BLOCK_B,), tl.float32),)
        state = rules_start(tol, BLOCK_B)
        r = tl.zeros((BLOCK_B,), tl.float32)
        s = tl.zeros((BLOCK_B,), tl.float32)
        steps = tl.zeros((BLOCK_B,), tl.int32)
        kept = tl.zeros((BLOCK_B,), tl.int32)  # evaluation of the best z
        active = mask_b
        k = 0
        running = 1
        while running > 0:
            k += 1
            f = slope * acc if ADJ else act(acc, ACT, INTERP)
            g = f - z
            tiles = (g * g, f * f)
            if MEMORY > 0:
                newest, near = bf16_pair(tl.where(k > 1, g - last, 0.0), INTERP)
                dx = dx + (d,)
                dg = dg + (newest,)
                for j in tl.static_range(MEMORY):
                    tiles = tiles + (dg[j].to(tl.float32) * g,)
                for j in tl.static_range(MEMORY):
                    tiles = tiles + (dg[j].to(tl.float32) * near,)
            sums = row_sums(tiles, 2 * MEMORY + 2, INTERP)
            r = tl.sqrt(sums[0])
            s = tl.sqrt(sums[1])
            if STREAM:
                scale = tl.maximum(r, tol * s)
                counts = drift <= LAG * scale
            else:
                counts = mask_b
            rel, improved, state = rules_update(state, k, r, s, counts, FLOOR)
            steps += active.to(tl.int32)
            kept = tl.where(improved, k, kept)
            active = mask_b & (state[0] > state[1])
            go = active & (k < limit)
            if MEMORY > 0:
                step, dx, dg, gram = anderson_step(g, dx, dg, gram, sums, rel, state[0], damping, ridge, MEMORY)
                last = g
            else:
                step = damping * g
            d, near = bf16_pair(tl.where(go[:, None], step, 0.0), INTERP)
            z += near
            acc = dot_resident(acc, d, w, RESIDENT)
            running = tl.max(go.to(tl.int32), 0)
            if STREAM:
                lag += near
                drift += tl.where(go, tl.sqrt(tl.sum(step * step, 1)) if MEMORY > 0 else damping * r, 0.0)
                due = go & ~(drift <= 0.5 * LAG * scale)
                if tl.max(due.to(tl.int32), 0) > 0:
                    e, near = bf16_pair(tl.where(due[:, None], lag, 0.0), INTERP)
                    lag -= near
                    drift = tl.where(due, drift * 0.00390625, drift)
                    acc = dot_streamed(acc, e, d_ptr, w_ptr, D, TERMS, TRANSPOSE, BLOCK_B, BLOCK_D, BLOCK_K, INTERP)
            elif k % WINDOW == 0:
                # memory may have changed, so Triton leaves W in shared memory; without, it spreads W over registers
                tl.debug_barrier()

        tl.store(z_ptr + offs, acc if ADJ else z, mask=mask)
        once = rows < tl.where(replay == 0, B, 0)
        tl.store(steps_ptr + rows, steps, mask=once)
        tl.store(residual_ptr + rows, state[0], mask=once)
        tl.store(status_ptr + rows, rules_status(state, r, s, tol), mask=once)
        if tl.max((once & (kept < steps)).to(tl.int32), 0) > 0:
            # the best z of some row is gone: once more
            limit = kept
            replay = 1
        else:
            limit = tl.zeros((BLOCK_B,), tl.int32) + max_steps
            replay = 0
            tile += tl.num_programs(0)


def bf16_terms(w: Tensor, terms: int) -> Tensor:
    """[terms, D, D] in bf16 whose sum is w up to 2^(-8 * terms)."""
    parts = w.new_empty((terms, *w.shape), dtype=torch.bfloat16)
    parts[0] = w
    for t in range(1, terms):
        w = w - parts[t - 1]
        parts[t] = w
    return parts


def _launch(w, u, pre, z0, activation, tol, max_steps, damping, memory, ridge, terms):
    batch, features = u.shape
    u, pre, z0 = (t if t is None else t.contiguous() for t in (u, pre, z0))
    z, residual = torch.empty_like(u), u.new_empty(batch)
    steps, status = (u.new_empty(batch, dtype=torch.int32) for _ in range(2))
    if batch == 0:
        return z, steps, residual, status
    shared = launch.shared_memory(u.device)
    config = launch.parameters("affine", batch=batch, features=features, terms=terms, memory=memory, shared=shared)
    programs = config.pop("programs") * launch.multiprocessors(u.device)
    programs = min(triton.cdiv(batch, config["BLOCK_B"]), programs)
    scratch = u
    if config["STREAM"]:
        dtype = torch.float32 if interpreting() else torch.bfloat16
        scratch = u.new_empty((programs, config["BLOCK_B"], config["BLOCK_D"]), dtype=dtype)
    tensors = (bf16_terms(w, terms), u, u if pre is None else pre, u if z0 is None else z0, scratch)
    config |= {"D": features, "ACT": activation, "ADJ": pre is not None, "HAS_Z0": z0 is not None}
    config |= {"TERMS": terms, "MEMORY": memory, "INTERP": interpreting()}
    numbers = (batch, tol, max_steps, damping, max(ridge, RIDGE))
    with launch.on(u.device):
        _solve_kernel[(programs,)](*tensors, z, steps, residual, status, *numbers, enable_fp_fusion=True, **config)
    return z, steps, residual, status


def affine_solve(w, u, z0=None, *, activation, tol, max_steps, damping=1.0, memory=0, ridge=1e-8, terms=2):
    """z* = act(W z* + u) for rows u.

    Args:
        w: W, [D, D] fp32; row n gives output n.
        u: [B, D] fp32.
        z0: Start, [B, D] fp32; zero if None.
        activation: "tanh", "relu", "gelu" (exact), "sin" or "identity".
        tol: Relative residual at which a row has converged.
        max_steps: Most evaluations, at least 1.
        damping: Factor of the step, in (0, 1].
        memory: 0 for Picard, 1 to 4 for Anderson with as many stored differences.
        ridge: Of Anderson's Gram matrix scaled to a unit diagonal; at least 4e-7 in fp32.
        terms: bf16 terms of W: 1 (W is bf16), 2 or 3.
    Returns:
        z [B, D] with the lowest residual seen, steps [B] int32, residual [B] of that z, status [B] int32 (rules.py).
    """
    return _launch(w, u, None, z0, activation, tol, max_steps, damping, memory, ridge, terms)


def affine_adjoint(w, pre, g, *, activation, tol, max_steps, damping=1.0, memory=0, ridge=1e-8, terms=2):
    """u* = W' (act'(pre) u*) + g for rows g; residuals are those of v = act'(pre) u.

    Args:
        w: As in `affine_solve`, and so are the options.
        pre: W z* + u, [B, D] fp32.
        g: [B, D] fp32.
    Returns:
        u* [B, D], steps, residual and status as `affine_solve`'s.
    """
    return _launch(w, g, pre, None, activation, tol, max_steps, damping, memory, ridge, terms)


def refuses(*, features, dtype, activation="tanh", solver_memory=0, device=None) -> str | None:
    """Why torch must solve this problem, or None; `device` for the size of its shared memory."""
    if features > FEATURES:
        return f"{features} features, and a multiprocessor holds W up to {FEATURES}"
    if dtype == torch.float64:
        return "float64 state, and the kernel's is float32"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if solver_memory > MEMORY:
        return f"Anderson memory {solver_memory}, and the registers hold {MEMORY}"
    shared = launch.shared_memory(device)
    if not launch.parameters("affine", batch=1, features=features, terms=3, memory=solver_memory, shared=shared):
        return f"W of {features} features does not fit in {shared} bytes of shared memory"
    return None


affine = register("affine", Op(affine_solve, affine_adjoint, affine_solve_ref, affine_adjoint_ref, refuses))
