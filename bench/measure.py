"""The clock, the counter of operations, and how contestants are tried and timed."""

import collections
import contextlib
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritondeq.layout import pytree

Record = dict[str, Any]
BURST = 4
AGAIN = 5.0  # seconds after which a deadline that some code swallowed is raised again
OURS = ("tritondeq", "Picard", "Anderson")  # how the names of our contestants begin
READS = frozenset(["_local_scalar_dense", "_linalg_check_errors"])  # the host waits for a value
# What launches nothing: views, and allocations without a fill.
FREE = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh "
    "new_empty new_empty_strided permute reshape select slice split squeeze t transpose unbind unsqueeze view".split()
)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: The median of all calls.
        least: The shortest call.
        cuda: Whether it ran on a GPU.
    """

    median: float
    least: float
    cuda: bool

    @property
    def seconds(self) -> float:
        """What ratios are made of: the median on a GPU; the least on a CPU, to which other processes only ever add."""
        return self.median if self.cuda else self.least


def clock(calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float = 0.3) -> dict[str, Timing]:
    """Times each call.

    Args:
        calls: By name; each is warmed up here.
        device: On CUDA the clock is triton.testing.do_bench; on a CPU time.perf_counter, BURST calls of each in turn:
            a disturbance hits all contestants, and each also runs after itself, with its data in the caches.
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
    """Times one call on the device alone, by replays of a CUDA graph; returns None on a CPU or where that fails."""
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
    """Calls each contestant once and returns (outcomes, faults), by name.

    A rival that can't run here is taken out of `calls`. An error of ours is a fault, unless memory or a compiler is
    missing.

    Args:
        calls: By name.
        case: Its name, for `lose`.
        compiles: Whether there is time to compile one more contestant, which its first call does.
        lose: Takes a line about each contestant that was taken out, and why.

    Raises:
        torch.OutOfMemoryError: there is no room for ours.
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


def compare(
    calls: dict[str, Callable[[], Any]], faults: dict[str, str | None], device: torch.device, seconds: float
) -> Iterator[Record]:
    """Times all contestants if none has a fault, and yields what each record holds of that.

    `over_ours` is how many times as long a contestant takes as "tritondeq" does.
    """
    timed = {} if any(faults.values()) else clock(calls, device, seconds)
    for name in calls:
        record = {"contestant": name, "wrong": faults.get(name)}
        if name in timed:
            record |= times(timed[name]) | {"over_ours": timed[name].seconds / timed["tritondeq"].seconds}
        yield record


def times(timing: Timing, calls: int = 1) -> Record:
    """Returns the seconds of one of `calls` equal parts of what was timed, as a record holds them."""
    return {name: getattr(timing, name) / calls for name in ("seconds", "median", "least")}


def forget(device: torch.device) -> None:
    """Frees what earlier cases hold: compiled code, of which torch takes only so many versions, and GPU memory."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Returns whether the error means that memory is short, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def line(error: Exception) -> str:
    """Returns the first line of the error's message."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return lines[0] if lines else type(error).__name__


class Late(BaseException):
    """Time is up."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
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
        """The number of operations that launch something."""
        return self.counts.total()
