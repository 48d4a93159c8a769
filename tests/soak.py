"""A long run of training that watches memory and time: `python -m tests.soak --steps 100000`.

A small net is trained by solvers and adjoints in turn: every block of steps goes through all of `ROUNDS`, so that
blocks are alike. After each block it prints seconds per 1000 steps, the peak of the process's memory, and the number of
live tensors. The exit status is 1 where one of these holds, by the blocks alone:

    live tensors    more at some block of the last half than at any from the third to the middle one
    memory          its peak rose in more than half of the blocks of the last half
    time            the median of the last tenth of blocks is more than 1.3 times that of the first tenth

The first two blocks warm up and do not count. Tensors are counted after a collection, so there is no noise to allow
for. The peak has some: an allocator takes memory in steps, now and then, and then no more, whereas what leaks page by
page raises the peak in block after block. A leak of a page a block is seen so, however large the process is.
"""

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Implicit, Neumann, OneStep, Phantom, Picard, Unrolled

BLOCKS, SLOWER = 20, 1.3
ROUNDS = [
    (Picard(), Implicit()),
    (Anderson(3), Implicit(solver=Picard())),
    (Broyden(5), Implicit(reuse=True)),
    (Picard(0.8), Phantom(4, 0.8)),
    (Anderson(), Neumann(3)),
    (Picard(), OneStep()),
    (Picard(), Unrolled(4, checkpoint=True)),
]


class Block(nn.Module):
    """A cell with what a layer holds for a solve: a parametrized weight and a dropout mask."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), weight_norm(nn.Linear(width, width))
        self.linear.parametrizations.weight.original0.data.mul_(0.5)
        self.dropout = tdeq.FixedDropout(0.1)

    def forward(self, z, x):
        return self.norm(x + self.dropout(torch.tanh(self.linear(z))))


@dataclass(frozen=True)
class Mark:
    """What was measured at the end of a block."""

    steps: int
    seconds: float  # of 1000 steps
    peak: int  # bytes
    tensors: int


def soak(
    steps: int, blocks: int = BLOCKS, after: Callable[[], None] = lambda: None, show: Callable = print
) -> list[Mark]:
    """Trains for about `steps` steps and returns a mark for each block; `after` is called after every step."""
    torch.manual_seed(0)
    cell, head = Block(8), nn.Linear(8, 8)
    layers = [tdeq.DEQ(cell, solver=solver, adjoint=adjoint, tol=1e-3) for solver, adjoint in ROUNDS]
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.1)
    size = max(len(ROUNDS), steps // blocks)
    marks: list[Mark] = []
    for block in range(blocks):
        start = time.perf_counter()
        for k in range(size):
            layer = layers[k * len(ROUNDS) // size]
            x = torch.randn(4, 8)
            h = checkpoint(layer, head(x), use_reentrant=False) if (block * size + k) % 100 == 0 else layer(head(x))
            loss = (h - x).pow(2).mean()
            if (block * size + k) % 50 == 1 and isinstance(layer.adjoint, Implicit):
                x.requires_grad_()
                (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
                loss = loss + 1e-3 * g.pow(2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after()
        seconds = (time.perf_counter() - start) / size * 1000
        marks.append(Mark((block + 1) * size, seconds, _peak(), _tensors()))
        m = marks[-1]
        show(f"{m.steps:>8} steps {m.seconds:>7.2f} s/1000 {m.peak / 2**20:>8.1f} MiB {m.tensors:>6} tensors")
    return marks


def verdicts(marks: list[Mark], clock: bool = True) -> list[str]:
    """Returns what is wrong, as the text at the top of this file defines it; [] is fine."""
    middle, tenth = len(marks) // 2, max(1, len(marks) // 10)
    wrong = []
    before, later = (max(m.tensors for m in part) for part in (marks[2:middle], marks[middle:]))
    if later > before:
        wrong.append(f"live tensors grow: at most {before} up to the middle, {later} afterwards")
    rises = sum(b.peak > a.peak for a, b in zip(marks[middle - 1 :], marks[middle:], strict=False))
    if rises > (len(marks) - middle) / 2:
        grown = (marks[-1].peak - marks[middle - 1].peak) / 2**20
        wrong.append(
            f"memory grows: the peak rose in {rises} of the last {len(marks) - middle} blocks, by {grown:.1f} MiB"
        )
    first, last = (median(m.seconds for m in part) for part in (marks[2 : 2 + tenth], marks[-tenth:]))
    if clock and last > SLOWER * first:
        wrong.append(f"steps slow down: {first:.2f} s per 1000 in the first tenth, {last:.2f} in the last")
    return wrong


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--no-clock", action="store_true", help="do not judge time")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        marks = soak(given.steps, max(BLOCKS, given.steps // 1000))
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    wrong = verdicts(marks, clock=not given.no_clock)
    print("\n".join(wrong) or "nothing grows")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
