"""One training loop for all contestants, and what is measured of it: the same optimiser, steps and batches."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tritondeq as tdeq
from tritondeq.toolbox import parameters, synchronize, training_memory

from .contestants import solution, steps
from .study import Measure

CHECKS = 8  # points of a learning curve


def batches(seed: int, samples: int, batch: int, updates: int) -> Iterator[Tensor]:
    """Indices of so many batches: epochs in an order that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(updates):
        if len(order) < batch:
            order = torch.randperm(samples, generator=generator)
        yield order[:batch]
        order = order[batch:]


class Clock:
    """Counts seconds of work.

    Of this process's CPU where the work is there, so that other processes count less; of the wall on a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.spent = 0.0

    def now(self) -> float:
        """Returns the seconds of the clock, once the device is done."""
        synchronize(self.device)
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def __enter__(self) -> "Clock":
        self.began = self.now()
        return self

    def __exit__(self, *error) -> None:
        self.spent += self.now() - self.began


def train(
    net: nn.Module,
    loss: Callable[[Any], Tensor],
    data: Iterable[Any],
    *,
    updates: int,
    lr: float,
    weight_decay: float = 1e-2,
    clip: float = 1.0,
    check: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Trains by AdamW under a one-cycle schedule, and returns what it cost.

    Args:
        net: What is trained.
        loss: Of one item of `data`, differentiable.
        data: At least `updates` batches, of whatever kind.
        updates: Steps of the optimiser.
        lr: The highest learning rate of the schedule.
        weight_decay: Of AdamW.
        clip: The largest norm of a gradient.
        check: What a learning curve is made of; it is not timed.

    Returns:
        `updates`; `seconds` of training, and of a training step, `step_seconds`, those of `Clock`; `wall_seconds`;
        `curve`, [updates, seconds, check] at some points, if there is a check; `final_loss`, the mean of the last
        tenth; `load`.
    """
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)
    clock, wall, curve, losses = Clock(device), time.perf_counter(), [], []
    marks = {round(updates * (i + 1) / CHECKS) for i in range(CHECKS)} if check else ()
    net.train()
    for done, batch in zip(range(1, updates + 1), data, strict=False):
        with clock:
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
        losses.append(value.detach())
        if done in marks:
            net.eval()
            curve.append([done, clock.spent, check()])
            net.train()
    net.eval()
    if len(losses) < updates:
        raise ValueError(f"data must have {updates} batches, got {len(losses)}")
    found = {"updates": updates, "seconds": clock.spent, "step_seconds": clock.spent / updates}
    found |= {"wall_seconds": time.perf_counter() - wall, "load": load()}
    found["final_loss"] = torch.stack(losses[-max(1, updates // 10) :]).mean().item()
    return found | ({"curve": curve} if curve else {})


def cost(net: nn.Module, loss: Callable[[], Tensor]) -> dict[str, int]:
    """`parameters`, and `memory`, the bytes at the peak of a training step beside parameters and gradients."""
    return {"parameters": parameters(net), "memory": training_memory(net, loss)}


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions, for which torch has formulas, in `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def work(net: nn.Module, loss: Callable[[], Tensor], answer: Callable[[], Any], samples: int) -> dict[str, float]:
    """Counts `step_flops`, of a training step, and `sample_flops`, of one of the `samples` that `answer` treats.

    They are those of the net as it is now, and do not depend on what else the machine does.
    """
    with tdeq.backend("torch"), Flops() as step:  # what is inside a kernel is not seen
        loss().backward()
    net.zero_grad()
    with tdeq.backend("torch"), torch.no_grad(), Flops() as test:
        answer()
    return {"step_flops": step.total, "sample_flops": test.total / samples}


@torch.no_grad()
def latency(call: Callable[[], Any], samples: int, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """`sample_seconds`: the least of some calls, which treat so many samples each."""
    call()
    spent = []
    for _ in range(repeats):
        with Clock(device) as clock:
            call()
        spent.append(clock.spent)
    return {"sample_seconds": min(spent) / samples}


def solved(body: nn.Module) -> dict[str, Any]:
    """Returns what became of the last call of a contestant's body.

    `steps`, `most_steps`, and of an equilibrium `residual`, its median, and the share in % of each status that
    occurred.
    """
    count, last = steps(body), solution(body)
    if last is None:
        return {"steps": count, "most_steps": count}
    shares = {
        status.name.lower(): 100 * (last.status == status).float().mean().item()
        for status in tdeq.Status
        if (last.status == status).any()
    }
    return {
        "steps": count.mean().item(),
        "most_steps": count.max().item(),
        "residual": last.residual.median().item(),
        "status": shares,
        "converged": shares.get("converged", 0.0),
    }


def load() -> float | None:
    """How many processes want this machine's CPUs: above their number, a timing says little."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def at_equal_time(curves: dict[str, list[list[list[float]]]]) -> tuple[float, dict[str, float]]:
    """Returns (seconds, value by contestant) where all had the time that the quickest took to finish.

    Learning curves are a list of seeds each. A slower contestant is then still in the middle of its schedule.
    """
    seconds = min(mean(curve[-1][1] for curve in seeds) for seeds in curves.values())
    return seconds, {name: mean(_value_at(curve, seconds) for curve in seeds) for name, seeds in curves.items()}


def _value_at(curve: list[list[float]], seconds: float) -> float:
    """The last value by then, or else the first."""
    return next((value for _, spent, value in reversed(curve) if spent <= seconds), curve[0][2])


COSTS = (
    Measure("parameters", "parameters", "less", digits=0),
    Measure("memory", "peak memory, MiB", "less", digits=2, scale=2**-20),
    Measure("step_flops", "work of a training step, MFLOP", "less", scale=1e-6),
    Measure("sample_flops", "work of inference, MFLOP a sample", "less", digits=2, scale=1e-6),
    Measure("step_seconds", "time of a training step, ms", "less", scale=1e3),
    Measure("sample_seconds", "time of inference, us a sample", "less", digits=0, scale=1e6),
    Measure("steps", "steps"),
    Measure("most_steps", "most steps", digits=0),
    Measure("converged", "converged, %"),
)
