"""What holds training together: `python -m tritondeq.bench.stability` prints a table of recipes.

The parity of six bits, all 64 words at once, by an `Affine` cell with relu, and Adam at a learning rate too large for
it: plain training drifts to where solves fail. Columns give the least and the most of the seeds. By the torch backend.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn
from torch.nn import functional as F

import tritondeq as tdeq
from tritondeq.toolbox import one_thread

from .report import markdown

BITS, WIDTH, RATE = 6, 32, 1e-2


@dataclass(frozen=True)
class Outcome:
    """What became of one training.

    Attributes:
        failed: Share of all solves, from the first step to the last, that did not converge.
        steps: Mean evaluations of a sample in the last quarter.
        radius: Largest spectral radius of a sample after it.
        accuracy: Share of the 64 words that are right, after it.
    """

    failed: float
    steps: float
    radius: float
    accuracy: float


def train(seed: int, steps: int = 300, weight: Callable[[int], float] | None = None, core: float = 1.0) -> Outcome:
    """Trains once.

    Args:
        seed: Of the weights.
        steps: Updates.
        weight: Of the Jacobian penalty, by step.
        core: Learning rate of the equilibrium layer, over that of the head.
    """
    torch.manual_seed(seed)
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * BITS)
    parity, z0 = (x > 0).sum(dim=1) % 2, x.new_zeros(len(x), WIDTH)
    layer, head = tdeq.DEQ(tdeq.cells.Affine(WIDTH, BITS, activation="relu")), nn.Linear(WIDTH, 2)
    groups = [{"params": layer.parameters(), "lr": core * RATE}, {"params": head.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    failed, taken = [], []
    for step in range(steps):
        z = layer(x, z0)
        failed.append((layer.last.status >= tdeq.Status.MAX_STEPS).float().mean().item())
        taken.append(layer.last.steps.float().mean().item())
        loss = F.cross_entropy(head(z), parity)
        if weight is not None:
            loss = loss + weight(step) * tdeq.jacobian_penalty(layer, z.detach(), x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z = layer(x, z0)
        right = (head(z).argmax(dim=1) == parity).float().mean().item()
    radius = tdeq.spectral_radius(layer, z, x, products=WIDTH).max().item()
    return Outcome(mean(failed), mean(taken[-steps // 4 :]), radius, right)


RECIPES = {
    "plain": {},
    "core at 0.3 of the learning rate": {"core": 0.3},
    "penalty, weight 1": {"weight": lambda step: 1.0},
    "penalty, weight 3": {"weight": lambda step: 3.0},
    "penalty, weight from 1 to 3 in 100 steps": {"weight": lambda step: 1 + 2 * min(1.0, step / 100)},
    "penalty, weight 3, until step 200": {"weight": lambda step: 3.0 if step < 200 else 0.0},
}


def rows(seeds: int, steps: int) -> Iterator[list[str]]:
    """Yields the row of each recipe."""
    for name, options in RECIPES.items():
        outcomes = [train(seed, steps, **options) for seed in range(seeds)]
        columns = [[100 * o.failed for o in outcomes], [o.steps for o in outcomes]]
        columns += [[o.radius for o in outcomes], [100 * o.accuracy for o in outcomes]]
        texts = []
        for values, digits in zip(columns, (1, 1, 2, 0), strict=True):
            low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
            texts.append(low if low == high else f"{low} to {high}")
        yield [name, *texts]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("tritondeq.bench.stability", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(argv)
    head = ["recipe", "failed solves, %", "evaluations at the end", "largest radius", "accuracy, %"]
    with one_thread(), tdeq.backend("torch"):
        print(markdown([head, *rows(options.seeds, options.steps)]))


if __name__ == "__main__":
    main()
