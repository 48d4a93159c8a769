"""Prefix parity: bit i of the answer is the sum of bits 0 ... i modulo 2. Trained on 20 bits, tested on up to 320.

A step sees two positions to each side, so a longer string needs more steps: a DEQ takes them, a stack has none left.
"""

import time
from collections.abc import Callable, Iterator
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..adjoints import Unrolled
from ..fixed_point import fixed_point
from . import pictures
from .common import QUICK, Options, parameters, spread, synchronize, table, training_memory
from .results import Outcome, Score

TRAINED = 20  # bits
LENGTHS = {20: 128, 40: 128, 80: 128, 160: 128, 320: 64}  # bits: strings tested
CHANNELS, DEPTH, BATCH, UPDATES, LR = 32, 10, 128, 300, 3e-3
FREE, KEPT = 25, (3, 8)  # DEQ training: at most so many steps without gradient, then so many with
DECAY, SETTLE = 0.8, 0.1  # of the state, weight of the residual in the DEQ's loss: without, some seeds do not converge
LOOP = (1, 20)  # loop training: so many steps, all with gradient
TOL, MAX_STEPS = 1e-3, 1000
REACH = 2 * DEPTH  # positions to each side that the stack sees
Draw = Callable[[int, int], int]  # a random integer from the first to the second


def prefix_parity(bits: Tensor) -> Tensor:
    """The parity of each prefix: integers 0 or 1, [B, L] -> [B, L]."""
    return bits.cumsum(-1) % 2


