"""The digits of scikit-learn: 1,797 real images of 8 x 8 pixels, ten classes.

A DEQ, a stack of 12 blocks, one block and a weight-tied loop of 12, all made of the same block between the same stem
and head, trained alike on the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ..adjoints import Implicit, Unrolled
from ..deq import DEQ
from ..fixed_point import fixed_point
from ..inspect import plot
from ..toolbox import training_memory
from .training import QUICK, Run, report, save, train

TEST = 360  # images held out of training
SHOWN = 8  # of them, the easiest and the hardest
CHANNELS, DEPTH, BATCH, EPOCHS = 24, 12, 64, 12
TOL, MAX_STEPS = 1e-3, 50
LR, DECAY = 2e-3, 1e-2


@dataclass
class Data:
    """Images [N, 1, 8, 8] in 0 ... 1 and labels [N], by which the split is stratified."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def split(cls, seed: int, device: torch.device) -> "Data":
        """Returns the images in the split of a seed."""
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=TEST, stratify=labels, random_state=seed)
        x, test_x = (torch.tensor(p, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16 for p in parts[:2])
        y, test_y = (torch.tensor(p, dtype=torch.long, device=device) for p in parts[2:])
        return cls(x, y, test_x, test_y)


class Block(nn.Module):
    """f(z, u) = GroupNorm(z + u + conv(relu(conv(z)))), a residual block, and a cell as it stands.

    It is a cell because u is added, the last conv starts small, and a norm comes last: the map is contractive at first.
    z and u are [B, C, 4, 4].
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.GroupNorm(8, CHANNELS)
        with torch.no_grad():
            self.last.weight *= 0.3

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(z + u + self.last(F.relu(self.first(z))))


class Stack(nn.Module):
    """The explicit rival: `depth` blocks one after another, each with other weights."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, u: Tensor, z0: Tensor) -> Tensor:
        for block in self.blocks:
            z0 = block(z0, u)
        return z0


class Net(nn.Module):
    """Images [B, 1, 8, 8] -> logits [B, 10]. The models differ in `body(u, z0=u)`."""

    def __init__(self, body: Callable[[], nn.Module]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1), nn.GroupNorm(8, CHANNELS))
        self.head = nn.Linear(CHANNELS * 16, 10)
        self.body: Any = body()

    def forward(self, x: Tensor) -> Tensor:
        u = self.stem(x)
        return self.head(self.body(u, u).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DEQ": lambda: DEQ(Block(), tol=TOL, max_steps=MAX_STEPS, adjoint=Implicit(tol=1e-2)),
    f"stack of {DEPTH} blocks": lambda: Stack(DEPTH),
    "one block": lambda: Stack(1),
    f"weight-tied loop of {DEPTH}": lambda: DEQ(Block(), adjoint=Unrolled(DEPTH)),
}
IMPLICIT, _, ONE, _ = MODELS
ACCURACY = "test accuracy, %"


def run(seeds: range, out: Path, device: torch.device, quick: bool, finished: list[str]) -> None:
    """Trains each model with each seed, prints the table and what follows from it, and saves the pictures in `out`.

    `quick` runs for seconds, only to show that all works. `finished` gets a line for each run.
    """
    epochs = 1 if quick else EPOCHS
    print(f"digits: 1,797 images, {TEST} of them for testing; epochs: {epochs}; device: {device}", flush=True)
    runs: list[Run] = []
    for seed in seeds:
        data = Data.split(seed, device)
        for model in MODELS:
            runs.append(measure(model, seed, data, epochs))
            finished.append(f"{model} (seed {seed}) {runs[-1].scores[ACCURACY]:.1f} %")
    print(report(runs), QUICK if quick else conclusion(runs), "", sep="\n")
    for path in pictures(runs[0].shown, Data.split(seeds[0], device), out):
        print(f"saved {path}")


