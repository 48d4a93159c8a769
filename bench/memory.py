"""Memory of a training step against the number of steps, and states that a forward solve holds beside the cell.

`python -m tritondeq.bench.memory` prints what a training step of the Transformer cell holds on a CPU, beside what one
block by hand does.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import tritondeq as tdeq
from tritondeq.toolbox import PeakMemory, one_thread

from . import blocks, rivals, shapes
from .measure import Record

ANDERSON = tdeq.Anderson(memory=4)
FLAT = ("tritondeq", "tritondeq Anderson")  # whose memory does not grow with the steps


class Plain(nn.Module):
    """A cell of which nothing is known but its map: the loop solves it, whatever the device."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Evaluates the cell."""
        return self.cell(z, self.cell.inject(x))


def sizes(suite: str, cuda: bool) -> tuple[int, int, tuple[int, ...]]:
    """Returns (rows, width, numbers of steps) of a suite."""
    if suite == "tiny":
        return 64, 64, (6, 12)
    return (8192, 256, (4, 8, 16, 32, 64)) if cuda else (256, 128, (4, 16, 64))


def run(device: torch.device, suite: str, these: list[shapes.Shape] | None = None) -> Iterator[Record]:
    """Measures peak bytes of a training step beyond what was there before it, by steps: DEQ, unrolled, explicit nets.

    A record is `wrong` where ours is not within 1% of its least. On a CPU one state more is right: in torch operations
    the best iterate is a state apart only once a residual has risen.

    Args:
        device: Where.
        suite: "tiny", "quick" or "full".
        these: Shapes in place of those of the suite.
    """
    cuda = device.type == "cuda"
    rows, width, counts = sizes(suite, cuda)
    if these:
        for shape in these:
            yield from _grown(shape, counts, device)
        return
    yield from _grown(shapes.Shape("affine", width, rows), counts, device)
    batch, tokens, features, _ = blocks.SIZES["tiny" if suite == "tiny" else device.type]
    shape = shapes.Shape("transformer", features, batch * min(tokens, shapes.TOKENS), low=cuda)
    yield from _grown(shape, counts[:: len(counts) - 1] if cuda else counts[:2], device)


def _grown(shape: shapes.Shape, counts: tuple[int, ...], device: torch.device) -> Iterator[Record]:
    skip = shape.cell in ("affine", "monotone")
    state = 4 * math.prod(shape.dims)
    peaks: dict[str, dict[int, int]] = {}
    for steps in counts:
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
            with warnings.catch_warnings():  # no solve is at its tolerance after so few steps, nor is meant to be
                warnings.filterwarnings("ignore", "a backward solve")
                peaks.setdefault(contestant, {})[steps] = of_net(module, x)
    for contestant, each in peaks.items():
        least, most = min(each.values()), max(each.values())
        steady = most <= 1.01 * least + (state if device.type == "cpu" else 0)
        fault = f"{contestant}: memory is not flat in steps: {least} to {most} bytes"
        for steps, nbytes in each.items():
            record = {"kind": "memory", "case": f"{shape} {steps} steps", "contestant": contestant, "steps": steps}
            record |= {"rows": shape.rows, "width": shape.features, "net": str(shape), "bytes": nbytes}
            yield record | {"wrong": None if steady or contestant not in FLAT else fault}


def states(device: torch.device, suite: str) -> Iterator[Record]:
    """Counts the states that a forward solve by the loop holds at its peak, beside one evaluation of the cell."""
    rows, width, _ = sizes(suite, device.type == "cuda")
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=device)
    cell = Plain(tdeq.cells.Affine(width, device=device))
    base = of_net(lambda x: cell(torch.zeros_like(x), x), x, train=False)
    for solver in (tdeq.Picard(), ANDERSON):
        layer = tdeq.DEQ(cell, solver=solver, tol=1e-12, max_steps=24)
        nbytes = of_net(layer, x, train=False)
        name = f"Anderson({ANDERSON.memory})" if solver is ANDERSON else "Picard"
        record = {"kind": "states", "case": f"{rows}x{width}", "contestant": name, "rows": rows, "width": width}
        yield record | {"bytes": nbytes, "states": (nbytes - base) / x.nbytes, "wrong": None}


def of_net(net: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, train: bool = True) -> int:
    """Returns peak bytes beyond those before a call of the net, and with `train` its backward pass."""

    def step():
        if isinstance(net, nn.Module):
            net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            z = net(x)
            if train:
                z.float().sum().backward()

    step()
    if isinstance(net, nn.Module):
        net.zero_grad(set_to_none=True)
    return peak(step, x.device)


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Returns peak bytes beyond those before a call that was made once already."""
    with PeakMemory(device) as memory:
        call()
    return memory.peak


def training(steps: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns losses of one block by hand and of a layer that takes so many steps, by name."""
    torch.manual_seed(0)
    batch, tokens, features, heads = blocks.SIZES["cpu"]
    cell = tdeq.cells.Transformer(features, heads=heads, causal=True, rotary=1e4, wiring="damped")
    x, z = torch.randn(2, batch, tokens, features)
    layer = tdeq.DEQ(cell, solver=tdeq.Picard(), tol=1e-12, max_steps=steps)
    nets = {"one block": lambda: cell(z, cell.inject(x)), f"{steps} steps": lambda: layer(x)}
    return {name: lambda net=net: net().square().sum() for name, net in nets.items()}


def held(loss: Callable[[], torch.Tensor]) -> tuple[int, int, int]:
    """Returns bytes that a forward pass on a CPU keeps, bytes at the peak of a training step, and its allocations."""
    loss().backward()  # gradients, and what is allocated once
    with PeakMemory(torch.device("cpu")) as memory:
        value = loss()
        kept = memory.bytes
        value.backward()
    return kept, memory.peak, memory.allocations


def main() -> None:
    """Prints the table."""
    from .report import markdown

    rows = [["a training step of", "kept by the forward pass", "peak", "allocations"]]
    for steps in (4, 16, 64):
        for name, loss in training(steps).items():
            kept, peak, allocations = held(loss)
            row = [name, *(f"{n / 2**20:.2f} MiB" for n in (kept, peak)), str(allocations)]
            rows += [] if row in rows else [row]
    print(markdown(rows))


if __name__ == "__main__":
    with one_thread(), tdeq.backend("torch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a backward solve")
        main()
