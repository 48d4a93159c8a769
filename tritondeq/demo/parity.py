"""Prefix parity: bit i of the answer is the sum of bits 0 ... i modulo 2. Trained on 20 bits, tested on up to 320.

A step sees two positions to each side, so a longer string needs more steps: a DEQ takes them, a stack has none left.
"""

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..fixed_point import fixed_point
from ..inspect import plot
from ..toolbox import training_memory
from .training import QUICK, Run, report, save, train

TRAINED = 20  # bits
LENGTHS = {20: 128, 40: 128, 80: 128, 160: 128, 320: 64}  # bits: strings tested
CHANNELS, DEPTH, BATCH, UPDATES, LR = 32, 10, 128, 300, 3e-3
FREE, TRACKED = 25, (3, 8)  # DEQ training: at most so many steps without gradient, then so many with
DECAY, SETTLE = 0.8, 0.1  # of the state, weight of the residual in the DEQ's loss: without, some seeds do not converge
LOOP = (1, 20)  # loop training: so many steps, all with gradient
TOL, MAX_STEPS = 1e-3, 1000
IMPLICIT, STACK, TIED = "DEQ", f"stack of {DEPTH} blocks", "weight-tied loop"
REACH = 2 * DEPTH  # positions to each side that the stack sees
Draw = Callable[[int, int], int]  # a random integer from the first to the second


def prefix_parity(bits: Tensor) -> Tensor:
    """Returns the parity of each prefix: integers 0 or 1, [B, L] -> [B, L]."""
    return bits.cumsum(-1) % 2


