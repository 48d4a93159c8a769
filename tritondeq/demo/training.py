"""What the demonstrations share: one training loop, what is measured of a run, one table, and pictures as PNG."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ..toolbox import parameters, spread, synchronize, table

LEGEND = """
Memory: the peak in one training step, beside parameters and gradients. Steps: blocks that a test sample goes through.
±: standard deviation over seeds.
"""
QUICK = "This was a quick run: it shows that all works. Nothing is trained to the end, so its numbers mean nothing."


@dataclass
class Run:
    """One model, trained with one seed."""

    model: str
    net: nn.Module
    memory: int  # bytes at the peak of one training step
    seconds: float  # of training
    scores: dict[str, float]  # by column of the table
    shown: dict[Any, Any]  # what pictures show beside


def train(
    title: str,
    net: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    lr: float,
    decay: float = 0.0,
    warm_up: float = 0.3,
) -> float:
    """Trains a net by AdamW with a one-cycle schedule, an update a batch, under a progress bar; returns the seconds."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=warm_up)
    began = time.perf_counter()
    for batch in tqdm(batches, title, unit="update", leave=False, disable=None):
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    synchronize(next(net.parameters()).device)
    return time.perf_counter() - began


def report(runs: list[Run]) -> str:
    """Returns the table, a row for each model: what is mean over seeds has its standard deviation beside it."""
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        each = [run for run in runs if run.model == model]
        costs = [f"{parameters(each[0].net):,}", f"{each[0].memory / 2**20:.2f}", spread([r.seconds for r in each])]
        rows.append([model, *costs, *(spread([run.scores[name] for run in each]) for name in each[0].scores)])
    return "\n" + table(["model", "parameters", "memory, MiB", "training, s", *runs[0].scores], rows) + "\n" + LEGEND


def save(draw: Callable[[Figure], None], path: Path, height: float = 4.0) -> Path:
    """Saves a picture that `draw` draws, and returns its path."""
    figure = Figure(figsize=(6.8, height), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=150)
    return path
