"""Rows that need 5 to 200 steps in one batch, beside the same kernel in lockstep; on CUDA only."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import dispatch, launch
from . import measure
from .measure import Record

TOL, MOST, WIDTH = 1e-4, 400, 128
SLOW, DEEP = 0.97, 0.09  # the one slow mode, and the share of rows that have some of it


def problem(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns (W, u) of z = W z + u: all modes at 0.1 but one, which few rows have much of."""
    gen = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=gen, dtype=torch.float64))[0]
    modes = torch.full((WIDTH,), 0.1, dtype=torch.float64)
    modes[-1] = SLOW
    u = torch.randn(rows, WIDTH, generator=gen, dtype=torch.float64)
    deep = torch.rand(rows, generator=gen, dtype=torch.float64) < DEEP
    size = 10 ** (-3 + 4 * torch.rand(rows, generator=gen, dtype=torch.float64))
    u[:, -1] = torch.where(deep, size, 1e-7)
    return ((q * modes) @ q.T).float().to(device), (u @ q.T).float().to(device)


def lockstep() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a tile takes new rows only when all of its rows are done."""
    return launch.override("rows.affine", {"REFILL": 0})


def run(device: torch.device, suite: str, seconds: float) -> Iterator[Record]:
    """Yields ours and lockstep; `wrong` where they differ in a bit, or the depths are not those of the problem."""
    if device.type != "cuda":
        return
    rows = 1 << (14 if suite != "full" else 17)
    w, u = problem(rows, device)
    op = dispatch.load("rows.affine")

    def solve():
        return op.solve(w, u, activation="identity", tol=TOL, max_steps=MOST)

    def locked():
        with lockstep():
            return solve()

    (z, steps, *_), (same, *_) = solve(), locked()
    fault = None if torch.equal(z, same) else "lockstep: differs in some bit"
    mean, least, most = steps.float().mean().item(), steps.min().item(), steps.max().item()
    if not (10 < mean < 20 and least <= 6 and 150 < most < MOST):
        fault = f"tritondeq: {least} to {most} steps, {mean:.1f} on average"
    head = {"kind": "solve", "case": f"Affine {rows}x{WIDTH} fp32, {least} to {most} steps", "rows": rows}
    head |= {"width": WIDTH, "cell": "affine", "low": False, "steps": most, "mean_steps": mean, "tol": TOL}
    calls = {"tritondeq": solve, "lockstep": locked}
    for record in measure.compare(calls, dict.fromkeys(calls, fault), device, seconds):
        yield head | record