def strings(count: int, length: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns random bits and the parity of their prefixes, each [count, length]."""
    bits = torch.randint(0, 2, (count, length), generator=generator)
    return bits.to(device), prefix_parity(bits).to(device)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over the bits."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def neighbours(z: Tensor) -> Tensor:
    """Puts each position beside its neighbours, [B, L, C] -> [B, L, 3 C]: a Linear of it is a convolution."""
    padded = F.pad(z, (0, 0, 1, 1))
    return torch.cat([padded[:, :-2], z, padded[:, 2:]], dim=-1)


class Block(nn.Module):
    """f(z, u) = LayerNorm(0.8 z + conv(relu(conv(z) + u))), kernels of 3; z and u are [B, L, C]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3 * CHANNELS, CHANNELS)
        self.last = nn.Linear(3 * CHANNELS, CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        with torch.no_grad():
            self.last.weight *= 0.3

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(DECAY * z + self.last(neighbours(F.relu(self.first(neighbours(z)) + u))))


class Net(nn.Module):
    """Bits [B, L] -> logits [B, L], by blocks one after another, again from the first where there are more steps.

    Args:
        blocks: How many, each with other weights.
        model: IMPLICIT is solved for its fixed point in a test; STACK goes once through its blocks; TIED makes a random
            number of steps in training, and one per bit in a test.
    """

    def __init__(self, blocks: int = 1, model: str = STACK):
        super().__init__()
        self.model = model
        self.stem = nn.Linear(3, CHANNELS)
        self.head = nn.Linear(CHANNELS, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def start(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z0 and u."""
        u = self.stem(neighbours(2.0 * bits.unsqueeze(-1) - 1))
        return torch.zeros_like(u), u

    def read(self, z: Tensor) -> Tensor:
        """Returns the logits of a state."""
        return self.head(z).squeeze(-1)

    def repeat(self, z: Tensor, u: Tensor, steps: int) -> Tensor:
        """Returns the state so many steps on."""
        for block in islice(cycle(self.blocks), steps):
            z = block(z, u)
        return z

    def loss(self, bits: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        """Returns the loss of as many steps as it draws.

        Of IMPLICIT these are steps without gradient, then a few that are differentiated: whatever the number, the
        answer must be right, and the last step must change little, which is what makes a fixed point of it.
        """
        z, u = self.start(bits)
        if self.model != IMPLICIT:
            steps = draw(*LOOP) if self.model == TIED else len(self.blocks)
            return cross_entropy(self.read(self.repeat(z, u, steps)), labels)
        with torch.no_grad():
            z = self.repeat(z, u, draw(0, FREE))
        z = self.repeat(z, u, draw(*TRACKED) - 1)
        onward = self.repeat(z, u, 1)
        residual = (onward - z).flatten(1).norm(dim=1) / onward.flatten(1).norm(dim=1)
        return cross_entropy(self.read(onward), labels) + SETTLE * residual.mean()

    def answer(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits, and the steps for each string."""
        z, u = self.start(bits)
        if self.model == IMPLICIT:
            solution = fixed_point(self.blocks[0], z, (u,), tol=TOL, max_steps=MAX_STEPS)
            return self.read(solution.value), solution.steps
        steps = bits.shape[1] if self.model == TIED else len(self.blocks)
        return self.read(self.repeat(z, u, steps)), torch.full((len(bits),), steps)


MODELS: dict[str, Callable[[], Net]] = {
    IMPLICIT: lambda: Net(1, IMPLICIT),
    STACK: lambda: Net(DEPTH, STACK),
    TIED: lambda: Net(1, TIED),
}


def run(seeds: range, out: Path, device: torch.device, quick: bool, finished: list[str]) -> None:
    """Trains each model with each seed, prints the table, and saves the picture; arguments as `digits.run` has them."""
    updates, lengths = (5, {20: 16, 40: 16}) if quick else (UPDATES, LENGTHS)
    print(f"prefix parity: {updates} updates on {BATCH} strings of {TRAINED} bits; device: {device}", flush=True)
    runs: list[Run] = []
    for seed in seeds:
        for model in MODELS:
            runs.append(measure(model, seed, updates, lengths, device))
            finished.append(f"{model} (seed {seed})")
    print("Columns of bits: share of test strings of that length with every bit right, in %.", report(runs), sep="\n")
    print(QUICK if quick else CONCLUSION)
    print(f"\nsaved {save(lambda figure: picture(figure, runs), out / 'parity_exact_match.png')}")


def measure(model: str, seed: int, updates: int, lengths: dict[int, int], device: torch.device) -> Run:
    """Trains one model, with strings and numbers of steps that depend on the seed only, and tests it at each length."""
    torch.manual_seed(seed)
    net = MODELS[model]().to(device)
    data, depths = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    batches = [strings(BATCH, TRAINED, data, device) for _ in range(updates)]

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=depths))

    memory = training_memory(net, lambda: net.loss(*batches[0], lambda low, high: high))
    title = f"{model}, seed {seed}"
    seconds = train(title, net, lambda batch: net.loss(batch[0], batch[1], draw), batches, lr=LR, warm_up=0.1)
    exact, steps = zip(*(test(net, seed, length, count) for length, count in lengths.items()), strict=True)
    shown = dict(zip(lengths, exact, strict=True))
    scores = {f"{n} bits": shown[n] for n in (20, 80, 320) if n in shown} | {"steps": steps[-1]}
    return Run(model, net, memory, seconds, scores, shown)


@torch.no_grad()
def test(net: Net, seed: int, length: int, count: int) -> tuple[float, float]:
    """Returns the share of strings whose every bit is right, in %, and the mean number of steps."""
    device = next(net.parameters()).device
    bits, labels = strings(count, length, torch.Generator().manual_seed(1_000_003 + seed), device)
    logits, steps = net.answer(bits)
    exact = ((logits > 0) == (labels > 0)).all(1)
    return 100 * exact.float().mean().item(), steps.float().mean().item()


def picture(figure: Figure, runs: list[Run]) -> None:
    """Draws exact match against length: each seed thin, their mean thick."""
    lengths, ax = list(runs[0].shown), plot.tidy(figure.subplots())
    for i, model in enumerate(dict.fromkeys(run.model for run in runs)):
        curves = [list(run.shown.values()) for run in runs if run.model == model]
        ax.plot(lengths, np.transpose(curves), color=plot.COLOURS[i], alpha=0.4, linewidth=1)
        # Each model's smaller than the last one's, so that all are seen where they meet.
        size: Any = {"linewidth": 3.6 - 1.1 * i, "markersize": 9 - 2.2 * i}
        ax.plot(lengths, np.mean(curves, axis=0), color=plot.COLOURS[i], label=model, marker="o", **size)
    ax.axvline(TRAINED, color="0.4", linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, lengths)
    ax.set(xlabel="length, bits (dashed: the length trained on)", ylim=(-4, 104))
    ax.set(ylabel="strings with every bit right, % (up is better)")
    ax.set_title(f"Prefix parity, trained on {TRAINED} bits: exact match (thin: single seeds)", fontsize=11)
    ax.legend(frameon=False)


CONCLUSION = f"""Steps: of the longest strings. A block sees 2 positions to each side, the stack of {DEPTH} sees
{REACH}: past {REACH + 1} bits it can't know the answer. The fair rival is the weight-tied loop, which can go on as long
as the DEQ; but it needs to be given a number of steps."""
