"""A trained equilibrium or loop at other tolerances and numbers of steps, and begun where it ended before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tritondeq as tdeq

from . import contestants as who

STARTS = ("cold", "warm", "ahead")  # from nothing; from the last state; from the line through the last two


def core(body: nn.Module) -> tdeq.DEQ | None:
    """The part of a contestant's body that iterates, an equilibrium or a loop; None in a stack."""
    inner = body.core if isinstance(body, who.Hybrid) else body
    return inner if isinstance(inner, tdeq.DEQ) else None


@contextmanager
def changed(core: tdeq.DEQ, **fields: Any) -> Iterator[None]:
    """With other fields, such as `tol`."""
    old = {name: getattr(core, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(core, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(core, name, value)


def taking(core: tdeq.DEQ, steps: int, tol: float) -> Any:
    """`changed`: a loop takes that many steps, an equilibrium at most, which stops at `tol`."""
    looped = isinstance(core.adjoint, tdeq.Unrolled)
    return changed(core, **({"adjoint": tdeq.Unrolled(steps)} if looped else {"max_steps": steps, "tol": tol}))


@torch.no_grad()
def follow(core: tdeq.DEQ, into: Tensor, ahead: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Samples `into` [S, ...] one after another, each begun warm, or with `ahead` on the line: z, steps, residuals."""
    states, steps, residuals = [], [], []
    for sample in into.split(1):
        start = states[-1] if states else None
        if ahead and len(states) > 1:
            start = 2 * states[-1] - states[-2]
        solution = core.solve(sample, start)
        states.append(solution.value)
        steps.append(solution.steps)
        residuals.append(solution.residual)
    return tuple(torch.cat(parts) for parts in (states, steps, residuals))


@torch.no_grad()
def by_start(core: tdeq.DEQ, into: Tensor, tols: list[float], told: float) -> dict[str, Any]:
    """Counts the steps of a stream of samples but its first.

    Returns curves over tolerances, `cold_by_tol`, `warm_by_tol`, `ahead_by_tol`, and `saved_by_tol`, by how many % warm
    are fewer than cold ones.
    At the tolerance `told` also the four numbers, the largest residual of each start, and `apart`, the largest relative
    distance of what is found warm from what is found cold.
    """
    found: dict[str, Any] = {f"{name}_by_tol": [] for name in (*STARTS, "saved")}
    for tol in tols:
        with changed(core, tol=tol):
            alone = core.solve(into)
            each = {"cold": (alone.value, alone.steps, alone.residual), "warm": follow(core, into)}
            each["ahead"] = follow(core, into, ahead=True)
        steps = {name: taken[1:].float().mean().item() for name, (_, taken, _) in each.items()}
        steps["saved"] = 100 * (1 - steps["warm"] / steps["cold"])
        for name, count in steps.items():
            found[f"{name}_by_tol"].append([tol, count])
        if tol == told:
            found |= steps | {f"{name}_residual": residual.max().item() for name, (_, _, residual) in each.items()}
            cold, warm = each["cold"][0], each["warm"][0]
            found["apart"] = ((warm - cold).flatten(1).norm(dim=1) / cold.flatten(1).norm(dim=1)).max().item()
    return found
