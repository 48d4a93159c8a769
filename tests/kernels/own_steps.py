"""The affine cell's own steps, driven to the end as its ops are: what their tests share."""

import torch

from tritondeq import Picard
from tritondeq.kernels.steps import affine as op
from tritondeq.loop import Settings, drive

TILES = {"small": (16, 32, 32, 2), "split": (64, 64, 64, 2)}  # the latter's epilogue takes two halves


def run(steps, max_steps, trace=None):
    """The loop's result, as affine.py's ops return it."""
    settings = Settings(Picard(), steps.tol, max_steps, None, None)
    value, solution = drive(steps, settings, trace=trace is not None)
    if trace is not None:
        trace.append(solution.trace)
    return value, solution.steps, solution.residual, solution.status


def solve(w, u, z0=None, trace=None, **settings):
    z0 = torch.zeros_like(u) if z0 is None else z0
    return run(op.affine_steps_solve(w, u, z0, **settings), settings["max_steps"], trace)


def adjoint(w, pre, g, **settings):
    return run(op.affine_steps_adjoint(w, pre, g, **settings), settings["max_steps"])
