"""A training step of the Transformer cell beside the weight-tied loop of as many blocks, by time and memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, memory, rivals
from .measure import Record

TOL = 1e-2
SIZES = {  # batch, tokens, features, heads
    "tiny": (2, 8, 16, 2),
    "cpu": (4, 64, 128, 4),
    "cuda": (32, 256, 512, 8),
}


def contestants(
    size: tuple[int, int, int, int], device: torch.device, compiled: bool
) -> tuple[dict[str, Callable[[], Tensor]], tdeq.DEQ, int]:
    """Returns training steps under bf16 autocast that return z, by name; the layer; and the steps it takes."""
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
    nets: dict[str, Any] = {"tritondeq": layer, "tied loop": rivals.Tied(cell, steps)}
    if compiled:
        nets["compiled tied loop"] = rivals.compiled(nets["tied loop"], graphs=True)
        nets["tritondeq, compiled cell"] = tdeq.DEQ(cell, compile=True)
    return {name: lambda net=net: step(net) for name, net in nets.items()}, layer, steps


def run(
    device: torch.device, suite: str, seconds: float, compiles: Callable[[], bool], lose: Callable[[str], None]
) -> Iterator[Record]:
    """Yields one record a contestant; `wrong` where its result differs from ours by more than both tolerances.

    Args:
        device: Where.
        suite: "tiny", "quick" or "full".
        seconds: Of measuring, for each contestant.
        compiles: As in measure.attempt.
        lose: As in measure.attempt.
    """
    cuda = device.type == "cuda"
    size = SIZES["tiny" if suite == "tiny" else device.type]
    case = f"Transformer {'x'.join(map(str, size[:3]))} bf16 train"
    calls, layer, steps = contestants(size, device, compiled=cuda and suite == "full")
    values, faults = measure.attempt(calls, case, compiles, lose)
    if "tritondeq" in values:
        ours = values["tritondeq"].float()
        off = {name: float((z.float() - ours).norm() / ours.norm()) for name, z in values.items()}
        faults |= {name: f"{name}: differs from ours by {e:.1e}" for name, e in off.items() if not e < 5 * TOL}
    head = {"kind": "train", "case": case, "rows": size[0] * size[1], "width": size[2], "cell": "transformer"}
    head |= {"low": True, "steps": steps, "tol": TOL, "residual": float(layer.last.residual.max())}
    for record in measure.compare(calls, faults, device, seconds):
        if record["contestant"] == "tritondeq":
            record |= {"route": layer.last.route.name, "why": layer.last.why}
        if cuda and "seconds" in record:
            record["peak_bytes"] = memory.peak(calls[record["contestant"]], device)
        yield head | record
