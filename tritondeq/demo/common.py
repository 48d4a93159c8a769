"""What the demonstrations share: options, tables, and how training memory is measured."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn


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


def make_writable(out: Path) -> None:
    """Makes the folder and writes to it once, so that a run does not fail at its end.

    Raises:
        OSError: it can't be written to; the message is a sentence.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Nets this small gain nothing from a second CPU thread, and lose a factor of 50 where cores are shared."""
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


def memory_label(device: torch.device) -> str:
    """What `training_memory` measures there."""
    return "peak memory, MiB" if device.type == "cuda" else "saved for backward, MiB"


def training_memory(net: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that one training step needs beside parameters and gradients that exist already.

    On a GPU the peak of allocated memory over forward and backward, less what was allocated before. On a CPU, where
    nobody counts, the storages that autograd keeps for the backward pass: each once, parameters left out.
    """
    device = next(net.parameters()).device
    net.zero_grad(set_to_none=False)
    if device.type == "cuda":
        loss().backward()  # gradients, and what libraries allocate once
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss().backward()
        torch.cuda.synchronize(device)
        taken = torch.cuda.max_memory_allocated(device) - before
    else:
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept = {}  # by address; holding the storage keeps its address from being used again

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss().backward()
        taken = sum(storage.nbytes() for storage in kept.values())
    net.zero_grad()
    return taken


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
