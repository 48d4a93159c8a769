"""Whole solve of the MLP cell in one launch.

    post   z* = n * rms(y),  y = z* + u + W2 h + b2,  h = act(W1 (z* + u) + b1)       z, u [B, D] rows, n, a [D]
    pre    z* = a * z* + u + W2 h + b2,               h = act(W1 rms(z*) + b1)        W1, W3 [H, D], W2 [D, H]

and h = act(W3 . + b3) * (W1 . + b1) where there is a gate W3 (Shazeer 2020). The adjoint u* = J' u* + g goes backwards
through one of them, linearised: with s = act' and p the derivative of rms,

    post   J' u = dy + W1' (s * (W2' dy)),  dy = p' (n * u)
    pre    J' u = a * u + p' W1' (s * (W2' u))

`feed` (tl_rows.py) pushes the increments of h, and of all else that is no increment of z, through the tensor cores, so
that all products are accurate to fp32. Bytes per call: inputs and z once, weights once per program; nothing per step.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import Op, register
from ..formulas import RMS_EPS, mlp, rms_pull
from ..reference import iterate
from ..tl_common import act, constant, product
from . import skeleton
from .tl_rows import dot, feed

EPS = constant(RMS_EPS)
ACTS = ("relu", "gelu", "silu", "fast_gelu", "fast_silu")


def mlp_solve_ref(weights, biases, scale, u, z0=None, /, *, form, activation, terms=2, **options):
    """Does what `mlp_solve` does in torch, in the dtype of `u`; `terms` means nothing here."""
    z = torch.zeros_like(u) if z0 is None else z0
    return iterate(lambda z: mlp(form, activation, weights, biases, scale, u, z), z, **options)


def mlp_adjoint_ref(weights, scale, saved, g, /, *, form, activation, terms=2, **options):
    """Does what `mlp_adjoint` does in torch, in the dtype of `g`; `terms` means nothing here."""
    up, down, *gate = weights
    at, *slopes = saved

    def into(t):
        return sum((s * (t @ down)) @ w for s, w in zip(slopes, (up, *gate), strict=True))

    def f(u):
        if form == "post":
            dy = rms_pull(at, scale * u)
            return g + dy + into(dy)
        return g + scale * u + rms_pull(at, into(u))

    return iterate(f, torch.zeros_like(g), **options)


@triton.jit
def _rms(x, D: tl.constexpr):
    return tl.rsqrt(tl.sum(product(x, x), 1) / D + EPS)[:, None]


@triton.jit
def _rms_pull(t, unit, scale, D: tl.constexpr):
    """Returns p' t where rms(x) is `unit` = x * `scale`."""
    return scale * (t - unit * (tl.sum(product(t, unit), 1) / D)[:, None])