def strings(count: int, length: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random bits and the parity of their prefixes, each [count, length]."""
    bits = torch.randint(0, 2, (count, length), generator=generator)
    return bits.to(device), prefix_parity(bits).to(device)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def neighbours(z: Tensor) -> Tensor:
    """Each position beside the one before and the one after, [B, L, C] -> [B, L, 3 C]: a Linear of it is a conv."""
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
    """Bits [B, L] -> logits [B, L].

    `loss(bits, labels, draw)` trains, with as many steps as it draws; `answer(bits)` tests: logits, steps per string.
    """

    def __init__(self, blocks: int = 1):
        super().__init__()
        self.stem = nn.Linear(3, CHANNELS)
        self.head = nn.Linear(CHANNELS, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def start(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """(z0, u)."""
        u = self.stem(neighbours(2.0 * bits.unsqueeze(-1) - 1))
        return torch.zeros_like(u), u

    def read(self, z: Tensor) -> Tensor:
        return self.head(z).squeeze(-1)

    def repeat(self, z: Tensor, u: Tensor, steps: int) -> Tensor:
        """The first block, so many times."""
        return fixed_point(self.blocks[0], z, (u,), adjoint=Unrolled(steps)).value


class Stack(Net):
    """So many blocks, each with its own weights."""

    def __init__(self):
        super().__init__(DEPTH)

    def loss(self, bits: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        return cross_entropy(self.answer(bits)[0], labels)

    def answer(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        z, u = self.start(bits)
        for block in self.blocks:
            z = block(z, u)
        return self.read(z), torch.full((len(bits),), DEPTH)


class Loop(Net):
    """One block, applied a random number of times in training, and once per bit in a test, because it is told to."""

    def loss(self, bits: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        return cross_entropy(self.read(self.repeat(*self.start(bits), draw(*LOOP))), labels)

    def answer(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        length = bits.shape[1]
        return self.read(self.repeat(*self.start(bits), length)), torch.full((len(bits),), length)


class Equilibrium(Net):
    """One block, solved for its fixed point in a test.

    In training a random number of steps without gradient, then a few that are differentiated: whatever the number, the
    answer must be right, and the last step must change little, which is what makes a fixed point of it.
    """

    def loss(self, bits: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        z, u = self.start(bits)
        free, kept = draw(0, FREE), draw(*KEPT)
        if free:
            with torch.no_grad():
                z = self.repeat(z, u, free)
        z = self.repeat(z, u, kept - 1)
        onward = self.blocks[0](z, u)
        residual = (onward - z).flatten(1).norm(dim=1) / onward.flatten(1).norm(dim=1)
        return cross_entropy(self.read(onward), labels) + SETTLE * residual.mean()

    def answer(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        z, u = self.start(bits)
        solution = fixed_point(self.blocks[0], z, (u,), tol=TOL, max_steps=MAX_STEPS)
        return self.read(solution.value), solution.steps


MODELS: dict[str, Callable[[], Net]] = {
    "DEQ": Equilibrium,
    f"stack of {DEPTH} blocks": Stack,
    "weight-tied loop": Loop,
}
IMPLICIT, STACK, TIED = MODELS


def run(options: Options, finished: list[str]) -> list[Outcome]:
    """Trains, tests, prints and draws. `finished` gets a word on each model."""
    updates = 5 if options.quick else UPDATES
    lengths = {20: 16, 40: 16} if options.quick else LENGTHS
    task = f"{updates} updates on {BATCH} strings of {TRAINED} bits each"
    print(f"prefix parity: {task}; device: {options.device}", flush=True)
    outcomes = []
    total = len(MODELS) * options.seeds * (updates + len(lengths))
    with tqdm(total=total, unit="update", leave=False, disable=None) as bar:
        for seed in options.all_seeds:
            for model in MODELS:
                bar.set_description(f"seed {seed}, {model}")
                outcomes.append(measure(model, seed, updates, lengths, options.device, bar.update))
                finished.append(outcomes[-1].label)
    print(report(outcomes, options.quick))
    for path in pictures.parity(outcomes, TRAINED, options.out):
        print(f"saved {path}")
    return outcomes


def measure(
    model: str, seed: int, updates: int, lengths: dict[int, int], device: torch.device, tick: Callable[[], object]
) -> Outcome:
    """Trains one model and tests it at each length."""
    torch.manual_seed(seed)
    net = MODELS[model]().to(device)
    bits, labels = strings(BATCH, TRAINED, torch.Generator().manual_seed(seed), device)
    memory = training_memory(net, lambda: net.loss(bits, labels, lambda low, high: high))
    outcome = Outcome(model, seed, parameters(net), memory, train(net, seed, updates, tick))
    for length, count in lengths.items():
        outcome.scores[length] = score(net, seed, length, count)
        tick()
    return outcome


def train(net: Net, seed: int, updates: int, tick: Callable[[], object]) -> float:
    """Seconds it took. The strings depend on the seed only."""
    device = next(net.parameters()).device
    data, depths = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=updates, pct_start=0.1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=depths))

    began = time.perf_counter()
    for _ in range(updates):
        bits, labels = strings(BATCH, TRAINED, data, device)
        optimizer.zero_grad()
        net.loss(bits, labels, draw).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick()
    synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def score(net: Net, seed: int, length: int, count: int) -> Score:
    device = next(net.parameters()).device
    bits, labels = strings(count, length, torch.Generator().manual_seed(1_000_003 + seed), device)
    logits, steps = net.answer(bits)
    right = (logits > 0) == (labels > 0)
    return Score(
        exact=100 * right.all(1).float().mean().item(),
        bits=100 * right.float().mean().item(),
        steps=steps.float().mean().item(),
    )


def report(outcomes: list[Outcome], quick: bool) -> str:
    """Tables of what was measured, a row a model and a column a length, and what they say, if they say anything."""
    lengths = list(outcomes[0].scores)
    own = {model: [outcome for outcome in outcomes if outcome.model == model] for model in MODELS}

    def by_length(what: str) -> str:
        rows = [
            [
                model,
                *(spread([getattr(o.scores[n], what) for o in those], 0 if what == "steps" else 1) for n in lengths),
            ]
            for model, those in own.items()
        ]
        return table([_TITLES[what], *(f"{n} bits" for n in lengths)], rows)

    costs = [
        [model, f"{those[0].parameters:,}", f"{those[0].memory / 2**20:.1f}", spread([o.seconds for o in those])]
        for model, those in own.items()
    ]
    tables = [table(["", "parameters", "peak memory, MiB", "training, s"], costs), *map(by_length, _TITLES)]
    said = [QUICK] if quick else conclusions(own)
    return "\n" + "\n\n".join([*tables, "\n".join([_LEGEND, "", *said, ""])])


_TITLES = {"exact": "every bit right, %", "bits": "bits right, %", "steps": "steps per string"}
_LEGEND = (
    "Memory: one training step of the most blocks that it may draw, beside parameters and gradients. Steps: blocks\n"
    "that a test string goes through. ±: standard deviation over seeds."
)


def conclusions(own: dict[str, list[Outcome]]) -> Iterator[str]:
    """What the numbers of this run say, in sentences."""
    longest = max(own[IMPLICIT][0].scores)
    exact = {model: mean(o.scores[longest].exact for o in those) for model, those in own.items()}
    fared = ", ".join(f"the {model} {value:.0f} %" for model, value in exact.items())
    yield f"Of strings of {longest} bits, {longest // TRAINED} times as long as those trained on: {fared}."
    yield (
        f"A block sees 2 positions to each side, the stack of {DEPTH} sees {REACH}: past {REACH + 1} bits it can't "
        "know the answer.\n"
        "The fair rival is the weight-tied loop, which can go on as long; but it has to be told how long."
    )
