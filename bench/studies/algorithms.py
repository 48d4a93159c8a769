"""Algorithms: prefix parity and mazes, trained small and tested large, with as many steps as it takes, or fewer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from tritondeq.adjoints import Unrolled
from tritondeq.demo import parity
from tritondeq.fixed_point import fixed_point

from . import contestants as who
from . import plots
from .mazes import Maze, mazes
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, cost, latency, train

PARITY, MAZE = "prefix parity", "mazes"
TESTED = 1_000_003  # seeds of test samples begin here
Ints = Callable[[int, int], int]  # a random integer from the first to the second


@dataclass(frozen=True)
class Task:
    """Data, nets, and what the loop is told.

    Attributes:
        samples: (x, y) of a count, size and seed.
        net: Of a number of blocks and of channels; with `start`, `read` and `blocks`.
        told: The number of steps that the loop is to take for a size: those that the longest way may need.
    """

    samples: Callable[[int, int, int], tuple[Tensor, Tensor]]
    net: Callable[[int, int], nn.Module]
    told: Callable[[int], int]


def _strings(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    return parity.strings(count, length, torch.Generator().manual_seed(seed), torch.device("cpu"))


TASKS = {
    PARITY: Task(_strings, lambda blocks, channels: parity.Net(blocks), told=lambda length: length),
    MAZE: Task(mazes, Maze, told=lambda size: size**2 // 4),
}


class Contestant(nn.Module):
    """A task's net, and how its blocks are gone through; `settings` are those of the study for the task.

    An equilibrium trains with a random number of steps without gradient, then a few that are differentiated, and its
    last step must change little; a loop with a random number of steps, all differentiated.
    """

    def __init__(self, name: str, task: Task, settings: dict[str, Any]):
        super().__init__()
        if name not in STUDY.contestants:
            raise ValueError(f"contestant must be one of {', '.join(STUDY.contestants)}, got {name!r}")
        self.name, self.task, self.settings = name, task, settings
        self.net = task.net({who.STACK: settings["depth"], who.HYBRID: 3}.get(name, 1), settings["channels"])

    @property
    def implicit(self) -> bool:
        """Whether the contestant is solved for an equilibrium."""
        return self.name in (who.DEQ, who.HYBRID)

    def enter(self, x: Tensor) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """(the block that is repeated, where it starts, what it is given, u)."""
        z, u = self.net.start(x)
        if self.name == who.HYBRID:
            prelude, core, _ = self.net.blocks
            return core, z, prelude(z, u), u
        return self.net.blocks[0], z, u, u

    def leave(self, z: Tensor, u: Tensor) -> Tensor:
        """Logits."""
        return self.net.read(self.net.blocks[2](z, u) if self.name == who.HYBRID else z)

    def loss(self, batch: tuple[Tensor, Tensor], draw: Ints) -> Tensor:
        """Returns the loss of a batch; `draw` draws the numbers of steps."""
        x, y = batch
        if not self.implicit:
            return parity.cross_entropy(self.explicit(x, draw(*self.settings["loop"])), y)
        core, z, given, u = self.enter(x)
        free, kept = draw(0, self.settings["free"]), draw(*self.settings["kept"])
        if free:
            with torch.no_grad():
                z = repeat(core, z, given, free)
        z = repeat(core, z, given, kept - 1)
        onward = core(z, given)
        residual = (onward - z).flatten(1).norm(dim=1) / onward.flatten(1).norm(dim=1)
        return parity.cross_entropy(self.leave(onward, u), y) + parity.SETTLE * residual.mean()

    def explicit(self, x: Tensor, steps: int) -> Tensor:
        """Logits of a loop of so many steps, or of a stack, which has its own number."""
        if self.name == who.LOOP:
            return self.repeated(x, steps)
        z, u = self.net.start(x)
        for block in self.net.blocks:
            z = block(z, u)
        return self.net.read(z)

    def repeated(self, x: Tensor, steps: int) -> Tensor:
        """Logits after so many steps of the block that is repeated, whatever the residual."""
        core, z, given, u = self.enter(x)
        return self.leave(repeat(core, z, given, steps), u)

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits, steps of each sample, which have converged or None)."""
        if self.implicit:
            core, z, given, u = self.enter(x)
            solution = fixed_point(core, z, (given,), tol=self.settings["tol"], max_steps=self.settings["max_steps"])
            more = 2 if self.name == who.HYBRID else 0
            return self.leave(solution.value, u), solution.steps.float() + more, solution.converged
        steps = self.task.told(x.shape[1]) if self.name == who.LOOP else len(self.net.blocks)
        return self.explicit(x, steps), torch.full((len(x),), float(steps)), None


