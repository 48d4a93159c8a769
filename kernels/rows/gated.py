"""Whole solve of the gated cell in one launch.

    r = sigmoid(Wr z + ur),  s = (1 + sigmoid(Ws z + us)) / 2,  c = tanh(Wc (r z) + uc)
    z* = (1 - s) z* + s c                               z, ur, us, uc [B, D] rows, Wr, Ws, Wc [D, D]

a gated recurrent unit (Cho et al. 2014) that is run to its equilibrium. Its adjoint u* = J' u* + g is, linearised,

    J' u = (1 - s) u + r q + Wr' (kr q) + Ws' (ks u),  q = Wc' (kc u)
    ks = (c - z*) (2 s - 1) (1 - s),  kc = s (1 - c^2),  kr = z* r (1 - r)

`feed` (tl_rows.py) pushes the increments of r z, and of the products of the adjoint, through the tensor cores. Bytes
per call: inputs and z once, weights once per program; nothing per step.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import Op, register
from ..formulas import gru
from ..reference import iterate
from ..tl_common import act, fast_sigmoid
from . import skeleton
from .tl_rows import dot, feed


def gated_solve_ref(weights, inputs, z0=None, *, activation="tanh", terms=2, **options):
    """Does what `gated_solve` does in torch, in the dtype of the inputs; `terms` and `activation` mean nothing here."""

    def f(z):
        _, s, c = gru(weights, inputs, z)
        return z + s * (c - z)

    return iterate(f, torch.zeros_like(inputs[0]) if z0 is None else z0, **options)


def gated_adjoint_ref(weights, saved, g, *, activation="tanh", terms=2, **options):
    """Does what `gated_adjoint` does in torch, in the dtype of `g`; `terms` and `activation` mean nothing here."""
    wr, ws, wc = weights
    stay, r, ks, kc, kr = saved

    def f(u):
        q = (kc * u) @ wc
        return g + stay * u + r * q + (kr * q) @ wr + (ks * u) @ ws

    return iterate(f, torch.zeros_like(g), **options)


@triton.jit
def _start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    return inputs[0], inputs[1], inputs[2], tl.zeros_like(inputs[0])


@triton.jit
def _gate(x, ACT: tl.constexpr, INTERP: tl.constexpr):
    return fast_sigmoid(x, INTERP) if ACT == "fast_tanh" else tl.sigmoid(x)


@triton.jit
def _step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    r, s, c, pushed = carry  # before their activations; the r z in c
    r = dot(r, d, w[0])
    s = dot(s, d, w[1])
    c, pushed = feed(c, _gate(r, ACT, INTERP) * z, pushed, go, w[2], INTERP)
    return z + (0.5 + 0.5 * _gate(s, ACT, INTERP)) * (act(c, ACT, INTERP) - z), (r, s, c, pushed)


@triton.jit
def _adjoint_start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    none = tl.zeros_like(inputs[0])
    return inputs[0], none, none, none, none


@triton.jit
def _adjoint_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    out, q, by_r, by_s, by_c = carry  # g + Wr' (kr q) + Ws' (ks u), q, and what has been pushed into them
    g, stay, r, ks, kc, kr = inputs
    q, by_c = feed(q, kc * z, by_c, go, w[2], INTERP)
    out, by_s = feed(out, ks * z, by_s, go, w[1], INTERP)
    out, by_r = feed(out, kr * q, by_r, go, w[0], INTERP)
    return stay * z + r * q + out, (out, q, by_r, by_s, by_c)


SOLVE = skeleton.Rows("rows.gated", _start, _step)
ADJOINT = skeleton.Rows("rows.gated", _adjoint_start, _adjoint_step, transpose=False)


def gated_solve(weights, inputs, z0=None, *, activation="tanh", **options):
    """Solves z* = (1 - s) z* + s c for rows of `inputs`; returns what `Rows.solve` does.

    Args:
        weights: Wr, Ws and Wc, each [D, D] fp32.
        inputs: ur, us and uc, each [B, D] fp32.
        z0: Start, [B, D] fp32; zero if None.
        activation: "tanh", or "fast_tanh": the hardware's, for the sigmoids too.
        options: Those of `Rows.solve`.
    """
    return SOLVE.solve(activation, weights, (), inputs, z0, **options)


def gated_adjoint(weights, saved, g, *, activation="tanh", **options):
    """Solves u* = J' u* + g for rows g [B, D], with the arguments and results of `gated_solve`.

    `saved` is `formulas.gru_slopes` at the solution, each [B, D].
    """
    return ADJOINT.solve(activation, weights, (), (g, *saved), **options)


def refuses(*, shapes, dtype, terms, solver_memory=0, device=None) -> str | None:
    """Returns why torch must solve this problem, or None; `shapes` of all weights, `device` for its shared memory."""
    return skeleton.refuses("rows.gated", shapes, dtype, terms, solver_memory, device)


gated = register("rows.gated", Op(gated_solve, gated_adjoint, gated_solve_ref, gated_adjoint_ref, refuses))
