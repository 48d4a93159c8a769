"""Cycles of a step in a whole solve, counted in the machine code of the kernels: `python -m tritondeq.bench.cycles`.

A model of one multiprocessor of sm_90 at 1.75 GHz, which no GPU has confirmed. Each of four schedulers issues an
instruction of a warp a cycle, a special function takes 8 of its cycles, and tensor cores do 4096 FLOP a cycle by wgmma,
half of that by mma. A program that is alone on its multiprocessor does one after the other and waits 500 cycles for
sums and barriers; of several the slowest unit counts, and a quarter more. The compiler runs here, without a GPU; the
table is that of CYCLES.md, from which predict.py reads.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels import jobs, launch, offline
from .common import markdown_table

CHIP, CLOCK, WGMMA, WAIT, SHARE = 90, 1.75e9, 4096, 500, 1.25
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
FEW, MANY = 1, 1 << 20  # rows, of which the tile is made for latency or for throughput
FILE = Path(__file__).parent / "CYCLES.md"
SHAPES = {"affine": lambda d: [(d, d)], "gated": lambda d: [(d, d)] * 3, "mlp": lambda d: [(2 * d, d), (d, 2 * d)]}
HEAD = [
    "kernel",
    "tile",
    "registers",
    "spills",
    "instructions",
    "issue",
    "special",
    "tensor",
    "programs",
    "us",
    "rows / us",
]


@dataclass(frozen=True)
class Kernel:
    """A whole solve of `features`, or its adjoint, at one launch."""

    cell: str
    features: int
    terms: int
    act: str
    adjoint: bool = False
    rows: int = FEW
    form: str | None = None
    tile: tuple[int, int] | None = None  # rows and warps, in place of the pure function's

    def __str__(self) -> str:
        kind = "adjoint" if self.adjoint else self.act
        return f"{self.cell} {self.features}, {self.terms} term{'s' * (self.terms > 1)}, {kind}, {self.many}"

    @property
    def many(self) -> str:
        return "few rows" if self.rows == FEW else "many"

    @property
    def config(self) -> dict[str, Any]:
        shape = {"batch": self.rows, "shapes": SHAPES[self.cell](self.features), "terms": self.terms, "memory": 0}
        config = launch.parameters(self.cell, **shape, **offline.limits(CHIP))
        if self.tile is None:
            return config
        return config | {"BLOCK_B": self.tile[0], "REFILL": self.tile[0] // 2, "num_warps": self.tile[1]}

    def job(self) -> dict[str, Any]:
        of = {"shapes": SHAPES[self.cell](self.features), "terms": self.terms, "memory": 0, "form": self.form}
        return jobs.rows(self.cell, CHIP, self.config, **of, act=self.act, adj=self.adjoint)


def kernels() -> list[Kernel]:
    """Those that targets are about."""
    made = []
    for rows in (FEW, MANY):
        for features in (64, 128, 256):
            made.append(Kernel("affine", features, 1, "fast_tanh", rows=rows))
            made.append(Kernel("affine", features, 1, "tanh", rows=rows))
            made.append(Kernel("affine", features, 1, "tanh", adjoint=True, rows=rows))
            if features < 256:  # wider, the second term does not stay in shared memory
                made.append(Kernel("affine", features, 2, "tanh", rows=rows))
                made.append(Kernel("affine", features, 2, "tanh", adjoint=True, rows=rows))
    return [*made, Kernel("gated", 128, 1, "fast_tanh"), Kernel("mlp", 128, 1, "fast_gelu", form="post")]


def tiles() -> list[Kernel]:
    """Those between which the pure function chooses for many rows in one term."""
    cases = [(128, 64, 8, "tanh"), (128, 64, 8, "fast_tanh"), (128, 32, 4, "fast_tanh"), (128, 64, 4, "fast_tanh")]
    cases += [(256, 32, 8, "tanh"), (256, 32, 8, "fast_tanh"), (256, 64, 8, "fast_tanh")]
    return [Kernel("affine", d, 1, act, rows=MANY, tile=(rows, warps)) for d, rows, warps, act in cases]


@dataclass(frozen=True)
class Count:
    """What the compiler made of one.

    Attributes:
        issue, special, tensor: Cycles of a step of a tile, by unit.
        programs: On a multiprocessor at once.
    """

    kernel: Kernel
    registers: int
    spills: int
    instructions: int
    issue: float
    special: float
    tensor: float
    programs: int

    @property
    def latency(self) -> float:
        """Seconds of a step of a tile alone."""
        return (self.issue + self.tensor + WAIT) / CLOCK

    @property
    def rate(self) -> float:
        """Rows x steps a second of an H100 that is full."""
        each = self.latency if self.programs == 1 else max(self.issue, self.special, self.tensor) * SHARE / CLOCK
        return launch.PROCESSORS * self.kernel.config["BLOCK_B"] / each

    def row(self) -> list[str]:
        config = self.kernel.config
        units = [f"{cycles:.0f}" for cycles in (self.issue, self.special, self.tensor)]
        code = [str(self.registers), str(self.spills), str(self.instructions)]
        tile = f"{config['BLOCK_B']} rows, {config['num_warps']} warps"
        times = [f"{self.latency * 1e6:.2f}", f"{self.rate / 1e6:.0f}"]
        return [str(self.kernel), tile, *code, *units, str(self.programs), *times]


def count(wanted: list[Kernel]) -> list[Count]:
    """Compiles them."""
    return [_count(kernel, seen) for kernel, seen in zip(wanted, offline.run([k.job() for k in wanted]), strict=True)]


def _count(kernel: Kernel, seen: dict[str, Any]) -> Count:
    config, hot = kernel.config, seen["hot"]
    warps, rows = config["num_warps"], config["BLOCK_B"]
    work = 2 * rows * kernel.terms * sum(n * m for n, m in SHAPES[kernel.cell](kernel.features))
    registers = -(-seen["registers"] // 8) * 8 * 32 * warps
    shared = offline.SHARED[CHIP] // (seen["shared"] + 1024)
    return Count(
        kernel,
        seen["registers"],
        hot.get("LDL", 0) + hot.get("STL", 0),
        sum(hot.values()),
        issue=sum(hot.values()) * warps / 4,
        special=hot.get("MUFU", 0) * 8 * warps / 4,
        tensor=work / (WGMMA if hot.get("HGMMA") else WGMMA / 2),
        programs=max(1, min(REGISTERS // registers, shared, THREADS // (32 * warps), config["programs"])),
    )


def read(path: Path = FILE) -> dict[str, tuple[float, float]]:
    """By a kernel's name, (seconds of a step of a tile alone, rows x steps a second of a full GPU) of the table."""
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: (1e-6 * float(row[-2]), 1e6 * float(row[-1])) for row in rows[2:]}  # behind the head and its rule


def main(argv: list[str] | None = None) -> None:
    """Prints the table, or with --write replaces that of a file."""
    parser = argparse.ArgumentParser("python -m tritondeq.bench.cycles", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table of this file, CYCLES.md")
    parser.add_argument("--tiles", action="store_true", help="print the tiles that NOTES.md compares instead")
    arguments = parser.parse_args(argv)
    wanted, path = tiles() if arguments.tiles else kernels(), arguments.write
    table = "\n".join(markdown_table([HEAD, *(one.row() for one in count(wanted))]))
    if path is None or arguments.tiles:
        print(table)
        return
    text = path.read_text()
    path.write_text(text[: text.index("| kernel |")] + table + "\n")


if __name__ == "__main__":
    main()
