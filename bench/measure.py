"""The clock, the count of operations, the machine and its roofs."""

import collections
import contextlib
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritondeq.layout import pytree

BURST = 4
AGAIN = 5.0  # seconds after which a deadline is called out again, should somebody have swallowed it
OURS = ("tritondeq", "Picard", "Anderson")  # how the names of our contestants begin
READS = frozenset(["_local_scalar_dense", "_linalg_check_errors"])  # the host waits for a value
# What launches nothing: views, and allocations without a fill.
FREE = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh "
    "new_empty new_empty_strided permute reshape select slice split squeeze t transpose unbind unsqueeze view".split()
)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call. `seconds` is what ratios are made of: the median on a GPU; the minimum on a CPU, whose other
    users only ever add to it."""

    median: float
    least: float
    cuda: bool

    @property
    def seconds(self) -> float:
        return self.median if self.cuda else self.least


def clock(calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float = 0.3) -> dict[str, Timing]:
    """Times each call.

    Args:
        calls: By name; each is warmed up here.
        device: On CUDA the clock is triton.testing.do_bench; on a CPU time.perf_counter, BURST calls of each in turn:
            a disturbance hits all contestants, and each also runs after itself, with its own data in the caches.
        seconds: How long to measure each, about.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        rep = round(seconds * 1e3)
        timed = {name: do_bench(call, warmup=25, rep=rep, quantiles=[0.5, 0.0]) for name, call in calls.items()}
        return {name: Timing(median * 1e-3, least * 1e-3, True) for name, (median, least) in timed.items()}
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds * len(calls), 0
    while rounds < 2 or time.perf_counter() < end:
        for name, call in calls.items():
            for _ in range(BURST):
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: Timing(statistics.median(t), min(t), False) for name, t in times.items()}


def replayed(call: Callable[[], Any], device: torch.device, seconds: float = 0.02) -> float | None:
    """Seconds of one call on the device alone, by replays of a CUDA graph; None on a CPU or where that fails."""
    if device.type != "cuda":
        return None
    from triton.testing import do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return 1e-3 * do_bench_cudagraph(call, rep=round(seconds * 1e3), return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None


def attempt(
    calls: dict[str, Callable[[], Any]], case: str, compiles: Callable[[], bool], lose: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls each once: (outcomes, faults), by name. A rival that can't be run here is taken out of `calls`; what ours
    raises is a fault, unless there is no room or no compiler for it.

    Args:
        compiles: Whether there is time to compile one more contestant, which its first call does.
        lose: Told of each contestant that was taken out, and why, in a line.
    """
    outcomes, faults = {}, {}
    for name, call in list(calls.items()):
        compiled, why = "compiled" in name, None
        try:
            if compiled and not compiles():
                why = "no time to compile it"
            else:
                outcomes[name] = pytree.tree_map_only(Tensor, Tensor.clone, call())  # CUDA graphs write over theirs
        except Exception as error:
            if out_of_memory(error):
                if name == "tritondeq":
                    raise
                why = "out of memory"
            elif compiled:
                why = f"torch.compile failed: {line(error)}"
            elif name.startswith(OURS):
                faults[name] = f"{name}: raised {type(error).__name__}: {line(error)}"
            else:
                why = f"raised {type(error).__name__}: {line(error)}"
        if why:
            lose(f"{case}, {name}: {why}")
            del calls[name]
    return outcomes, faults


def forget(device: torch.device) -> None:
    """Gives back what cases before took: compiled code, of which torch keeps few versions and then takes none any more,
    and memory of the GPU."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def line(error: Exception) -> str:
    """The first line of what it says."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return lines[0] if lines else type(error).__name__


class Late(BaseException):
    """Time is up."""


@contextlib.contextmanager
def deadline(seconds: float):
    """Raises Late when that much time has passed; in the main thread, and where the system has such alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Peak(TorchDispatchMode):
    """Most bytes of the tensors that were made under it and alive at once, in `most`: a CPU keeps no such count.

    What an operation uses inside itself does not show.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {_storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(made):
            if isinstance(t, Tensor) and _storage(t) not in known and _storage(t) not in self.alive:
                self._hold(t.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class AtenOps(TorchDispatchMode):
    """Counts the operations that launch something, by name in `counts`, and values that the host reads in `reads`."""

    def __init__(self):
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads += 1
        elif name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured where: hardware, versions, commit, and the load of the CPU before the measurement."""
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
    """File name, without suffix, for results of this machine."""
    if machine["kind"] == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return f"cpu-{machine['architecture']}-{machine['cores']}core"


def commit() -> str | None:
    """Commit of the checkout this file is in, with -dirty where tracked files differ; None where it is in none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def roofs(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Measured limits: `copy` in bytes / s (read and write both count), `fp32` and `bf16` matmul in FLOP / s.

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
        del calls["bf16"]  # slow where the CPU has no bf16 units, and nothing here uses it
    timed = clock(calls, device, 0.1 if quick else 0.3)
    work = {"copy": 2.0 * size, "fp32": 2.0 * n**3, "bf16": 2.0 * n**3}
    return {name: work[name] / timing.seconds for name, timing in timed.items()}


def limit(flops: float, nbytes: float, roof: dict[str, float], kind: str) -> float | None:
    """Seconds that the work takes at least: the larger of FLOPs and bytes over the measured roofs."""
    rate = roof.get(kind) or roof.get("fp32")
    return max(flops / rate, nbytes / roof["copy"]) if rate and "copy" in roof else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
