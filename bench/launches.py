"""What a step of the loop asks of the host on CUDA: launches beside the cell, and waits for the device (G12)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import tritondeq as tdeq

from . import rivals, steps

Record = dict[str, Any]
ROWS, WIDTHS = 32, (64, 4096)  # one program holds a sample, and two share it
FEW, MANY = 24, 72  # evaluations of the two solves whose difference is told
COPIES = ("Memcpy", "Memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize")
LOOKS = ("cudaEventSynchronize", "cuEventSynchronize")  # at a flag that was copied steps ago


def tally(events: Iterable[tuple[str, bool]]) -> Counter:
    """Launches, copies, waits and looks among (name, whether it ran on the device) of a profile's events."""
    counts: Counter = Counter()
    for name, on_device in events:
        if on_device:
            counts["copies" if name.startswith(COPIES) else "launches"] += 1
        else:
            counts["waits"] += name in WAITS
            counts["looks"] += name in LOOKS
    return counts


def profile(call: Callable[[], Any]) -> Counter:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
    return tally((event.name, event.device_type == DeviceType.CUDA) for event in seen.events())


def run(device: torch.device) -> Iterator[Record]:
    """Of our solvers and torchdeq's; on CUDA only. `syncs` are waits for all that was launched, `looks` those for the
    flag that the loop reads late, `copies` between host and device or of memory."""
    if device.type != "cuda":
        return
    for width in WIDTHS:
        yield from _of_width(width, device)


def _of_width(width: int, device: torch.device) -> Iterator[Record]:
    f, z0 = steps.problem(ROWS, width, 1.2, device)
    solves = {
        name: lambda n, s=s: tdeq.fixed_point(f, z0, solver=s, tol=1e-12, max_steps=n) for name, s in steps.OURS.items()
    }
    if rivals.has_torchdeq():
        solves["torchdeq Picard"] = lambda n: rivals.torchdeq_picard(f, z0, 0.0, n)
        solves["torchdeq Anderson(6)"] = lambda n: rivals.torchdeq_anderson(f, z0, 0.0, n)
    with torch.no_grad():
        cell = profile(lambda: f(z0))["launches"]
        for name, solve in solves.items():
            few, many = profile(lambda s=solve: s(FEW)), profile(lambda s=solve: s(MANY))
            each = {kind: (many[kind] - few[kind]) / (MANY - FEW) for kind in ("launches", "copies", "waits", "looks")}
            record = {"goal": "G12", "case": f"G12 {ROWS}x{width}", "rows": ROWS, "width": width, "contestant": name}
            record |= {"launches": each["launches"] - cell, "syncs": each["waits"], "looks": each["looks"]}
            yield record | {"copies": each["copies"], "wrong": None}
