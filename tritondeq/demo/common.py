"""What the demonstrations share: options, the folder, tables, and how training memory is measured."""

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layout import pytree

QUICK = "A quick run: it shows that all works. Nothing is trained to the end, so its numbers say nothing."


@dataclass(frozen=True)
class Options:
    """How a demonstration is run.

    Attributes:
        seeds: How many seeds: `seed`, `seed` + 1, ...
        out: Folder of the pictures, made if need be.
        quick: A run of seconds that shows that all works, and nothing else.
    """

    seeds: int
    seed: int
    out: Path
    device: torch.device
    quick: bool = False

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Makes the folder and writes to it once, so that a run does not fail at its end; a failed run leaves no empty one.

    Raises:
        OSError: it can't be written to; the message is a sentence.
    """
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
    """Nets this small gain nothing from a second CPU thread, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text, columns aligned: the first to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several values, the standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def training_memory(net: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes at the peak of one training step, beside parameters, their gradients and what else exists before it."""
    device = next(net.parameters()).device
    loss().backward()  # gradients, and what libraries allocate once
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss().backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _Storages() as storages:
            loss().backward()
        peak = storages.peak
    net.zero_grad()
    return peak


class _Storages(TorchDispatchMode):
    """Counts the bytes that tensors made under it hold: on a CPU nobody else does."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}  # bytes by address
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        old = _storages((args, kwargs))
        for address, storage in _storages(out).items():
            if address not in old and address not in self.live:
                self.live[address] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, address)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """By address, of all tensors in there."""
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
