"""The digits of scikit-learn: 1,797 real images of 8 x 8 pixels, ten classes.

A DEQ, a stack of 12 blocks, one block and a weight-tied loop of 12, all made of the same block between the same stem
and head, trained alike on the same batches.
"""

import time
from collections.abc import Callable, Iterator
from math import sqrt
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..adjoints import Implicit, Unrolled
from ..deq import DEQ
from ..fixed_point import fixed_point
from ..solution import Solution
from . import pictures
from .common import QUICK, Options, parameters, spread, synchronize, table, training_memory
from .results import TEST, Data, Run

CHANNELS, DEPTH, BATCH = 24, 12, 64
TOL, MAX_STEPS = 1e-3, 50
ALLOWED = range(1, 31)  # steps at test time, of the picture
LR, WEIGHT_DECAY = 2e-3, 1e-2


class Block(nn.Module):
    """f(z, u) = GroupNorm(z + u + conv(relu(conv(z)))), a residual block, and a cell as it stands.

    What makes a cell of it: the input u is added, the last conv starts small, and a norm comes last, so that the map is
    contractive at first. z and u are [B, C, 4, 4].
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
    """The explicit rival: so many blocks one after another, each with its own weights."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, u: Tensor, z0: Tensor) -> Tensor:
        for block in self.blocks:
            z0 = block(z0, u)
        return z0


class Net(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 10]. `body(u, z0=u)` is what the models differ in."""

    def __init__(self, body: Callable[[], nn.Module]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1), nn.GroupNorm(8, CHANNELS))
        self.head = nn.Linear(CHANNELS * 16, 10)
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        u = self.stem(x)
        return self.head(self.body(u, u).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DEQ": lambda: DEQ(Block(), tol=TOL, max_steps=MAX_STEPS, adjoint=Implicit(tol=1e-2)),
    f"stack of {DEPTH} blocks": lambda: Stack(DEPTH),
    "one block": lambda: Stack(1),
    f"weight-tied loop of {DEPTH}": lambda: DEQ(Block(), adjoint=Unrolled(DEPTH)),
}
IMPLICIT, STACK, ONE, LOOP = MODELS


def run(options: Options, finished: list[str]) -> list[Run]:
    """Trains, prints the table and what follows from it, saves the pictures. `finished` gets a word on each run."""
    epochs = 1 if options.quick else 12
    images = f"1,797 images, {TEST} of them for testing"
    print(f"digits: {images}; epochs: {epochs}; device: {options.device}", flush=True)
    runs = []
    with tqdm(total=len(MODELS) * options.seeds * epochs, unit="epoch", leave=False, disable=None) as bar:
        for seed in options.all_seeds:
            data = Data.split(seed, options.device)
            for model in MODELS:
                bar.set_description(f"seed {seed}, {model}")
                runs.append(measure(model, seed, data, epochs, bar.update))
                finished.append(runs[-1].label)
    print(report(runs, options.quick))
    for path in pictures.digits(runs, ALLOWED, TOL, options.out):
        print(f"saved {path}")
    return runs


def measure(model: str, seed: int, data: Data, epochs: int, tick: Callable[[], object]) -> Run:
    """Trains one model and takes its measures."""
    torch.manual_seed(seed)
    net = Net(MODELS[model]).to(data.x.device)
    x, y = data.x[:BATCH], data.y[:BATCH]
    memory = training_memory(net, lambda: F.cross_entropy(net(x), y))
    _, counts_before = predict(net, data)
    before = traced(net, data) if model == IMPLICIT else None
    seconds = train(net, data, seed, epochs, tick)
    guesses, counts = predict(net, data)
    run = Run(
        model=model,
        seed=seed,
        parameters=parameters(net),
        memory=memory,
        seconds=seconds,
        accuracy=_percent(guesses, data),
        steps=(counts_before.mean().item(), counts.mean().item()),
    )
    if isinstance(net.body, DEQ):
        run.by_allowed = [accuracy_allowed(net, data, allowed) for allowed in ALLOWED]
    if model == IMPLICIT:
        run.solves = {"before training": before, "after training": traced(net, data)}
        run.counts, run.guesses, run.data = counts, guesses, data
        run.converged = 100 * net.body.last.converged.float().mean().item()
    return run


def train(net: nn.Module, data: Data, seed: int, epochs: int, tick: Callable[[], object]) -> float:
    """Seconds it took. The order of the batches depends on the seed only."""
    batches = torch.Generator().manual_seed(seed)
    starts = range(0, len(data.x) - BATCH + 1, BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * len(starts))
    began = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=batches).to(data.x.device)
        for start in starts:
            batch = order[start : start + BATCH]
            optimizer.zero_grad()
            F.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        tick()
    synchronize(data.x.device)
    return time.perf_counter() - began


@torch.no_grad()
def predict(net: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """Classes of the test images, and how many blocks each goes through (float), [N]."""
    guesses = net(data.test_x).argmax(1)
    if isinstance(net.body, DEQ):
        return guesses, net.body.last.steps.float()
    return guesses, torch.full((TEST,), float(len(net.body.blocks)))


@torch.no_grad()
def traced(net: nn.Module, data: Data) -> Solution:
    """The DEQ's solve of the test images, carried on beyond its tolerance."""
    u = net.stem(data.test_x)
    return fixed_point(net.body.cell, u, (u,), tol=TOL / 1000, max_steps=MAX_STEPS, trace=True)


