"""Cases of what a solve returns as a whole: one iterate, and a residual that is that iterate's."""

from dataclasses import asdict

import torch

from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.tails import Tail
from tritondeq.loop import Settings, drive

from .cases import Outcome, case, in_terms
from .cases_steps import SOLVERS

APART = 1.5  # how many times what is reported a residual may be, or the tolerance where that is larger


@case(
    most=1,
    smoke="w64",
    w64={"features": 64, "tol": 1e-6, "terms": 3},
    w128={"features": 128, "tol": 1e-5, "terms": 2},
    w128_tight={"features": 128, "tol": 1e-6, "terms": 3},
    w128_loose={"features": 128, "tol": 1e-4, "terms": 2},
    w64_stream={"features": 64, "tol": 1e-6, "terms": 3, "stream": True},
)
def truncated_rows(features, tol, terms, stream=False):
    """Tensor cores truncate sums, which must not add up unseen: a slow solve reports the residual that it has."""
    w = in_terms(torch.linalg.qr(torch.randn(features, features))[0] * 0.9, terms)
    u = torch.randn(5, features) * 0.3
    op, options = dispatch.load("rows.affine"), {"activation": "tanh", "tol": tol, "max_steps": 100, "terms": terms}
    with launch.override("rows.affine", {"STREAM": stream}):
        z, steps, residual, status = op.solve(w, u, **options)
    return reported(w, u, z, steps, residual, status, tol)


@case(most=1, w128={"features": 128, "tol": 1e-6, "terms": 3})
def truncated_products(features, tol, terms):
    """The same of the steps with the product in them."""
    w = in_terms(torch.linalg.qr(torch.randn(features, features))[0] * 0.9, terms)
    u = torch.randn(5, features) * 0.3
    with launch.override("steps.affine", {"TILE": (16, 128, 64, 2)}):
        options = {"activation": "tanh", "tol": tol, "max_steps": 100, "terms": terms}
        steps = dispatch.load("steps.affine").solve(w, u, torch.zeros_like(u), **options)
        outcome = drive(steps, Settings(SOLVERS["picard"], tol, 100))
    return reported(w, u, outcome.value, outcome.steps, outcome.residual, outcome.status, tol)


def reported(w, u, z, steps, residual, status, tol) -> Outcome:
    """Judges what was reported of z = tanh(W z + u) by the residual that z has."""
    outcome = Outcome((z, steps, residual, status))
    y = torch.tanh(z.double() @ w.double().T + u.double())
    true = (y - z.double()).norm(dim=1) / y.norm(dim=1)
    limit = APART * residual.double().clamp(min=tol)
    at = (true / limit).argmax()
    outcome.error, outcome.bound = true[at].item(), limit[at].item()
    return outcome


def normed(parts, features):
    """Returns the rms norm of rows of so many features, in float64."""
    rows = parts.double().reshape(len(parts), -1, features)
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)).reshape(parts.shape)


def with_residual(z, want, features):
    """Returns parts whose norm is at a relative residual of `want` [B] from z, and where that was found."""
    z, away = z.double(), torch.randn(z.shape, dtype=torch.float64)

    def residual(distance):
        y = normed(z + distance * away, features)
        return (y - z).norm(dim=1) / y.norm(dim=1)

    low, high = torch.zeros(len(z), 1, dtype=torch.float64), torch.full((len(z), 1), 3.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = (residual(middle) > want)[:, None]
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (z + low * away).float(), (residual(low) - want).abs() < 1e-9


@case(most=1, smoke="picard", **{name: {"solver": SOLVERS[name]} for name in ("picard", "anderson3", "broyden3")})
def torn(solver, batch=150, rows=3, features=7):
    """The third residual is the second's but for a last bit: one of their iterates is returned, and all of it."""
    tail = Tail("rms", weight=torch.ones(features), eps=1e-6)
    start = torch.randn(batch, rows * features)
    steps = dispatch.load(solver.fused_steps).start(start, None, 1e-12, 4, tail, **asdict(solver))
    iterates, found = [], None
    for k in range(4):
        if k:
            steps.onward()
        iterates.append(steps.z.clone())
        if k == 2:
            want = steps.stats[0].double() * (1 + (torch.rand(batch) - 0.5).double() * 2e-7)
            parts, found = with_residual(steps.z, want, features)
        else:  # the second is near, and the last is worse
            parts = (0 if k == 0 else steps.z) + (1.0, 0.05, 0.0, 2.0)[k] * torch.randn(batch, rows * features)
        steps.take(parts)
    value, status, count, residual = steps.finish()
    outcome = Outcome((value, status, count, residual))
    whole = torch.stack([(value == z).all(1) for z in iterates]).any(0)
    outcome.expect(whole, "the best iterate", value, iterates[1])
    if found.sum() < batch // 2:
        outcome.wrong.append(f"only {found.sum()} samples have the residual that they should")
    return outcome
