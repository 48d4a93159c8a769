"""Whole solve of the affine cell in one launch.

    z* = act(W z* + u)                          z, u [B, D] rows, W [D, D], D <= 256; act has act(0) = 0
    u* = W' (s u*) + g,  s = act'(pre)          its adjoint, pre = W z* + u; iterated as v = s (v W + g), v = s u

acc = W z + u is carried, so a step is one product with W and one activation. Bytes per call: u and z once (plus pre in
the adjoint), W once per program; nothing per step. skeleton.py has the loop around it.
"""

import torch
import triton
import triton.language as tl

from .. import launch
from ..dispatch import Op, register
from ..formulas import ACTIVATIONS, SLOPES
from ..reference import iterate
from ..tl_common import act, act_slope
from . import skeleton
from .tl_rows import dot


def affine_solve_ref(w, u, z0=None, *, activation, terms=2, **options):
    """Does what `affine_solve` does in torch, in the dtype of `u`; `terms` means nothing here."""

    def f(z):
        return ACTIVATIONS[activation](torch.addmm(u, z, w.T))

    return iterate(f, torch.zeros_like(u) if z0 is None else z0, **options)


def affine_adjoint_ref(w, pre, g, *, activation, terms=2, **options):
    """Does what `affine_adjoint` does in torch, in the dtype of `g`; `terms` means nothing here."""
    slope = SLOPES[activation](pre)

    def f(v):
        return slope * torch.addmm(g, v, w)

    v, *outcome = iterate(f, torch.zeros_like(g), **options)
    return torch.addmm(g, v, w), *outcome


@triton.jit
def _start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    return (inputs[0],)


@triton.jit
def _step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    acc = dot(carry[0], d, w[0])
    return act(acc, ACT, INTERP), (acc,)


@triton.jit
def _adjoint_start(inputs, vectors, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    return inputs[0], act_slope(inputs[1], ACT, INTERP)


@triton.jit
def _adjoint_step(z, d, go, inputs, vectors, carry, w, D: tl.constexpr, ACT: tl.constexpr, INTERP: tl.constexpr):
    acc = dot(carry[0], d, w[0])
    return carry[1] * acc, (acc, carry[1])


SOLVE = skeleton.Rows("rows.affine", _start, _step)
ADJOINT = skeleton.Rows("rows.affine", _adjoint_start, _adjoint_step, transpose=False, from_carry=True)


def affine_solve(w, u, z0=None, *, activation, **options):
    """Solves z* = act(W z* + u) for rows u; returns what `Rows.solve` does.

    Args:
        w: W, [D, D] fp32; row n gives output n.
        u: [B, D] fp32.
        z0: Start, [B, D] fp32; zero if None.
        activation: A name of ACTIVATIONS; gelu is the exact one.
        options: Those of `Rows.solve`.
    """
    return SOLVE.solve(activation, (w,), (), (u,), z0, **options)


def affine_adjoint(w, pre, g, *, activation, **options):
    """Solves u* = W' (act'(pre) u*) + g for rows g [B, D], with the arguments and results of `affine_solve`.

    pre = W z* + u is [B, D]; residuals are those of v = act'(pre) u.
    """
    return ADJOINT.solve(activation, (w,), (), (g, pre), **options)


def refuses(*, features, dtype, activation="tanh", terms=3, solver_memory=0, device=None) -> str | None:
    """Returns why torch must solve this problem, or None; `device` for the size of its shared memory."""
    if features > launch.FEATURES:
        return f"{features} features, and a multiprocessor holds W up to {launch.FEATURES}"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return skeleton.refuses("rows.affine", [(features, features)], dtype, terms, solver_memory, device)


affine = register("rows.affine", Op(affine_solve, affine_adjoint, affine_solve_ref, affine_adjoint_ref, refuses))
