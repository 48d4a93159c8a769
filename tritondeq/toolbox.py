"""Small tools that the commands share: a table, an output folder, one CPU thread, and the memory of a training step.

It needs nothing beside torch, because `doctor` and `tune` run on a bare installation.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .layout import pytree


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Makes a folder and writes to it, or raises OSError; a block that fails leaves no new empty folder."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if new and not any(out.iterdir()):
            out.rmdir()
        raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Gives torch one CPU thread: small nets gain nothing from a second, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in plain text: its first column is aligned to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Returns the mean and, of several values, the standard deviation: "98.3 ± 0.4"."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def parameters(net: nn.Module) -> int:
    """Returns the number of a net's parameters."""
    return sum(p.numel() for p in net.parameters())


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory(TorchDispatchMode):
    """Measures in `peak` the bytes at the peak of what is allocated under it, beside all that existed before.

    On CUDA the caching allocator counts, and `peak` is known when the block has ended. On a CPU the storages of tensors
    that operations return are counted, and how many there were is in `allocations`; what an operation uses inside
    itself does not show.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.cuda = device if device.type == "cuda" else None
        self.live: dict[int, int] = {}  # bytes by storage
        self.bytes = self.peak = self.allocations = 0

    def __enter__(self) -> "PeakMemory":
        if self.cuda is None:
            return super().__enter__()
        torch.cuda.synchronize(self.cuda)
        torch.cuda.reset_peak_memory_stats(self.cuda)
        self.bytes = torch.cuda.memory_allocated(self.cuda)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda is None:
            return super().__exit__(*error)
        torch.cuda.synchronize(self.cuda)
        self.peak = torch.cuda.max_memory_allocated(self.cuda) - self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in old and key not in self.live:
                self.live[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.allocations += 1
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, key: int) -> None:
        self.bytes -= self.live.pop(key)


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in storages}


def training_memory(net: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns the bytes at the peak of one training step, beside parameters, gradients and what existed before."""
    loss().backward()  # gradients, and what libraries allocate once
    with PeakMemory(next(net.parameters()).device) as memory:
        loss().backward()
    net.zero_grad()
    return memory.peak
