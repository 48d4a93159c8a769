"""Training memory against the number of steps (G9, G10), and states kept beside the cell."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import tritondeq as tdeq

from . import blocks, measure, rivals, shapes
from .targets import MEMORY

Record = dict[str, Any]
ANDERSON = tdeq.Anderson(memory=MEMORY)
FLAT = ("tritondeq", "tritondeq Anderson")


class Plain(nn.Module):
    """A cell of which nothing is known but its map: the loop solves it, whatever the device."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, z, x):
        return self.cell(z, self.cell.inject(x))


def sizes(suite: str, cuda: bool) -> tuple[int, int, tuple[int, ...]]:
    """(rows, width, steps) of a suite."""
    if suite == "tiny":
        return 64, 64, (6, 12)
    return (8192, 256, (4, 8, 16, 32, 64)) if cuda else (256, 128, (4, 16, 64))


def run(device: torch.device, suite: str, these: list[shapes.Shape] | None = None) -> Iterator[Record]:
    """Peak bytes of a training step beyond what was there before it, by steps: DEQ, unrolled solves, explicit nets.
    Without `these` shapes, those of the suite. `wrong` where ours are not within 1% of their least; on a CPU one state
    more is right: in torch operations the best iterate is a state of its own only once a residual has risen."""
    cuda = device.type == "cuda"
    rows, width, counts = sizes(suite, cuda)
    if these:
        for shape in these:
            yield from _grown(shape, counts, str(shape), str(shape).split()[0], device)
        return
    yield from _grown(shapes.Shape("affine", width, rows), counts, f"{rows}x{width}", "Affine", device)
    _, tokens, features, _ = size = blocks.SIZES["tiny" if suite == "tiny" else device.type]
    shape = shapes.Shape("transformer", features, size[0] * min(tokens, shapes.TOKENS), low=cuda)
    yield from _grown(shape, counts[:: len(counts) - 1] if cuda else counts[:2], str(shape), "Transformer", device)


def _grown(shape: shapes.Shape, counts: tuple[int, ...], name: str, net: str, device: torch.device) -> Iterator[Record]:
    skip = shape.cell in ("affine", "monotone")
    state = 4 * math.prod(shape.dims)
    found: dict[tuple[str, int], int] = {}
    for steps in dict.fromkeys(counts):
        for contestant in (*FLAT, "tritondeq Unrolled", "tied loop", "untied stack"):
            torch.manual_seed(0)
            cell, x = shape.make(device), torch.randn(shape.dims, device=device)
            x = x.to(next(cell.parameters()).dtype)
            options: dict[str, Any] = {"tol": 1e-12, "max_steps": steps}
            if contestant == "tied loop":
                module = rivals.Tied(cell, steps)
            elif contestant == "untied stack":
                module = rivals.Stack(lambda: shape.make(device), steps, skip)
            elif contestant == "tritondeq Unrolled":
                module = tdeq.DEQ(cell, adjoint=tdeq.Unrolled(steps), **options)
            else:
                module = tdeq.DEQ(cell, solver=ANDERSON if "Anderson" in contestant else tdeq.Picard(), **options)
            found[contestant, steps] = peak(module, x)
    for contestant in dict.fromkeys(name for name, _ in found):
        each = {steps: found[contestant, steps] for steps in dict.fromkeys(counts)}
        allowed = 1.01 * min(each.values()) + (state if device.type == "cpu" else 0)
        steady = max(each.values()) <= allowed
        fault = f"{contestant}: memory is not flat in steps: {min(each.values())} to {max(each.values())} bytes"
        for steps, nbytes in each.items():
            record = {"goal": "G10", "case": f"G10 {name} {steps} steps", "contestant": contestant, "steps": steps}
            record |= {"rows": shape.rows, "width": shape.features, "net": net, "bytes": nbytes, "kind": "peak"}
            yield record | {"wrong": None if steady or contestant not in FLAT else fault}


def states(device: torch.device, suite: str) -> Iterator[Record]:
    """States that a forward solve keeps beside one evaluation of the cell, at their peak, of a cell that the loop
    solves."""
    rows, width, _ = sizes(suite, device.type == "cuda")
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=device)
    cell = Plain(tdeq.cells.Affine(width, device=device))
    state = x.numel() * x.element_size()
    base = peak(lambda x: cell(torch.zeros_like(x), x), x, train=False)
    for solver in (tdeq.Picard(), ANDERSON):
        layer = tdeq.DEQ(cell, solver=solver, tol=1e-12, max_steps=24)
        nbytes = peak(layer, x, train=False)
        name = f"Anderson({MEMORY})" if solver is ANDERSON else "Picard"
        record = {"goal": "states", "case": f"states {rows}x{width}", "contestant": name, "rows": rows, "width": width}
        yield record | {"bytes": nbytes, "states": (nbytes - base) / state, "wrong": None}


def peak(net, x: torch.Tensor, train: bool = True) -> int:
    """Peak bytes beyond those before a step, the second one, so that what is made once is there."""

    def step():
        if isinstance(net, nn.Module):
            net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            z = net(x)
            if train:
                z.float().sum().backward()

    step()
    if x.device.type != "cuda":
        with measure.Peak() as seen:
            step()
        return seen.most
    if isinstance(net, nn.Module):
        net.zero_grad(set_to_none=True)
    measure.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    step()
    measure.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before
