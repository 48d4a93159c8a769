"""What the demonstrations share: one training loop, what it measures, and one table."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..toolbox import parameters, spread, synchronize, table, training_memory

LEGEND = """
Memory: the peak in one training step, beside parameters and gradients. Steps: blocks that a test sample goes through.
±: standard deviation over seeds.
"""
QUICK = "This was a quick run: it shows that all works. Nothing is trained to the end, so its numbers mean nothing."


@dataclass
class Run:
    """One model, trained with one seed."""

    model: str
    seed: int
    parameters: int
    memory: int  # bytes at the peak of one training step
    seconds: float  # of training
    scores: dict[str, float]  # by column of the table
    shown: dict[str, Any]  # what pictures show beside


def train(
    run: tuple[str, int],
    net: nn.Module,
    losses: Iterator[Callable[[], Tensor]],
    updates: int,
    test: Callable[[], tuple[dict[str, float], dict[str, Any]]],
    *,
    lr: float,
    decay: float = 0.0,
    warm_up: float = 0.3,
) -> Run:
    """Trains a net by AdamW with a one-cycle schedule, under a progress bar, and tests it.

    `losses` yields functions that return the loss of a batch: that which memory is measured with, then one per update.
    `test` returns the scores of the trained net, and what pictures show.
    """
    memory = training_memory(net, next(losses))
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=warm_up)
    began = time.perf_counter()
    for loss in tqdm(losses, f"{run[0]}, seed {run[1]}", updates, unit="update", leave=False, disable=None):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    synchronize(next(net.parameters()).device)
    return Run(*run, parameters(net), memory, time.perf_counter() - began, *test())


def report(runs: list[Run]) -> str:
    """Returns the table, a row for each model: what is mean over seeds has its standard deviation beside it."""
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        each = [run for run in runs if run.model == model]
        costs = [f"{each[0].parameters:,}", f"{each[0].memory / 2**20:.2f}", spread([run.seconds for run in each])]
        rows.append([model, *costs, *(spread([run.scores[name] for run in each]) for name in each[0].scores)])
    return "\n" + table(["model", "parameters", "memory, MiB", "training, s", *runs[0].scores], rows) + "\n" + LEGEND