def measure(model: str, seed: int, data: Data, epochs: int) -> Run:
    """Trains one model, on batches in an order that depends on the seed only, and tests it."""
    torch.manual_seed(seed)
    net = Net(MODELS[model]).to(data.x.device)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data.x), generator=generator).to(data.x.device) for _ in range(epochs)]
    batches = [batch for order in orders for batch in order.split(BATCH) if len(batch) == BATCH]

    def loss(batch: Tensor | slice) -> Tensor:
        return F.cross_entropy(net(data.x[batch]), data.y[batch])

    before, memory = test(net, data), training_memory(net, lambda: loss(slice(BATCH)))
    seconds = train(f"{model}, seed {seed}", net, loss, batches, lr=LR, decay=DECAY)
    after = test(net, data)
    scores = {ACCURACY: 100 * (after["guesses"] == data.test_y).float().mean().item()}
    scores |= {"steps at start": before["steps"].mean().item(), "at end": after["steps"].mean().item()}
    solves = {"before training": before["solve"], "after training": after["solve"]}
    return Run(model, net, memory, seconds, scores, after | {"solves": solves})


@torch.no_grad()
def test(net: Net, data: Data) -> dict[str, Any]:
    """Returns the class and the steps of each test image and, of a DEQ, a solve that goes on beyond the tolerance."""
    guesses, body = net(data.test_x).argmax(1), net.body
    if isinstance(body, Stack):
        return {"guesses": guesses, "steps": torch.full(guesses.shape, float(len(body.blocks))), "solve": None}
    u = net.stem(data.test_x)
    solve = fixed_point(body.cell, u, (u,), tol=TOL / 1000, max_steps=MAX_STEPS, trace=True)
    return {"guesses": guesses, "steps": body.last.steps.float(), "solve": solve, "converged": body.last.converged}


def conclusion(runs: list[Run]) -> str:
    """Returns what follows from the numbers of the runs, in sentences."""
    models = {model: [run for run in runs if run.model == model] for model in MODELS}
    accuracy = {model: mean(run.scores[ACCURACY] for run in each) for model, each in models.items()}
    best = max(MODELS, key=lambda model: accuracy[model])
    noise = sqrt(accuracy[best] * (100 - accuracy[best]) / TEST)  # standard deviation of a binomial
    converged = 100 * mean(run.shown["converged"].float().mean().item() for run in models[IMPLICIT])
    alike = accuracy[best] - accuracy[ONE] <= noise
    return (
        f"One explicit block has {accuracy[ONE]:.1f} %, the best ({best}) has {accuracy[best]:.1f} %, and the noise of "
        f"{TEST} images is {noise:.1f}."
        + ("\nDigits need no depth, and no equilibrium; `demo parity` is a task that does." if alike else "")
        + f"\n{converged:.1f} % of the DEQ's test images converge to {TOL:g} within {MAX_STEPS} steps."
    )


def pictures(shown: dict[str, Any], data: Data, out: Path) -> list[Path]:
    """Draws residual against step, and steps per image with the images at both ends, of the DEQ of one run."""

    def residuals(figure: Figure) -> None:
        ax = plot.residuals(shown["solves"], tol=TOL, ax=figure.subplots())
        ax.set_title("Digits: the DEQ's residual on test images (median, middle 80 %)", fontsize=11)

    def steps(figure: Figure) -> None:
        parts: Any = figure.subfigures(2, height_ratios=[1, 1.05])
        top, bottom = parts
        ax = plot.steps(shown["steps"], ax=top.subplots())
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(ylabel="test images", xlabel="steps (evaluations of the cell; fewer is faster)")
        ax.set_title("Digits: how many steps each test image takes", fontsize=11)
        order = shown["steps"].argsort(stable=True).tolist()
        ends = {"easiest": order[:SHOWN], "hardest": order[: -SHOWN - 1 : -1]}
        for row, (name, indices) in zip(bottom.subplots(2, SHOWN), ends.items(), strict=True):
            row[0].set_ylabel(name, fontsize=10)
            for ax, i in zip(row, indices, strict=True):
                label, guess = data.test_y[i].item(), shown["guesses"][i].item()
                wrong = "" if guess == label else f", read as {guess}"
                ax.imshow(data.test_x[i, 0].cpu().numpy(), cmap="gray_r")
                ax.set_title(f"{int(shown['steps'][i])} steps", fontsize=9, pad=3)
                ax.set_xlabel(f"{label}{wrong}", fontsize=9, color=plot.COLOURS[1] if wrong else "black", labelpad=2)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_color("0.8")

    return [save(residuals, out / "digits_residual.png"), save(steps, out / "digits_steps.png", height=5.6)]
