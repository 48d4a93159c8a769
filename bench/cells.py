"""How every cell begins: `python -m tritondeq.bench.cells` prints a table, in a few minutes on a CPU.

At initialisation: the spectral radius of df/dz at the fixed point, and the evaluations that its default solver takes
to a relative residual of 1e-3, the most over seeds and samples.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import cells

from .report import markdown

WIDTHS = (16, 64, 256, 1024)
TOKENS, PIXELS = 32, 8  # of a sequence, and a side of an image
PRODUCTS = 30

# Of a width: the cell and the shape of one sample of its input.
MAKE: dict[str, Callable[[int], tuple[nn.Module, tuple[int, ...]]]] = {
    "Affine": lambda d: (cells.Affine(d), (d,)),
    "Affine, gelu": lambda d: (cells.Affine(d, activation="gelu"), (d,)),
    "Monotone": lambda d: (cells.Monotone(d), (d,)),
    "Monotone, margin 0.1": lambda d: (cells.Monotone(d, margin=0.1), (d,)),
    "MLP, post": lambda d: (cells.MLP(d), (d,)),
    "MLP, post, swiglu": lambda d: (cells.MLP(d, activation="swiglu"), (d,)),
    "MLP, pre": lambda d: (cells.MLP(d, form="pre"), (d,)),
    "MLP, pre, swiglu": lambda d: (cells.MLP(d, form="pre", activation="swiglu"), (d,)),
    "Gated": lambda d: (cells.Gated(d), (d,)),
    "Transformer, outer": lambda d: (cells.Transformer(d, wiring="outer"), (TOKENS, d)),
    "Transformer, damped": lambda d: (cells.Transformer(d, wiring="damped"), (TOKENS, d)),
    "Transformer, head": lambda d: (cells.Transformer(d, wiring="head"), (TOKENS, d)),
    "Conv": lambda d: (cells.Conv(d, groups=4), (d, PIXELS, PIXELS)),
    "MultiScale": lambda d: (cells.MultiScale((d, d), groups=4), (d, PIXELS, PIXELS)),
}
WIDEST = {"Conv": 256, "MultiScale": 256}


def start(name: str, width: int, samples: int = 4, seeds: int = 3) -> tuple[float, float]:
    """Returns (spectral radius, evaluations to 1e-3) of a cell at initialisation, the most over samples and seeds."""
    radii, steps = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        cell, shape = MAKE[name](width)
        layer, x = tdeq.DEQ(cell, tol=1e-5, max_steps=200), torch.randn(samples, *shape)
        z = layer(x)
        layer.tol = 1e-3
        layer(x)
        steps.append(layer.last.steps.max().item() if layer.last.converged.all() else float("inf"))
        radii.append(tdeq.spectral_radius(layer, z, x, products=PRODUCTS).max().item())
    return max(radii), max(steps)


def rows(names: Iterable[str] = MAKE, widths: tuple[int, ...] = WIDTHS) -> list[list[str]]:
    """Returns the table, its head first: a row a cell, a column a width."""
    made = [["cell", *map(str, widths)]]
    for name in names:
        each = [start(name, width) if width <= WIDEST.get(name, width) else None for width in widths]
        made.append([name, *(f"{one[0]:.2f}, {one[1]}" if one else "" for one in each)])
    return made


if __name__ == "__main__":
    print(markdown(rows()))
