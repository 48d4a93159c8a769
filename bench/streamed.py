"""How often a whole solve reads a second term of W: `python -m tritondeq.bench.streamed` prints the table of NOTES.md.

Of an affine cell with 256 features the first bf16 term of W stays in shared memory, and the second is read from L2 for
the rows of a tile whose lag is due (kernels/rows.py). Counts, by the same rules in torch: programs of 16 lanes take the
rows of their share one after the other, and half of the lanes idle before they take new ones.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import tritondeq as tdeq
from tritondeq.demo.common import one_thread

from ..kernels.rules import EPS
from .common import markdown_table

LAG, SHRINK = 16.0, 1 / 256  # of the kernel: how far the second term may be behind, and what rounding leaves of a lag
LANES, MOST = 16, 500
TOLS, SHARES = (1e-3, 1e-4), (16, 62)  # rows of a program: one tile, and 8192 rows over 132 programs
WIDTH, PROGRAMS = 256, 24


@dataclass(frozen=True)
class Found:
    """Evaluations of a program, the share of them after which it reads the second term, and steps of each row."""

    evaluations: float
    reads: float
    steps: Tensor


def simulate(w: Tensor, u: Tensor, slope: Tensor | None, tol: float, share: int) -> Found:
    """Plain iteration of z = tanh(u + W z), or of z = slope (u + W z), for rows [B, D]; B is a multiple of `share`."""
    programs, lanes = len(u) // share, min(LANES, share)
    first = torch.arange(programs).unsqueeze(1) * share
    row = first + torch.arange(lanes)
    taken = torch.full((programs, 1), lanes)
    z, drift, steps = torch.zeros(programs, lanes, len(w)), torch.zeros(programs, lanes), torch.zeros(len(u))
    go = torch.ones(programs, lanes, dtype=torch.bool)
    evaluations = reads = 0
    for _ in range(MOST):
        idle = (taken < share) & (go.sum(1, keepdim=True) <= lanes // 2)
        number = taken + torch.cumsum(~go, 1) - 1
        new = ~go & idle & (number < share)
        taken = taken + new.sum(1, keepdim=True)
        row, go = torch.where(new, first + number, row), go | new
        z, drift = torch.where(new.unsqueeze(2), 0.0, z), torch.where(new, 0.0, drift)
        if not go.any():
            break
        y = u[row] + z @ w.mT
        y = torch.tanh(y) if slope is None else slope[row] * y
        r, s = (y - z).norm(dim=2), y.norm(dim=2)
        scale = torch.maximum(r, tol * s)
        evaluations += int(go.any(1).sum())
        steps[row[go]] += 1
        go = go & ~((r / (s + EPS) <= tol) & (drift <= LAG * scale))
        z, drift = torch.where(go.unsqueeze(2), y, z), drift + torch.where(go, r, 0.0)
        due = go & ~(drift <= 0.5 * LAG * scale)
        reads += int(due.any(1).sum())
        drift = torch.where(due, SHRINK * drift, drift)
    return Found(evaluations / programs, reads / evaluations, steps)


@torch.no_grad()
def table(tols=TOLS, shares=SHARES, width: int = WIDTH, programs: int = PROGRAMS) -> list[list[str]]:
    """By direction, rows of a program and tolerance, of `Affine` as it begins."""
    rows = [["", "rows of a program", "tol", "evaluations", "of these read the second term"]]
    for adjoint in (False, True):
        for share in shares:
            for tol in tols:
                torch.manual_seed(0)
                cell, x = tdeq.cells.Affine(width), torch.randn(programs * share, width)
                u, w = cell.inject(x)
                slope = None
                if adjoint:
                    z = tdeq.DEQ(cell, tol=1e-6, max_steps=200)(x)
                    u, w, slope = torch.randn_like(u), w.mT, 1 - torch.tanh(u + z @ w.mT) ** 2
                found = simulate(w, u, slope, tol, share)
                told = [f"{tol:g}", f"{found.evaluations:.1f}", f"{100 * found.reads:.0f} %"]
                rows.append(["adjoint" if adjoint else "solve", str(share), *told])
    return rows


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser("python -m tritondeq.bench.streamed", description=__doc__.splitlines()[0]).parse_args(argv)
    with tdeq.backend("torch"), one_thread():
        print("\n".join(markdown_table(table())))


if __name__ == "__main__":
    main()
