"""The affine cell's ways through Triton, a whole solve in one launch or one launch a step, behind one signature."""

import pytest
import torch

from tritondeq import Picard
from tritondeq.kernels import launch
from tritondeq.kernels.rows import affine as rows
from tritondeq.kernels.rows.terms import bf16_terms_ref
from tritondeq.kernels.steps import affine as steps
from tritondeq.loop import Settings, drive

TILES = {"small": (16, 32, 32, 2), "split": (64, 64, 64, 2)}  # the latter's epilogue takes two halves
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def counted_products(monkeypatch):
    """Returns a list that gets an element for each product of Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: products.append(1) or dot(*args))
    return products


def run(made, max_steps, trace=None):
    """Drives steps to their end; returns what the whole solve does."""
    outcome = drive(made, Settings(Picard(), made.known["tol"], max_steps, trace=trace is not None))
    if trace is not None:
        trace.append(outcome.trace)
    return outcome.value, outcome.steps, outcome.residual, outcome.status


class Steps:
    """One launch a step, in the smallest tile."""

    features = 40

    @staticmethod
    def solve(w, u, z0=None, trace=None, **settings):
        z0 = torch.zeros_like(u) if z0 is None else z0
        return run(steps.affine_steps_solve(w, u, z0, **settings), settings["max_steps"], trace)

    @staticmethod
    def adjoint(w, pre, g, **settings):
        return run(steps.affine_steps_adjoint(w, pre, g, **settings), settings["max_steps"])


class Whole:
    """A whole solve in one launch."""

    features = 24
    solve = staticmethod(rows.affine_solve)
    adjoint = staticmethod(rows.affine_adjoint)


class Streamed(Whole):
    """A whole solve that reads W's second term from memory at times."""

    features = 256


WAYS = {"whole": Whole, "streamed": Streamed, "steps": Steps}


def choose_tile(monkeypatch, name):
    """Makes all steps take this tile; the interpreter takes the same time for each."""
    monkeypatch.setattr(launch, "TILES", {terms: (TILES[name],) * 3 for terms in (1, 2, 3)})


def problem(batch, features, device, norm=0.6, terms=2):
    """Returns (W of this spectral norm, u)."""
    w = torch.randn(features, features, dtype=torch.float64)
    w = (w * norm / torch.linalg.matrix_norm(w, 2)).float()
    if terms == 1:
        w = w.bfloat16().float()
    return w.to(device), torch.randn(batch, features).to(device)


def restless(features, device, batch=4):
    """Returns (W, u) with one mode that grows: residuals fall, and rise again before 20 steps are done."""
    q = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    modes = torch.full((features,), 0.3, dtype=torch.float64)
    modes[-1] = -1.2
    u = torch.randn(batch, features, dtype=torch.float64)
    u[:, -1] = torch.logspace(-2, 0, batch, dtype=torch.float64)
    return ((q * modes) @ q.T).float().to(device), (u @ q.T).float().to(device)


def options(**changed):
    """Returns the settings of a solve."""
    return {"activation": "tanh", "tol": 1e-6, "max_steps": 60} | changed


def exact(w, u, **settings):
    """Returns z* in float64."""
    settings = settings | {"tol": 1e-14, "max_steps": 5000, "memory": 0, "damping": 1.0}
    return rows.affine_solve_ref(w.double(), u.double(), **settings)[0]


def dense_adjoint(w, pre, g, activation):
    """Returns u* in float64, by a linear solve for each row."""
    jacobian = rows.SLOPES[activation](pre.double())[:, :, None] * w.double()
    eye = torch.eye(w.shape[0], dtype=torch.float64, device=w.device)
    return torch.stack([torch.linalg.solve(eye - j.T, row) for j, row in zip(jacobian, g.double(), strict=True)])


def true_residual(w, u, z, activation, terms):
    """Returns the residuals of z in float64, with the W that a kernel solves for."""
    w = bf16_terms_ref((w,), terms)[0].double().sum(0)
    f = rows.ACTIVATIONS[activation](u.double() + z.double() @ w.T)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-30)
