"""The machine a measurement is made on: its hardware and versions, and the limits that were measured on it."""

import importlib.util
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import measure


def installed(package: str) -> bool:
    """Returns whether the package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def describe(device: torch.device) -> dict[str, Any]:
    """Returns hardware, versions, commit, and the load of the CPU before the measurement."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "device": gpu or f"{_cpu()}, {cores} cores",
        "kind": device.type,
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchdeq": _version("torchdeq"),
        "tritondeq": _version("tritondeq"),
        "cuda": torch.version.cuda,
        "commit": commit(),
        "backend": "triton" if gpu and _version("triton") else "torch",
    }


def name_of(machine: dict[str, Any]) -> str:
    """Returns the name, without suffix, of a file of results from this machine."""
    if machine["kind"] == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return f"cpu-{machine['architecture']}-{machine['cores']}core"


def commit() -> str | None:
    """Returns the commit of this checkout, with -dirty where tracked files differ; None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def roofs(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Measures the limits: `copy` in bytes / s (reads and writes both count), `fp32` and `bf16` matmul in FLOP / s.

    On a GPU fp32 is measured as it is by default, without TF32.
    """
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512 if quick else 1024
    size = 1 << 30 if cuda else 1 << 24 if quick else 1 << 26
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, device=device).to(dtype)
        calls[name] = lambda a=a: a @ a
    if not cuda and quick:
        del calls["bf16"]  # slow where the CPU has no bf16 units, and no case of the suite uses it
    timed = measure.clock(calls, device, 0.1 if quick else 0.3)
    work = {"copy": 2.0 * size, "fp32": 2.0 * n**3, "bf16": 2.0 * n**3}
    return {name: work[name] / timing.seconds for name, timing in timed.items()}


def limit(flops: float, nbytes: float, roof: dict[str, float], kind: str) -> float | None:
    """Returns the seconds that the work takes at least: the larger of FLOPs and bytes over the measured limits."""
    rate = roof.get(kind) or roof.get("fp32")
    return max(flops / rate, nbytes / roof["copy"]) if rate and "copy" in roof else None


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
