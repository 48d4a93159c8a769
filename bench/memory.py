"""Training memory against the number of steps (G10)."""

from collections.abc import Iterator
from typing import Any

import torch

import tritondeq as tdeq

from . import measure
from .solves import Tied


def sizes(suite: str, cuda: bool) -> tuple[int, int, tuple[int, ...]]:
    """(rows, width, steps) of a suite."""
    if suite == "tiny":
        return 4, 8, (2, 4)
    return (8192, 256, (4, 8, 16, 32, 64)) if cuda else (256, 128, (4, 16, 64))


def run(device: torch.device, suite: str) -> Iterator[dict[str, Any]]:
    """Bytes of one training step: on CUDA the peak above what was there before it; elsewhere, what is saved for
    backward. `steady` is that ours is within 1% of its least."""
    rows, width, counts = sizes(suite, device.type == "cuda")
    found = {}
    for steps in counts:
        for name in ("tritondeq", "tritondeq Anderson", "tied loop"):
            torch.manual_seed(0)
            cell = tdeq.cells.Affine(width, device=device)
            x = torch.randn(rows, width, device=device)
            net = Tied(cell, steps)
            if name != "tied loop":
                solver = tdeq.Anderson(memory=4) if "Anderson" in name else tdeq.Picard()
                net = tdeq.DEQ(cell, solver=solver, tol=1e-12, max_steps=steps)
            found[name, steps] = (peak if device.type == "cuda" else saved)(net, x)
    for name in ("tritondeq", "tritondeq Anderson", "tied loop"):
        each = [found[name, steps] for steps in counts]
        steady = max(each) <= 1.01 * min(each)
        for steps, nbytes in zip(counts, each, strict=True):
            record = {"goal": "G10", "case": f"G10 {rows}x{width} {steps} steps", "contestant": name, "steps": steps}
            record |= {
                "rows": rows,
                "width": width,
                "bytes": nbytes,
                "kind": "peak" if device.type == "cuda" else "saved",
            }
            fault = f"{name}: memory is not flat in steps: {min(each)} to {max(each)} bytes"
            yield record | {"wrong": None if steady or name == "tied loop" else fault}


def saved(net: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, weights and x apart."""
    known = {t.untyped_storage().data_ptr() for t in (x, *net.parameters())}
    kept = {}

    def pack(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x).sum().backward()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


def peak(net: torch.nn.Module, x: torch.Tensor) -> int:
    """Peak bytes above those before the step; the second step, so that what is made once is there."""
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        measure.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        net(x).sum().backward()
        measure.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before