@torch.no_grad()
def accuracy_allowed(net: nn.Module, data: Data, allowed: int) -> float:
    """Accuracy in % where no test image gets more evaluations of the cell than that."""
    u = net.stem(data.test_x)
    adjoint = Unrolled(allowed) if isinstance(net.body.adjoint, Unrolled) else Implicit()
    z = fixed_point(net.body.cell, u, (u,), adjoint=adjoint, tol=TOL, max_steps=allowed).value
    return _percent(net.head(z.flatten(1)).argmax(1), data)


def _percent(guesses: Tensor, data: Data) -> float:
    return 100 * (guesses == data.test_y).float().mean().item()


def report(runs: list[Run], quick: bool) -> str:
    """The table, a row a model, and what its numbers say, if they say anything."""
    head = ["model", "test accuracy, %", "parameters", "peak memory, MiB", "training, s", "steps at start", "at end"]
    rows = []
    for model in MODELS:
        own = [run for run in runs if run.model == model]
        rows.append(
            [
                model,
                spread([run.accuracy for run in own]),
                f"{own[0].parameters:,}",
                f"{own[0].memory / 2**20:.2f}",
                spread([run.seconds for run in own]),
                *(spread([run.steps[i] for run in own]) for i in (0, 1)),
            ]
        )
    said = [QUICK] if quick else conclusions(runs)
    return "\n".join(["", table(head, rows), "", _LEGEND, "", *said, ""])


_LEGEND = (
    "Memory: one training step, beside parameters and gradients. Steps: blocks that a test image goes through, before\n"
    "and after training. ±: standard deviation over seeds."
)


def conclusions(runs: list[Run]) -> Iterator[str]:
    """What the numbers of this run say, in sentences."""
    own = {model: [run for run in runs if run.model == model] for model in MODELS}
    accuracy = {model: mean(run.accuracy for run in own[model]) for model in MODELS}
    best, one = max(accuracy, key=accuracy.get), accuracy[ONE]
    chance = sqrt(accuracy[best] * (100 - accuracy[best]) / TEST)  # standard deviation of a binomial
    noise = max([chance, *(stdev(r.accuracy for r in own[m]) for m in (best, ONE) if len(own[m]) > 1)])
    gap = accuracy[best] - one
    if best == ONE:
        yield f"One explicit block is the best, at {one:.1f} %: digits need no depth, and no equilibrium."
    elif gap <= noise:
        yield (
            f"One explicit block is as good: {one:.1f} %, {gap:.1f} points below the best ({best}), within the noise "
            f"of {noise:.1f}.\nDigits need no depth, and no equilibrium; `demo parity` is a task that does."
        )
    else:
        yield (
            f"One explicit block is worse: {one:.1f} %, {gap:.1f} points below the best ({best}), beyond the noise of "
            f"{noise:.1f}."
        )
    first = {model: own[model][0] for model in MODELS}
    took = {model: mean(run.seconds for run in own[model]) for model in MODELS}
    yield (
        f"Against the stack of {DEPTH} the DEQ has {_times(first, 'parameters')} of the parameters, "
        f"{_times(first, 'memory')} of the peak memory, and trains {took[IMPLICIT] / took[STACK]:.1f} times as long.\n"
        f"Against one block it trains {took[IMPLICIT] / took[ONE]:.1f} times as long."
    )
    converged = mean(run.converged for run in own[IMPLICIT])
    yield f"After training {converged:.1f} % of the DEQ's test samples converge to {TOL:g} within {MAX_STEPS} steps."


def _times(first: dict[str, Run], what: str) -> str:
    return f"{getattr(first[IMPLICIT], what) / getattr(first[STACK], what):.2f}"
