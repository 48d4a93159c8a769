"""Ten figures of a GPU: a whole solve or a step of each kind, on the device and on the host apart.

On the device a call is replayed from a CUDA graph, without the host. On the host it is launched without a wait, so that
its time is what Python, torch and the driver take; the queue is emptied before it is full. Without a GPU a call runs
once, where kernels run at all, and nothing is timed.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from tritondeq import Anderson, Broyden, Picard
from tritondeq.kernels import dispatch
from tritondeq.kernels.tails import Tail

from . import measure

Call = Callable[[], Any]
LAUNCHES, ROUNDS = (
    40,
    5,
)  # calls that are launched without a wait, and how often; a queue holds about a thousand kernels
FOREVER = 2**30  # steps
OPTIONS: dict[str, Any] = {"tol": 1e-4, "max_steps": 50}


def run(device: torch.device, how: str | None) -> Iterator[dict[str, Any]]:
    """Yields a record for each figure; `device` and `host` are seconds of a call, None where none was measured."""
    for name, size, make in calls(device.type == "cuda"):
        record = {"name": name, "size": size, "device": None, "host": None, "note": None, "wrong": None}
        try:
            with torch.no_grad():
                if how:
                    call = make(device)
                    call()
                    if device.type == "cuda":
                        record |= {"host": host_seconds(call, device), "device": measure.replayed(call, device)}
        except Exception as error:
            record["wrong"] = f"raised {type(error).__name__}: {measure.line(error)}"
        if record["device"] is None:
            record["note"] = "no graph took it" if device.type == "cuda" else "not measured on a GPU"
        yield record


def host_seconds(call: Call, device: torch.device) -> float:
    """Returns the seconds that the host takes to launch a call: the least mean of a few rounds."""
    least = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        least = min(least, (time.perf_counter() - begin) / LAUNCHES)
    torch.cuda.synchronize(device)
    return least


def calls(large: bool) -> list[tuple[str, str, Callable[[torch.device], Call]]]:
    """Returns (what is timed, its size, what makes the call on a device) of each figure; small ones take no time."""
    rows, wide, narrow = (256, 1024, 64) if large else (4, 48, 16)
    side = 32 if large else 5
    width = 2 * narrow
    one, two, three = f"{rows} x {width}", f"{rows} x {narrow}", f"{rows} x {wide}"
    return [
        ("rows.affine solve", one, lambda d: _affine(rows, width, "solve", d)),
        ("rows.affine adjoint", one, lambda d: _affine(rows, width, "adjoint", d)),
        ("rows.mlp solve", two, lambda d: _mlp(rows, narrow, d)),
        ("rows.gated solve", two, lambda d: _gated(rows, narrow, d)),
        ("steps.picard step", three, lambda d: _step(Picard(), rows, wide, d)),
        ("steps.anderson step", three, lambda d: _step(Anderson(), rows, wide, d)),
        ("steps.broyden step", three, lambda d: _step(Broyden(), rows, wide, d)),
        ("steps.affine step", three, lambda d: _product(rows, wide, d)),
        ("norms.group_norm", f"8 x {narrow} x {side} x {side}", lambda d: _group_norm(narrow, side, d)),
        ("norms.residual_rms", three, lambda d: _residual_rms(rows, wide, d)),
    ]


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device)


def _affine(rows: int, width: int, way: str, device: torch.device) -> Call:
    w, u = _random(device, width, width, scale=0.3 / width**0.5), _random(device, rows, width)
    solve, inputs = getattr(dispatch.load("rows.affine"), way), (w, u) if way == "solve" else (w, u, u)
    return lambda: solve(*inputs, activation="tanh", **OPTIONS)


def _mlp(rows: int, width: int, device: torch.device) -> Call:
    weights = [_random(device, *size, scale=0.3 / width**0.5) for size in ((2 * width, width), (width, 2 * width))]
    biases, scale = [_random(device, len(w)) for w in weights], 0.6 * torch.ones(width, device=device)
    u, solve = _random(device, rows, width), dispatch.load("rows.mlp").solve
    return lambda: solve(weights, biases, scale, u, form="post", activation="silu", **OPTIONS)


def _gated(rows: int, width: int, device: torch.device) -> Call:
    weights = [_random(device, width, width, scale=0.3 / width**0.5)] * 3
    inputs, solve = [_random(device, rows, width)] * 3, dispatch.load("rows.gated").solve
    return lambda: solve(weights, inputs, **OPTIONS)


def _step(solver: Any, rows: int, width: int, device: torch.device) -> Call:
    """A step whose image is far from its iterate, each time: no sample stops."""
    z, y = _random(device, rows, width), 3 * _random(device, rows, width + 1)[:, 1:].contiguous()
    steps = dispatch.load(solver.fused_steps).start(z, None, 1e-30, FOREVER, Tail(), **asdict(solver))
    return partial(steps.take, y)


def _product(rows: int, width: int, device: torch.device) -> Call:
    """A step of z = u - z, which moves for ever."""
    w, u = -torch.eye(width, device=device), _random(device, rows, width)
    options = {"activation": "identity", "tol": 1e-30, "max_steps": FOREVER}
    steps = dispatch.load("steps.affine").solve(w, u, torch.zeros_like(u), **options)
    return partial(steps.take)


def _group_norm(channels: int, side: int, device: torch.device) -> Call:
    x, vector = _random(device, 8, side, side, channels).movedim(-1, 1), _random(device, channels)
    op = dispatch.load("norms.group_norm")
    return lambda: op.run(x, x, vector, vector, 8, 1e-5, "before")


def _residual_rms(rows: int, width: int, device: torch.device) -> Call:
    x, vector = _random(device, rows, width), _random(device, width)
    op = dispatch.load("norms.residual_rms")
    return lambda: op.run(x, x, vector, vector, 1e-6)