@triton.jit
def _activate(up, gate, GATED: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    return act(gate, ACT, INTERP) * up if GATED else act(up, ACT, INTERP)


@triton.jit
def _post_start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    return inputs[0], tl.zeros_like(inputs[1]), inputs[1], inputs[len(inputs) - 1]


@triton.jit
def _post_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    out, pushed, up, gate = carry  # u + W2 h, the h in it, W1 (z + u), W3 (z + u)
    up = dot(up, d, w[0])
    if len(w) == 3:
        gate = dot(gate, d, w[2])
    h = _activate(up, gate, len(w) == 3, ACT, INTERP)
    out, pushed = feed(out, h, pushed, go, w[1], INTERP)
    y = z + out
    return y * _rms(y, D) * vectors[0][None, :], (out, pushed, up, gate)


@triton.jit
def _pre_start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    zero = tl.zeros((inputs[0].shape[0], vectors[1].shape[0]), tl.float32)
    up, gate = zero + vectors[1][None, :], zero + vectors[len(vectors) - 1][None, :]
    return inputs[0], zero, up, gate, tl.zeros_like(inputs[0])


@triton.jit
def _pre_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    out, pushed, up, gate, norm = carry  # u + W2 h, the h in it, W1 n + b, W3 n + b, the n in them
    n = z * _rms(z, D)
    up, seen = feed(up, n, norm, go, w[0], INTERP)
    if len(w) == 3:
        gate, seen = feed(gate, n, norm, go, w[2], INTERP)
    h = _activate(up, gate, len(w) == 3, ACT, INTERP)
    out, pushed = feed(out, h, pushed, go, w[1], INTERP)
    return vectors[0][None, :] * z + out, (out, pushed, up, gate, seen)


@triton.jit
def _adjoint_start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    scale = _rms(inputs[1], D)
    zero = tl.zeros_like(inputs[2])
    none = tl.zeros_like(inputs[0])
    return none, none, zero, zero, zero, inputs[1] * scale, tl.sum(scale, 1)


@triton.jit
def _back(t, seen, acc, into, up, gate, go, inputs, w, INTERP: tl.constexpr):
    """Continues into = W1' (s W2' t): `seen` is the t in acc = W2' t, `up` and `gate` are what is in `into`."""
    acc, seen = feed(acc, t, seen, go, w[1], INTERP)
    into, up = feed(into, inputs[2] * acc, up, go, w[0], INTERP)
    if len(w) == 3:
        into, gate = feed(into, inputs[3] * acc, gate, go, w[2], INTERP)
    return seen, acc, into, up, gate


@triton.jit
def _post_adjoint_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    into, seen, acc, up, gate, unit, scale = carry
    dy = _rms_pull(z * vectors[0][None, :], unit, scale[:, None], D)
    seen, acc, into, up, gate = _back(dy, seen, acc, into, up, gate, go, inputs, w, INTERP)
    return inputs[0] + dy + into, (into, seen, acc, up, gate, unit, scale)


@triton.jit
def _pre_adjoint_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    into, seen, acc, up, gate, unit, scale = carry
    seen, acc, into, up, gate = _back(z, seen, acc, into, up, gate, go, inputs, w, INTERP)
    f = inputs[0] + vectors[0][None, :] * z + _rms_pull(into, unit, scale[:, None], D)
    return f, (into, seen, acc, up, gate, unit, scale)


STEPS = {"post": (_post_start, _post_step), "pre": (_pre_start, _pre_step)}
SOLVE = {form: skeleton.Rows("rows.mlp", *steps) for form, steps in STEPS.items()}
BACK = {"post": _post_adjoint_step, "pre": _pre_adjoint_step}
ADJOINT = {form: skeleton.Rows("rows.mlp", _adjoint_start, step, transpose=False) for form, step in BACK.items()}


def mlp_solve(weights, biases, scale, u, z0=None, /, *, form, activation, **options):
    """Solves for z* given rows u; returns what `Rows.solve` does.

    Args:
        weights: W1 [H, D] and W2 [D, H], and W3 [H, D] if there is a gate; fp32.
        biases: Theirs.
        scale: n, or a where `form` is "pre", [D].
        u: [B, D] fp32.
        z0: Start, [B, D] fp32; zero if None.
        form: "post" or "pre".
        activation: "relu", "gelu" (exact) or "silu".
        options: Those of `Rows.solve`.
    """
    into = [(w, b) for i, (w, b) in enumerate(zip(weights, biases, strict=True)) if i != 1]
    inputs, vectors = (u + biases[1],), (scale,)
    if form == "post":
        inputs += tuple(torch.addmm(b, u, w.mT) for w, b in into)
    else:
        vectors += tuple(b for _, b in into)
    return SOLVE[form].solve(activation, weights, vectors, inputs, z0, **options)


def mlp_adjoint(weights, scale, saved, g, /, *, form, activation, **options):
    """Solves u* = J' u* + g for rows g [B, D], with the arguments and results of `mlp_solve`.

    `saved` is what rms is taken of, y or z* [B, D], then `formulas.hidden_slopes` at the solution, each [B, H].
    """
    return ADJOINT[form].solve(activation, weights, (scale,), (g, *saved), **options)


def refuses(*, shapes, dtype, terms, activation="gelu", solver_memory=0, device=None) -> str | None:
    """Returns why torch must solve this problem, or None; `shapes` of all weights, `device` for its shared memory."""
    if activation not in ACTS:
        return f"activation {activation!r} is not one of {', '.join(ACTS)}"
    return skeleton.refuses("rows.mlp", shapes, dtype, terms, solver_memory, device)


op = register("rows.mlp", Op(mlp_solve, mlp_adjoint, mlp_solve_ref, mlp_adjoint_ref, refuses))
