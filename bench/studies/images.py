"""Images: the digits of scikit-learn, and digits hidden among pieces of others; noise, attacks, how far z* moves."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq.demo.digits import Data
from tritondeq.toolbox import parameters

from . import contestants as who
from . import plots
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, at_equal_time, batches, cost, latency, solved, train, work

DIGITS, CLUTTER = "digits", "cluttered digits"
SIDE, PIECES, PIECE, GRAIN = 16, 4, 4, 0.1  # of a cluttered image: pixels, foreign pieces, their pixels, noise
POOLED = 2  # what is left of a side before the head
WIDTHS = range(8, 97, 8)
NOISY, ATTACK = 0.2, 0.02  # at which the verdict is


class Net(nn.Module):
    """[B, 1, S, S] -> logits [B, 10]: a stem that halves the image, the contestant's body, and a head."""

    def __init__(self, contestant: str, channels: int, depth: int, **options: Any):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels))
        self.body = who.body(contestant, lambda: tdeq.cells.Conv(channels), depth, **options)
        self.head = nn.Linear(channels * POOLED**2, 10)

    def features(self, x: Tensor) -> Tensor:
        """z, [B, C, S / 2, S / 2]."""
        return self.body(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of images x, [B, classes]."""
        return self.head(F.adaptive_max_pool2d(self.features(x), POOLED).flatten(1))


def build(job: Job) -> Net:
    """The contestant's net, drawn from the job's seed."""
    options = {"tol": job.settings["tol"], "max_steps": job.settings["max_steps"], "solver": tdeq.Anderson(memory=4)}
    options["adjoint"] = tdeq.Implicit(tol=1e-2)
    depth, channels = job.settings["depth"], job.settings["channels"]

    def made(contestant: str, width: int) -> Net:
        return Net(contestant, width, depth, **options)

    if job.contestant == who.WIDE:
        target = parameters(made(who.STACK, channels))
        channels = who.matched(lambda width: parameters(made(who.DEQ, width)), target, WIDTHS)
    torch.manual_seed(job.seed)
    return made(job.contestant, channels).to(job.device)


def data(job: Job) -> Data:
    """Images in 0 ... 1, split by the seed."""
    digits = Data.split(job.seed, torch.device("cpu"))
    sizes = job.settings["train"], job.settings["test"]
    if job.case == DIGITS:
        parts = digits.x[: sizes[0]], digits.y[: sizes[0]], digits.test_x[: sizes[1]], digits.test_y[: sizes[1]]
    else:
        generator = torch.Generator().manual_seed(job.seed)
        parts = (
            *clutter(digits.x, digits.y, sizes[0], generator),
            *clutter(digits.test_x, digits.test_y, sizes[1], generator),
        )
    return Data(*(part.to(job.device) for part in parts))


def clutter(digits: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIDE, SIDE] of one whole digit somewhere among pieces of others, and noise; its label."""

    def draw(most: int) -> Tensor:
        return torch.randint(most, (count,), generator=generator)

    def window(side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a square of that size is in a larger one, as indices of a batch of them."""
        rows, columns = (draw(side - size + 1)[:, None] + torch.arange(size) for _ in range(2))
        return torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]

    canvas = torch.zeros(count, SIDE, SIDE)
    for _ in range(PIECES):
        cut, place = window(8, PIECE), window(SIDE, PIECE)
        canvas[place] = digits[draw(len(digits)), 0][cut]
    which = draw(len(digits))
    canvas[window(SIDE, 8)] = digits[which, 0]
    canvas = canvas + GRAIN * torch.randn(canvas.shape, generator=generator)
    return canvas.clamp(0, 1).unsqueeze(1), labels[which]


def fitted(job: Job) -> tuple[Net, Data, dict[str, Any]]:
    """The trained net, its data, and what it costs."""
    net, images, settings = build(job), data(job), job.settings

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(net(images.x[batch]), images.y[batch])

    first = slice(settings["batch"])
    found = cost(net, lambda: loss(first))
    order = batches(job.seed, len(images.x), settings["batch"], settings["updates"])
    found |= train(
        net,
        loss,
        (batch.to(job.device) for batch in order),
        updates=settings["updates"],
        lr=settings["lr"],
        check=lambda: accuracy(net, images.test_x, images.test_y),
    )
    found |= work(net, lambda: loss(first), lambda: net(images.test_x), len(images.test_x))
    return net, images, found


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """In %."""
    return 100 * (net(x).argmax(1) == y).float().mean().item()


def attacked(net: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """X moved by at most `radius` a pixel, uphill in the loss: projected gradient ascent (Madry et al. 2018)."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(moved), y), moved)
        moved = moved.detach() + 2.5 * radius / steps * slope.sign()
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)
    return moved.detach()


def run(job: Job) -> dict[str, Any]:
    """Trains one contestant with one seed and returns what was measured."""
    net, images, found = fitted(job)
    settings, x, y = job.settings, images.test_x, images.test_y
    found |= {"tested": len(x), "accuracy": accuracy(net, x, y)} | solved(net.body)
    found |= latency(lambda: net(x), len(x), job.device)
    found |= by_noise(net, job, x, y)
    attacks = [(radius, attacked(net, x, y, radius, settings["attack_steps"])) for radius in settings["attacks"]]
    found["by_attack"] = [[0.0, found["accuracy"]], *([radius, accuracy(net, moved, y)] for radius, moved in attacks)]
    return found | {"attacked": dict(found["by_attack"])[ATTACK]}


@torch.no_grad()
def by_noise(net: Net, job: Job, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Curves over the standard deviation of noise: accuracy, relative move of z, steps, and what of it is measured."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(job.seed)).to(job.device)
    curves = {"by_noise": [], "moved_by_noise": [], "steps_by_noise": [], "converged_by_noise": []}
    rest = net.features(x)
    for level in job.settings["noise"]:
        noisy = x + level * noise
        curves["by_noise"].append([level, accuracy(net, noisy, y)])
        after = solved(net.body)
        moved = (net.features(noisy) - rest).flatten(1).norm(dim=1) / rest.flatten(1).norm(dim=1)
        curves["moved_by_noise"].append([level, moved.mean().item()])
        curves["steps_by_noise"].append([level, after["steps"]])
        curves["converged_by_noise"].append([level, after.get("converged", 100.0)])
    return curves | {"noisy": dict(curves["by_noise"])[NOISY], "moved": dict(curves["moved_by_noise"])[NOISY]}


def pictures(runs: list[Run]) -> dict[str, Draw]:
    """Returns what to draw, by name."""
    cases = [case for case in STUDY.cases if plots.of(runs, case=case)]
    noise, attack = "noise, standard deviation", "attack, most change of a pixel"
    robustness = [("by_noise", noise, "test accuracy, %"), ("by_attack", attack, "test accuracy, %")]
    stability = [("moved_by_noise", noise, "move of z, relative"), ("steps_by_noise", noise, "steps")]
    return {
        "robustness": lambda figure: plots.panels(figure, cases, robustness, runs),
        "stability": lambda figure: plots.panels(figure, cases, stability, runs),
        "learning": lambda figure: plots.learning(figure, cases, runs, "test accuracy, %"),
    }


def says(runs: list[Run]) -> Iterator[str]:
    """Yields what the numbers show, in sentences."""
    for case in STUDY.cases:
        own = plots.of(runs, case=case)
        if not own:
            continue
        seconds, values = at_equal_time(
            {name: [r["curve"] for r in plots.of(own, contestant=name)] for name in plots.names(own)}
        )
        fared = ", ".join(f"{name} {value:.1f} %" for name, value in values.items())
        yield f"{case}: after {seconds:.1f} s, when the quickest is done and the others still train: {fared}."
        for name in (who.DEQ, who.HYBRID):
            curve = [r["converged_by_noise"] for r in plots.of(own, contestant=name)]
            first, last = (mean(points[i][1] for points in curve) for i in (0, -1))
            level = curve[0][-1][0]
            said = f"{first:.1f} % converge on clean images, {last:.1f} % under noise of {level:g}"
            yield f"{case}: of the {name}'s solves {said}."


SHARED = {"noise": [0.0, 0.1, 0.2, 0.3, 0.4], "attacks": [0.01, 0.02, 0.04], "attack_steps": 4, "lr": 5e-3}
SHARED |= {"batch": 64, "tol": 1e-3, "max_steps": 30, "train": 3000, "test": 360}
TINY = {"updates": 3, "channels": 8, "depth": 2, "train": 64, "test": 32, "batch": 16}
TINY |= {"noise": [0.0, NOISY], "attacks": [ATTACK], "attack_steps": 2}
FULL = {"updates": 3000, "channels": 32, "depth": 10, "train": 20000, "test": 2000, "attack_steps": 20}
STUDY = Study(
    name="images",
    title="Images: accuracy and robustness",
    question=(
        "are images read better by an equilibrium than by a stack, and is the equilibrium, which a contraction holds, "
        "less moved by noise and by attacks? The cell is `cells.Conv`. Attacks are projected gradient ascent within a "
        "largest change of a pixel ([Madry et al. 2018](https://arxiv.org/abs/1706.06083)), by the gradient of the "
        "attacked net itself, for an equilibrium the implicit one."
    ),
    data=(
        "the 1,797 digits of scikit-learn (8 x 8), 360 of them for testing, drawn anew and stratified by each seed; "
        f"and {SIDE} x {SIDE} images made of them, a whole digit among {PIECES} pieces of others, "
        f"{PIECE} x {PIECE} each, and noise of {GRAIN}. Those for testing are made of test digits only. The one "
        "learning rate was picked by a run each of the block, the stack and the DEQ on cluttered digits, with seed 0, "
        "by its test accuracy."
    ),
    settings={
        "tiny": SHARED | TINY,
        "quick": SHARED | {"updates": 300, "channels": 16, "depth": 6},
        "full": SHARED | FULL,
    },
    contestants=who.ALL,
    measures=(
        Measure("accuracy", "test accuracy, %", "more", main=True, tested="tested"),
        Measure("noisy", f"under noise of {NOISY}, %", "more", main=True, tested="tested"),
        Measure("attacked", f"under attacks of {ATTACK}, %", "more", main=True, tested="tested"),
        Measure("moved", f"move of z under noise of {NOISY}", "less", digits=2),
        *COSTS,
    ),
    run=run,
    pictures=pictures,
    says=says,
    cases=(DIGITS, CLUTTER),
)
