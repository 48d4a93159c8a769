"""What a tritondeq solve is measured against: functions of the same map, start, tolerance and limit of evaluations.

Each solver takes (f, z0, tol, max_steps) with z0 [B, ...], stops when the worst sample's ||f(z) - z|| / ||f(z)|| is
below `tol`, as ours does sample by sample, and returns (z, evaluations of f).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .machine import installed

Map = Callable[[Tensor], Tensor]


def eager_picard(f: Map, z: Tensor, tol: float, max_steps: int) -> tuple[Tensor, int]:
    """Solves by the loop that a user writes."""
    steps = 0
    while steps < max_steps:
        y = f(z)
        steps += 1
        residual = torch.norm((y - z).flatten(1), dim=1) / (torch.norm(y.flatten(1), dim=1) + 1e-9)
        z = y
        if residual.max().item() < tol:
            break
    return z, steps


def eager_anderson(
    f: Map, z0: Tensor, tol: float, max_steps: int, m: int = 5, ridge: float = 1e-4
) -> tuple[Tensor, int]:
    """Solves by the tutorial's Anderson (NeurIPS 2020 "Deep Implicit Layers", chapter 4), with its absolute ridge."""
    batch, width = len(z0), z0[0].numel()

    def flat(z: Tensor) -> Tensor:
        return f(z.view_as(z0)).reshape(batch, width)

    x, y = (z0.new_zeros(batch, m, width) for _ in range(2))
    x[:, 0], y[:, 0] = z0.reshape(batch, width), flat(z0)
    x[:, 1], y[:, 1] = y[:, 0], flat(y[:, 0].contiguous())
    system = z0.new_zeros(batch, m + 1, m + 1)
    system[:, 0, 1:] = system[:, 1:, 0] = 1
    rhs = z0.new_zeros(batch, m + 1, 1)
    rhs[:, 0] = 1
    last = 1
    for k in range(2, max_steps):
        n = min(k, m)
        g = y[:, :n] - x[:, :n]
        eye = torch.eye(n, dtype=z0.dtype, device=z0.device)
        system[:, 1 : n + 1, 1 : n + 1] = torch.bmm(g, g.mT) + ridge * eye
        alpha = torch.linalg.solve(system[:, : n + 1, : n + 1], rhs[:, : n + 1])[:, 1:, 0]
        last = k % m
        x[:, last] = (alpha[:, None] @ y[:, :n])[:, 0]
        y[:, last] = flat(x[:, last].contiguous())
        residual = (y[:, last] - x[:, last]).norm(dim=1) / (y[:, last].norm(dim=1) + 1e-9)
        if residual.max().item() < tol:
            break
    return y[:, last].reshape(z0.shape), k + 1


def _torchdeq(solver: str, f: Map, z0: Tensor, tol: float, max_steps: int) -> tuple[Tensor, int]:
    from torchdeq.solver import get_solver

    evaluations = 0

    def counted(z):
        nonlocal evaluations
        evaluations += 1
        return f(z)

    z, _, _ = get_solver(solver)(counted, z0, max_iter=max_steps, tol=tol, stop_mode="rel")
    return z, evaluations


SOLVERS: dict[str, Callable] = {
    "eager loop": eager_picard,
    "eager Anderson": eager_anderson,
    "torchdeq Picard": partial(_torchdeq, "fixed_point_iter"),
    "torchdeq Anderson": partial(_torchdeq, "anderson"),
}


def solvers() -> dict[str, Callable]:
    """Returns those of `SOLVERS` whose package is installed."""
    return {k: v for k, v in SOLVERS.items() if installed("torchdeq") or not k.startswith("torchdeq")}


class Tied(nn.Module):
    """The weight-tied explicit net: `steps` evaluations of the cell from zeros."""

    def __init__(self, cell: nn.Module, steps: int):
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last state, [B, ...] as x."""
        injection, z = self.cell.inject(x), torch.zeros_like(x)
        for _ in range(self.steps):
            z = self.cell(z, injection)
        return z


def compiled(net: nn.Module, graphs: bool) -> nn.Module:
    """Returns the net by torch.compile; with `graphs` at its best for one shape, as CUDA graphs."""
    return torch.compile(net, mode="max-autotune", dynamic=False) if graphs else torch.compile(net, dynamic=False)


class Stack(nn.Module):
    """The explicit net of untied blocks, from zeros.

    A block is a cell, `make()`; `skip` makes it z + f(z, x), for cells that are not residual blocks already.
    """

    def __init__(self, make: Callable[[], nn.Module], blocks: int, skip: bool):
        super().__init__()
        self.blocks, self.skip = nn.ModuleList(make() for _ in range(blocks)), skip

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last state, [B, ...] as x."""
        z = torch.zeros_like(x)
        for block in self.blocks:
            y = block(z, block.inject(x))
            z = z + y if self.skip else y
        return z


class TorchDEQ(nn.Module):
    """torchdeq's module over a cell of ours, with its implicit backward solved to the same tolerance."""

    def __init__(self, cell: nn.Module, solver: str, tol: float, max_steps: int):
        super().__init__()
        from torchdeq import get_deq

        self.cell = cell
        stop = {"max_iter": max_steps, "tol": tol, "stop_mode": "rel"}
        options = {f"{side}_{name}": value for side in "fb" for name, value in stop.items()}
        self.deq = get_deq(f_solver=solver, b_solver=solver, ift=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fixed point, [B, ...] as x."""
        injection = self.cell.inject(x)
        return self.deq(lambda z: self.cell(z, injection), torch.zeros_like(x))[0][-1]