def repeat(block: nn.Module, z: Tensor, u: Tensor, steps: int) -> Tensor:
    """The block, so many times."""
    return fixed_point(block, z, (u,), adjoint=Unrolled(steps)).value if steps else z


@torch.no_grad()
def score(net: Contestant, x: Tensor, y: Tensor) -> dict[str, float]:
    """`exact` and `parts`, shares in %; `steps`, `most_steps`; of an equilibrium, the share that `converged`, in %."""
    logits, taken, converged = net.answer(x)
    exact, parts = right(logits, y)
    found = {"exact": exact, "parts": parts, "steps": taken.mean().item(), "most_steps": taken.max().item()}
    return found | ({} if converged is None else {"converged": 100 * converged.float().mean().item()})


def right(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """The share of samples that are right in every bit or pixel, and the share of these, in %."""
    agree = ((logits > 0) == (y > 0)).flatten(1).float()
    return 100 * agree.amin(1).mean().item(), 100 * agree.mean().item()


def run(job: Job) -> dict[str, Any]:
    """Trains one contestant with one seed and returns what was measured."""
    task, settings, device = TASKS[job.case], job.settings[job.case], job.device
    torch.manual_seed(job.seed)
    net = Contestant(job.contestant, task, settings).to(device)
    depths = torch.Generator().manual_seed(job.seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=depths))

    def samples(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        return tuple(part.to(device) for part in task.samples(count, size, seed))

    small, *larger = settings["sizes"]
    tests = {size: samples(settings["test"], size, TESTED + job.seed) for size in settings["sizes"]}
    first = samples(settings["batch"], small, job.seed)
    found = cost(net, lambda: net.loss(first, lambda low, high: high))
    first_seed = job.seed * settings["updates"]
    found |= train(
        net,
        lambda batch: net.loss(batch, draw),
        (samples(settings["batch"], small, first_seed + i) for i in range(settings["updates"])),
        updates=settings["updates"],
        lr=settings["lr"],
        weight_decay=0.0,
        check=lambda: score(net, *tests[small])["exact"],
    )
    scores = {size: score(net, *pair) for size, pair in tests.items()}
    for key, name in (("exact", "by_size"), ("parts", "parts_by_size"), ("steps", "steps_by_size")):
        found[name] = [[size, scores[size][key]] for size in scores]
    found |= {"probe": settings["probe"], "tested": settings["test"], "tested_larger": settings["test"] * len(larger)}
    found |= {"small": scores[small]["exact"], "larger": mean(scores[size]["exact"] for size in larger)}
    found |= {"largest": scores[larger[-1]]["exact"], "largest_parts": scores[larger[-1]]["parts"]}
    found |= {key: scores[larger[-1]].get(key) for key in ("steps", "most_steps", "converged")}
    found |= latency(lambda: net.answer(tests[small][0]), settings["test"], device)
    with torch.no_grad():
        x, y = tests[settings["probe"]]
        if net.implicit or net.name == who.LOOP:
            found["by_steps"] = [[steps, right(net.repeated(x, steps), y)[0]] for steps in settings["allowed"]]
        else:
            found["by_steps"] = [[len(net.net.blocks), scores[settings["probe"]]["exact"]]]
    return found


def _present(runs: list[Run]) -> list[str]:
    """Cases of which there are runs."""
    return [case for case in STUDY.cases if plots.of(runs, case=case)]


def pictures(runs: list[Run]) -> dict[str, Draw]:
    """Returns what to draw, by name."""
    cases = _present(runs)
    size = "size: bits, or pixels a side"
    by_size = [("by_size", size, "wholly right, %"), ("steps_by_size", size, "steps")]

    def sizes(figure: Any) -> None:
        for i, ax in enumerate(plots.panels(figure, cases, by_size, runs)):
            ax.set_xticks([each for each, _ in plots.of(runs, case=cases[i // 2])[0]["by_size"]])

    def steps(figure: Any) -> None:
        grid = plots.panels(figure, cases, [("by_steps", "steps taken", "wholly right, %")], runs)
        for ax, case in zip(grid, cases, strict=True):
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_title(f"{case} of size {plots.of(runs, case=case)[0]['probe']}", fontsize=10)

    return {
        "sizes": sizes,
        "steps": steps,
        "learning": lambda figure: plots.learning(figure, cases, runs, "wholly right, %"),
    }


def says(runs: list[Run]) -> Iterator[str]:
    """Yields what the numbers show, in sentences."""
    for case in _present(runs):
        own = plots.of(runs, case=case)
        by_name = {name: plots.of(own, contestant=name) for name in plots.names(own)}
        small, largest = (own[0]["by_size"][i][0] for i in (0, -1))
        fared = ", ".join(f"{name} {mean(r['largest'] for r in those):.0f} %" for name, those in by_name.items())
        yield f"{case}, wholly right at size {largest}, trained on {small}: {fared}."
        for name in (name for name in by_name if name not in who.RIVALS):
            those = by_name[name]
            steps = [mean(r["steps_by_size"][i][1] for r in those) for i in (0, -1)]
            yield (
                f"{case}, {name}: {steps[0]:.0f} steps at size {small}, {steps[1]:.0f} at {largest}, where "
                f"{mean(r['converged'] for r in those):.0f} % of its solves converge."
            )
        for name, those in by_name.items():
            points = zip(*(run["by_steps"] for run in those), strict=True)
            curve = [(each[0][0], mean(value for _, value in each)) for each in points]
            if len(curve) > 1:
                best = max(curve, key=lambda point: point[1])
                points = f"{curve[0][1]:.0f} % at {curve[0][0]}, at best {best[1]:.0f} % at {best[0]}"
                yield (
                    f"{case} of size {own[0]['probe']}, {name} by steps taken: {points}, {curve[-1][1]:.0f} % at "
                    f"{curve[-1][0]}."
                )


SHARED = {"tol": parity.TOL, "free": parity.FREE, "kept": list(parity.TRACKED), "loop": list(parity.LOOP)}
SHARED |= {"depth": parity.DEPTH, "channels": parity.CHANNELS, "max_steps": 300, "lr": 5e-3, "test": 128}
SHARED |= {"allowed": [5, 10, 20, 40, 80, 160]}
STRINGS = SHARED | {"batch": 64, "updates": 400, "sizes": [20, 40, 80, 160], "probe": 80}
MAZES = SHARED | {"batch": 32, "updates": 600, "sizes": [9, 13, 17, 21], "probe": 17, "test": 64}
FULL = {"updates": 3000, "test": 512, "max_steps": 2000, "allowed": [5, 10, 20, 40, 80, 160, 320, 640]}
LARGE = {PARITY: FULL | {"batch": 128, "sizes": [20, 40, 80, 160, 320, 640], "probe": 320}}
LARGE |= {MAZE: FULL | {"batch": 128, "sizes": [9, 13, 17, 21, 25, 33, 41], "probe": 25}}
TINY = {"updates": 3, "depth": 2, "batch": 4, "test": 4, "allowed": [2, 4], "max_steps": 10, "channels": 8}
SMALL = {PARITY: TINY | {"sizes": [8, 12], "probe": 12}, MAZE: TINY | {"sizes": [5, 9], "probe": 9}}
STUDY = Study(
    name="algorithms",
    title="Algorithms: trained small, tested large",
    question=(
        "is a task that takes more steps the larger it is learnt by an equilibrium, which takes as many as it needs, "
        "where a stack has a fixed number? Both have convolutions of width 3 in their blocks, which see two places to "
        "each side, and an outer norm over channels. The fair rival is the loop: it trains with a random number of "
        "steps, all of them differentiated, and is told in a test how many to take, those that the longest way may "
        "need: a step a bit, and a step for each four pixels of a maze. The equilibrium is told nothing: it trains "
        "with a random number of steps without gradient and a few that are differentiated, the last of which has to "
        "change little, and stops by its residual. Peak memory is that of the most steps that may be drawn. The one "
        "learning rate was picked from 3e-3, 5e-3 and 8e-3 by a few runs of the equilibrium and the loop with a seed "
        "that is not reported. There is no wide DEQ, which would cost ten times as much a step. The picture of steps "
        "takes the same trained blocks for a fixed number of steps, whatever the residual."
    ),
    data=(
        "random bits and the parity of each prefix; and perfect mazes made by depth-first search, of which the one way "
        "between two cells is asked, every pixel of it. A sample counts where it is wholly right. All are drawn anew, "
        "those for testing from seeds of their own."
    ),
    settings={
        "tiny": {PARITY: STRINGS | SMALL[PARITY], MAZE: MAZES | SMALL[MAZE]},
        "quick": {PARITY: STRINGS, MAZE: MAZES},
        "full": {PARITY: STRINGS | LARGE[PARITY], MAZE: MAZES | LARGE[MAZE]},
    },
    contestants=tuple(name for name in who.ALL if name != who.WIDE),
    measures=(
        Measure("small", "right at the size trained on, %", "more", main=True, tested="tested"),
        Measure("larger", "right at larger sizes, %", "more", main=True, tested="tested_larger"),
        Measure("largest", "right at the largest size, %", "more", tested="tested"),
        Measure("largest_parts", "bits or pixels right there, %", "more"),
        *COSTS,
    ),
    run=run,
    pictures=pictures,
    says=says,
    cases=(PARITY, MAZE),
)
