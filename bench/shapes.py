"""Cells and shapes that are measured, as the command line names them, and whether they fit in memory."""

import argparse
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tritondeq as tdeq

DTYPES = ("fp32", "bf16")
TOKENS, SIDE = 256, 16  # of a whole sequence, and of a whole image
MOST = 2**31 - 1
BLOCKS = 16  # that the explicit nets are reckoned to have
HELD = 26  # states of a forward solve at most: torchdeq's Anderson; and then one result of each contestant
RESULTS = 12
# Of a cell: its name in tables, states that autograd saves of an evaluation, about, and weights in units of width^2.
CELLS = {
    "affine": ("Affine", 2, 1),
    "monotone": ("Monotone", 2, 3),
    "mlp": ("MLP", 8, 4),
    "gated": ("Gated", 7, 3),
    "transformer": ("Transformer", 24, 12),
    "conv": ("Conv", 6, 18),
}
ROWWISE = ("affine", "monotone", "mlp", "gated")
DEFAULTS = {"cell": ["affine"], "features": [128], "rows": [1024], "dtype": ["fp32"]}


@dataclass(frozen=True)
class Shape:
    """A cell of `features` features, and the `rows` rows, tokens or pixels it is solved for; `low` is bf16."""

    cell: str
    features: int
    rows: int
    low: bool = False

    def __str__(self) -> str:
        return f"{CELLS[self.cell][0]} {self.rows}x{self.features} {DTYPES[self.low]}"

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of the input.

        Sequences and images are whole where there are rows for one, and their number is rounded up.
        """
        if self.cell == "transformer":
            tokens = min(self.rows, TOKENS)
            return -(-self.rows // tokens), tokens, self.features
        if self.cell == "conv":
            side = min(SIDE, max(2, math.isqrt(self.rows)))
            return -(-self.rows // side**2), self.features, side, side
        return self.rows, self.features

    @property
    def positions(self) -> int:
        """The number of rows there are after rounding up."""
        return math.prod(self.dims) // self.features

    def make(self, device: torch.device) -> nn.Module:
        """Returns the cell; `low` makes the operands bf16 where rows are treated one by one, else the whole cell."""
        name, width = CELLS[self.cell][0], self.features
        kind, made = getattr(tdeq.cells, name), {"device": device}
        if self.cell in ROWWISE:
            return kind(width, operands=DTYPES[self.low], **made)
        made["dtype"] = torch.bfloat16 if self.low else torch.float32
        if self.cell == "conv":
            return kind(
                width, groups=max(g for g in (1, 2, 4, 8) if width % g == 0 and (width >= 4 * g or g == 1)), **made
            )
        heads = max(h for h in (1, 2, 4, 8) if width % h == 0 and (width // h % 2 == 0 or h == 1))
        rotary = 1e4 if width // heads % 2 == 0 else None
        return kind(width, heads=heads, causal=True, rotary=rotary, wiring="damped", **made)

    @property
    def bytes(self) -> int:
        """What a case takes at most, about: our states, those of the rivals, and explicit nets of BLOCKS blocks."""
        _, saved, weights = CELLS[self.cell]
        state = 4 * math.prod(self.dims)
        return (RESULTS + max(HELD, BLOCKS * saved)) * state + 3 * (BLOCKS + 2) * weights * 4 * self.features**2


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name shapes."""
    group = parser.add_argument_group("shapes", "any of these replaces those of the suite; several values are combined")
    group.add_argument("--cell", nargs="+", type=_cell, metavar="NAME", help=f"of {', '.join(CELLS)}; default: affine")
    group.add_argument("--features", nargs="+", type=_size, metavar="N", help="width of the state; default: 128")
    text = f"rows of a batch, its tokens (in sequences of {TOKENS}) or pixels (of {SIDE} x {SIDE}); default: 1024"
    group.add_argument("--rows", nargs="+", type=_size, metavar="N", help=text)
    group.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the operands; default: fp32")


def asked(arguments: argparse.Namespace) -> list[Shape]:
    """Returns the shapes that the options name, none if they name none."""
    given = {name: getattr(arguments, name) for name in DEFAULTS}
    if not any(given.values()):
        return []
    values = [dict.fromkeys(given[name] or default) for name, default in DEFAULTS.items()]
    return [Shape(cell, features, rows, dtype == "bf16") for cell, features, rows, dtype in itertools.product(*values)]


def too_large(shapes: list[Shape], device: torch.device) -> str | None:
    """Returns why the largest of them can't be measured on this device and what to do, or None."""
    room = available(device)
    most = max(shapes, key=lambda shape: shape.bytes, default=None)
    if most is None or room is None or most.bytes <= room:
        return None
    fits = most.rows * room // most.bytes
    lower = f"--rows to {fits}, or --features" if fits else "--features"
    return (
        f"{most} takes about {most.bytes / 2**30:.1f} GiB with all rivals, and {room / 2**30:.1f} GiB are free: "
        f"lower {lower}"
    )


def available(device: torch.device) -> int | None:
    """Returns the bytes that are free on the device, or None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(match[1]) if match else None


def _cell(text: str) -> str:
    if text.lower() not in CELLS:
        raise argparse.ArgumentTypeError(f"takes {', '.join(CELLS)}, got {text!r}")
    return text.lower()


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"takes an integer from 1 to {MOST}, got {text!r}")
    return int(text)
