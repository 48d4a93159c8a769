"""What a step of the loop asks of the host on CUDA: launches beside the cell, and waits for the device ."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import tritondeq as tdeq

from . import rivals, steps
from .measure import Record

ROWS, WIDTHS = 32, (64, 4096)  # one program holds a sample, and two share it
FEW, MANY = 24, 72  # evaluations of the two solves whose difference is taken
COPIES = ("Memcpy", "Memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize")
LOOKS = ("cudaEventSynchronize", "cuEventSynchronize")  # at a flag that was copied steps ago


def tally(events: Iterable[tuple[str, bool]]) -> Counter:
    """Counts launches, copies, waits and looks among (name, whether it ran on the device) of a profile's events."""
    counts: Counter = Counter()
    for name, on_device in events:
        if on_device:
            counts["copies" if name.startswith(COPIES) else "launches"] += 1
        else:
            counts["waits"] += name in WAITS
            counts["looks"] += name in LOOKS
    return counts


def profile(call: Callable[[], Any]) -> Counter:
    """Counts what one call, the second, launches and waits for."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
    return tally((event.name, event.device_type == DeviceType.CUDA) for event in seen.events())


def run(device: torch.device) -> Iterator[Record]:
    """Yields a record for each of our solvers and torchdeq's, per step; on CUDA only.

    `syncs` are waits for all that was launched, `looks` those for the flag that the loop reads late, `copies` those
    between host and device or of memory.
    """
    if device.type != "cuda":
        return
    for width in WIDTHS:
        yield from _of_width(width, device)


def _of_width(width: int, device: torch.device) -> Iterator[Record]:
    f, z0 = steps.problem(ROWS, width, 1.2, device)
    solves = {
        name: lambda n, s=s: tdeq.fixed_point(f, z0, solver=s, tol=1e-12, max_steps=n) for name, s in steps.OURS.items()
    }
    for name, solver in rivals.solvers().items():
        if name.startswith("torchdeq"):
            solves[name] = lambda n, s=solver: s(f, z0, 0.0, n)
    with torch.no_grad():
        cell = profile(lambda: f(z0))["launches"]
        for name, solve in solves.items():
            few, many = profile(lambda s=solve: s(FEW)), profile(lambda s=solve: s(MANY))
            each = {kind: (many[kind] - few[kind]) / (MANY - FEW) for kind in ("launches", "copies", "waits", "looks")}
            record = {"kind": "launches", "case": f"{ROWS}x{width}", "rows": ROWS, "width": width, "contestant": name}
            record |= {"launches": each["launches"] - cell, "syncs": each["waits"], "looks": each["looks"]}
            yield record | {"copies": each["copies"], "wrong": None}
