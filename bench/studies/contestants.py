"""The contestants, all made of the same cell: `body("DEQ", make, depth)(x) -> z`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tritondeq as tdeq

DEQ, HYBRID, WIDE, STACK, LOOP, BLOCK = "DEQ", "hybrid", "wide DEQ", "stack", "loop", "block"
ALL = (DEQ, HYBRID, WIDE, STACK, LOOP, BLOCK)
RIVALS = (STACK, LOOP, BLOCK)
MEANS = {
    DEQ: "the fixed point of one cell",
    HYBRID: "a block, the fixed point of a cell, a block: each with its own weights",
    WIDE: "a DEQ as wide as it takes to have the parameters of the stack",
    STACK: "blocks one after another, each with its own weights",
    LOOP: "one block, as many times as the stack has blocks",
    BLOCK: "one block, once",
}


def inject(cell: nn.Module, x: Any) -> Any:
    """What the cell is given beside its state, as in a DEQ."""
    return cell.inject(x) if isinstance(cell, tdeq.cells.Cell) else x


class Stack(nn.Module):
    """Cells as blocks of an explicit net, z_k+1 = cell_k(z_k, x), from where a DEQ of the first would start."""

    def __init__(self, make: Callable[[], nn.Module], depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.change: Tensor | None = None

    def forward(self, x: Any, z0: Any = None) -> Any:
        """Z of the last block; `change` is then ||z - z before|| / ||z|| of each sample, which a residual would be."""
        z = z0
        for block in self.blocks:
            u = inject(block, x)
            if z is None:
                z = block.initial(x, u) if isinstance(block, tdeq.cells.Cell) else torch.zeros_like(x)
            before, z = z, block(z, u)
        if isinstance(z, Tensor):
            with torch.no_grad():
                self.change = (z - before).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
        return z


class Hybrid(nn.Module):
    """An explicit prelude, an equilibrium of what it returns, and an explicit coda, which sees x once more.

    The cell's x and z must be of one shape.
    """

    def __init__(self, make: Callable[[], nn.Module], **options: Any):
        super().__init__()
        self.prelude, self.core, self.coda = Stack(make, 1), tdeq.DEQ(make(), **options), Stack(make, 1)

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Returns z of the coda."""
        return self.coda(x, self.core(self.prelude(x), z0))


def body(contestant: str, make: Callable[[], nn.Module], depth: int, **options: Any) -> nn.Module:
    """The middle of a net, `forward(x, z0=None) -> z`.

    Args:
        contestant: One of ALL. A wide DEQ is a DEQ: it is the caller's cell that is wide.
        make: Makes a cell; weights are drawn anew at each call.
        depth: Blocks of the stack, and steps of the loop.
        options: Of tdeq.DEQ, for the implicit ones.

    Raises:
        ValueError: there is no such contestant.
    """
    if contestant in (DEQ, WIDE):
        return tdeq.DEQ(make(), **options)
    if contestant == HYBRID:
        return Hybrid(make, **options)
    if contestant == LOOP:
        return tdeq.DEQ(make(), adjoint=tdeq.Unrolled(depth))
    if contestant in (STACK, BLOCK):
        return Stack(make, depth if contestant == STACK else 1)
    raise ValueError(f"contestant must be one of {', '.join(ALL)}, got {contestant!r}")


def core(body: nn.Module) -> tdeq.DEQ | None:
    """What is solved for its equilibrium; None in explicit nets."""
    layer = body.core if isinstance(body, Hybrid) else body
    return None if not isinstance(layer, tdeq.DEQ) or isinstance(layer.adjoint, tdeq.Unrolled) else layer


def solution(body: nn.Module) -> tdeq.Solution | None:
    """What became of the last solve; None where there is no equilibrium, or none was asked for yet."""
    layer = core(body)
    return None if layer is None else layer.last


def steps(body: nn.Module) -> Tensor | float:
    """Blocks that each sample of the last call went through: a tensor for equilibria, else a number for all."""
    if isinstance(body, Stack):
        return float(len(body.blocks))
    if isinstance(body, Hybrid):
        return body.core.last.steps.float() + 2
    return float(body.adjoint.steps) if isinstance(body.adjoint, tdeq.Unrolled) else body.last.steps.float()


def effort(body: nn.Module) -> Tensor:
    """How far each sample of the last call was from rest, [B]: the relative change that its last block made."""
    if isinstance(body, Stack):
        return body.change
    return body.core.last.residual if isinstance(body, Hybrid) else body.last.residual


def matched(count: Callable[[int], int], target: int, widths: range) -> int:
    """The width whose parameter count is nearest to the target."""
    return min(widths, key=lambda width: abs(count(width) - target))
