"""A training step of the transformer cell beside the weight-tied loop of as many blocks (G9), by time and memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, rivals

Record = dict[str, Any]
SIZES = {  # batch, tokens, features, heads
    "tiny": (2, 8, 16, 2),
    "cpu": (4, 64, 128, 4),
    "cuda": (32, 256, 512, 8),
}


def contestants(size: tuple[int, int, int, int], device: torch.device, compiled: bool):
    """(calls by name, each a training step under bf16 autocast that returns z; the layer; the steps it takes)."""
    batch, tokens, features, heads = size
    torch.manual_seed(0)
    cell = tdeq.cells.Transformer(features, heads=heads, causal=True, rotary=1e4, wiring="damped").to(device)
    x = torch.randn(batch, tokens, features, device=device)
    layer = tdeq.DEQ(cell)

    def step(net: Callable[[Tensor], Tensor]):
        cell.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            z = net(x)
        z.square().mean().backward()
        return z.detach()

    step(layer)
    steps = int(layer.last.steps.max())
    nets = {"tritondeq": layer, "tied loop": rivals.Tied(cell, steps)}
    if compiled:
        nets["compiled tied loop"] = rivals.compiled(nets["tied loop"], graphs=True)
        nets["tritondeq, compiled cell"] = tdeq.DEQ(cell, compile=True)
    return {name: lambda net=net: step(net) for name, net in nets.items()}, layer, steps


def run(
    device: torch.device, suite: str, seconds: float, compiles: Callable[[], bool], lose: Callable[[str], None]
) -> Iterator[Record]:
    """One record a contestant; `wrong` where its result differs from ours by more than both tolerances.

    `compiles` and `lose` are those of measure.attempt.
    """
    cuda = device.type == "cuda"
    size = SIZES["tiny" if suite == "tiny" else device.type]
    case = f"G9 Transformer {'x'.join(map(str, size[:3]))} bf16 train"
    calls, layer, steps = contestants(size, device, compiled=cuda and suite == "full")
    values, faults = measure.attempt(calls, case, compiles, lose)
    tol = 1e-2
    if "tritondeq" in values:
        ours = values["tritondeq"].float()
        off = {name: float((z.float() - ours).norm() / ours.norm()) for name, z in values.items()}
        faults |= {name: f"{name}: differs from ours by {e:.1e}" for name, e in off.items() if not e < 5 * tol}
    timed = {} if faults else measure.clock(calls, device, seconds)
    for name, call in calls.items():
        record = {"goal": "G9", "case": case, "contestant": name, "cell": "transformer", "low": True}
        record |= {"rows": size[0] * size[1], "width": size[2], "train": True, "steps": steps, "tol": tol}
        record |= {"path": layer.last.path if name == "tritondeq" else None, "wrong": faults.get(name)}
        record["residual"] = float(layer.last.residual.max())
        if name in timed:
            record |= {"seconds": timed[name].seconds, "median": timed[name].median, "least": timed[name].least}
            record["over_ours"] = timed[name].seconds / timed["tritondeq"].seconds
            record["peak_bytes"] = _peak(call, device) if cuda else None
        yield record


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before
