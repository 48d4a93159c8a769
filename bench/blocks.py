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
    """(calls by name, each a training step under bf16 autocast that returns (z, evaluations); the layer)."""
    batch, tokens, features, heads = size
    torch.manual_seed(0)
    cell = tdeq.cells.Transformer(features, heads=heads, causal=True, rotary=1e4, wiring="damped").to(device)
    x = torch.randn(batch, tokens, features, device=device)
    layer = tdeq.DEQ(cell)
    faster = tdeq.DEQ(cell, compile=True)

    def step(net: Callable[[Tensor], Tensor]):
        cell.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            z = net(x)
        z.square().mean().backward()
        return z.detach(), None

    step(layer)
    steps = int(layer.last.steps.max())
    calls = {"tritondeq": lambda: step(layer)}
    tied = rivals.fixed_steps(cell, steps, False)
    calls["tied loop"] = lambda: step(lambda x: tied(x, torch.zeros_like(x)))
    if compiled:
        calls["tritondeq, compiled cell"] = lambda: step(faster)
        quick = rivals.fixed_steps(cell, steps, True)
        calls["compiled steps"] = lambda: step(lambda x: quick(x, torch.zeros_like(x)))
    return calls, layer, steps


def run(device: torch.device, suite: str, seconds: float) -> Iterator[Record]:
    """One record a contestant; `wrong` where its result differs from ours by more than both tolerances."""
    cuda = device.type == "cuda"
    size = SIZES["tiny" if suite == "tiny" else device.type]
    calls, layer, steps = contestants(size, device, compiled=cuda and suite == "full")
    values = {name: call()[0].float() for name, call in calls.items()}
    ours, tol = values["tritondeq"], 1e-2
    off = {name: float((z - ours).norm() / ours.norm()) for name, z in values.items()}
    faults = {name: f"{name}: differs from ours by {e:.1e}" for name, e in off.items() if not e < 5 * tol}
    timed = {} if faults else measure.clock(calls, device, seconds)
    for name, call in calls.items():
        record = {"goal": "G9", "case": f"G9 Transformer {'x'.join(map(str, size[:3]))} bf16 train", "contestant": name}
        record |= {
            "rows": size[0] * size[1],
            "width": size[2],
            "train": True,
            "steps": steps,
            "tol": tol,
            "path": layer.last.path if name == "tritondeq" else None,
        }
        record |= {"residual": float(layer.last.residual.max()), "wrong": faults.get(name)}
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
