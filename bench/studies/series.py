"""Time series: several steps ahead on sunspots and on CO2; solves that begin where the last window's ended."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq import plot
from tritondeq.toolbox import parameters

from . import contestants as who
from . import effort, plots
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, at_equal_time, batches, cost, latency, solved, train
from .verdict import against
from .windows import CO2, SUNSPOTS, TESTED, Data, Series, data, references, series

STREAMED = 1e-3  # tolerance at which the table tells of the stream
SHOWN = 4  # horizons in the picture of forecasts


class Net(nn.Module):
    """Forecasts [B, H] from windows [B, W], both less the last value of the window.

    A linear stem, the contestant's body, and a linear head that also sees the window.
    """

    def __init__(self, contestant: str, own: Series, features: int, depth: int, **options: Any):
        super().__init__()
        self.stem = nn.Linear(own.context, features)
        self.body = who.body(contestant, lambda: tdeq.cells.MLP(features), depth, **options)
        self.head = nn.Linear(features, own.horizon)
        self.skip = nn.Linear(own.context, own.horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Returns forecasts [B, H] for windows x, [B, W]."""
        return self.after(x, self.body(self.stem(x)))

    def after(self, x: Tensor, z: Tensor) -> Tensor:
        """The forecast made of what the body returned."""
        return self.head(z) + self.skip(x)


def build(job: Job) -> Net:
    """The contestant's net, drawn from the job's seed."""
    settings, own = job.settings, series(job.case)
    options = {"tol": settings["tol"], "max_steps": settings["max_steps"], "adjoint": tdeq.Implicit(tol=1e-2)}
    features, depth = settings["features"], settings["depth"]

    def made(contestant: str, width: int) -> Net:
        return Net(contestant, own, width, depth, **options)

    if job.contestant == who.WIDE:
        target = parameters(made(who.STACK, features))
        features = who.matched(lambda width: parameters(made(who.DEQ, width)), target, range(features, 8 * features, 8))
    torch.manual_seed(job.seed)
    return made(job.contestant, features).to(job.device)


def run(job: Job) -> dict[str, Any]:
    """Trains one contestant with one seed and returns what was measured."""
    net, own, settings = build(job), series(job.case), job.settings
    every = data(own, job.device)
    batch = min(settings["batch"], len(every.x))

    def loss(at: Tensor) -> Tensor:
        return F.l1_loss(net(every.x[at]), every.y[at])

    @torch.no_grad()
    def errors() -> Tensor:
        """By how far ahead, [H]."""
        return every.unit * (net(every.test_x) - every.test_y).abs().mean(0)

    found = cost(net, lambda: loss(torch.arange(batch, device=job.device)))
    updates = max(3, round(settings["epochs"] * len(every.x) / batch))
    order = batches(job.seed, len(every.x), batch, updates)
    found |= train(
        net,
        loss,
        (at.to(job.device) for at in order),
        updates=updates,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"][job.case],
        check=lambda: errors().mean().item(),
    )
    found |= {"error": errors().mean().item(), "by_horizon": counted(errors())} | solved(net.body)
    found |= {"near": found["by_horizon"][0][1], "far": found["by_horizon"][-1][1]}
    found |= latency(lambda: net(every.test_x), len(every.test_x), job.device)
    truth = own.windows(True)[:, own.context :]
    by_rule = {name: (said - truth).abs().mean(0) / own.step for name, said in references(own).items()}
    found |= {name: error.mean().item() for name, error in by_rule.items()}
    found["references"] = {name: counted(error) for name, error in by_rule.items()}
    return found | shown(net, own, every) | streamed(net, every, settings)


def counted(values: Tensor) -> list[list[float]]:
    """[1, first], [2, second], ..."""
    return [[i, value] for i, value in enumerate(values.tolist(), 1)]


@torch.no_grad()
def shown(net: Net, own: Series, every: Data) -> dict[str, Any]:
    """Forecasts of the last horizons, one after another, and what came true: curves over years."""
    origins = range(len(every.test_x) - 1, -1, -own.horizon)[:SHOWN][::-1]
    curves = {"forecast": [], "truth": []}
    for origin in origins:
        at = own.split + origin
        said = own.values[at - 1] + own.step * every.unit * net(every.test_x[origin, None])[0].double().cpu()
        for i, value in enumerate(said.tolist()):
            curves["forecast"].append([own.times[at + i], value])
            curves["truth"].append([own.times[at + i], own.values[at + i].item()])
    return curves


@torch.no_grad()
def streamed(net: Net, every: Data, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures solves of the first test windows one after another, as they come in.

    Of equilibria, what `effort.by_start` returns; of these and of the loop, by steps allowed, the errors, begun from
    nothing (cold) and at the window before (warm).
    """
    body, x = net.body, every.test_x[: settings["streamed"]]
    core = effort.core(body)
    if core is None:
        return {}
    own = net.stem(x)
    into = body.prelude(own) if isinstance(body, who.Hybrid) else own

    def error(z: Tensor) -> float:
        z = body.coda(own, z) if isinstance(body, who.Hybrid) else z
        return (every.unit * (net.after(x, z) - every.test_y[: len(x)]).abs().mean()).item()

    found = {"cold_by_steps": [], "warm_by_steps": []}
    for count in settings["steps"]:
        with effort.taking(core, count, min(settings["tols"])):
            found["cold_by_steps"].append([count, error(core(into))])
            found["warm_by_steps"].append([count, error(effort.follow(core, into)[0])])
    if who.solution(body) is None:
        return found
    return found | effort.by_start(core, into, settings["tols"], STREAMED)


def pictures(runs: list[Run]) -> dict[str, Draw]:
    """Returns what to draw, by name."""
    cases = [case for case in STUDY.cases if plots.of(runs, case=case)]
    return {
        "horizon": lambda figure: horizon(figure, cases, runs),
        "forecasts": lambda figure: forecasts(figure, cases, runs),
        "stream": lambda figure: stream(figure, cases, runs),
        "learning": lambda figure: plots.learning(figure, cases, runs, ERROR),
    }


def horizon(figure: Any, cases: list[str], runs: list[Run]) -> None:
    """Errors by how far ahead, and those of the rules."""
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for ax, case in zip(axes, cases, strict=True):
        own = plots.of(runs, case=case)
        plots.lines(ax, own, "by_horizon")
        for (name, curve), dashes in zip(own[0]["references"].items(), ("-", "--", ":", "-."), strict=True):
            ax.plot(*np.array(curve).T, color="0.45", linestyle=dashes, linewidth=1.5, label=name, zorder=1)
        worst = max(error for run in own for _, error in run["by_horizon"])
        ax.set(title=case, xlabel=f"{TOLD[case].step} ahead", ylabel=ERROR, ylim=(0, 1.5 * worst))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def forecasts(figure: Any, cases: list[str], runs: list[Run]) -> None:
    """The end of each series, and what the DEQ and the stack of one seed said of it, one horizon after another."""
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for ax, case in zip(axes, cases, strict=True):
        own = plots.of(runs, case=case, seed=runs[0]["seed"])
        ax.plot(*np.array(own[0]["truth"]).T, color="0.2", linewidth=3, alpha=0.4, label="what came true")
        for run in (run for name in (who.DEQ, who.STACK) for run in plots.of(own, contestant=name)):
            colour = plots.style(run["contestant"])["color"]
            for i, part in enumerate(np.split(np.array(run["forecast"]), len(run["forecast"]) // TOLD[case].horizon)):
                ax.plot(*part.T, color=colour, linewidth=1.3, label=None if i else run["contestant"])
        ax.set(title=case, xlabel="year", ylabel=TOLD[case].unit)
        plot.tidy(ax)
    plots.legend(figure, axes[0])


def stream(figure: Any, cases: list[str], runs: list[Run]) -> None:
    """Steps by tolerance and what warm starts save of them, and errors by the steps allowed; cold ones are dashed."""
    figure.set_size_inches(8.4, 2.9 * len(cases))
    grid = figure.subplots(len(cases), 3, squeeze=False)
    for (steps, saved, errors), case in zip(grid, cases, strict=True):
        looped = [run for run in plots.of(runs, case=case) if "warm_by_steps" in run]
        solved = [run for run in looped if "warm_by_tol" in run]
        plots.lines(steps, solved, "warm_by_tol")
        plots.lines(steps, solved, "cold_by_tol", linestyle="--")
        plots.lines(saved, solved, "saved_by_tol")
        plots.lines(errors, looped, "cold_by_steps", linestyle="--")
        plots.lines(errors, looped, "warm_by_steps")
        for ax, label in ((steps, "steps a window"), (saved, "saved by warm start, %")):
            ax.set(title=case, xscale="log", xlabel="tolerance", ylabel=label)
            ax.invert_xaxis()
        errors.set(title=case, xlabel="steps allowed a window", ylabel=ERROR)
    for label, dashes in (("warm", "-"), ("cold", "--")):
        grid[0, 2].plot([], [], color="0.3", linestyle=dashes, label=label)
    handles, labels = grid[0, 2].get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))  # the last of a name
    figure.legend(each.values(), each, loc="outside lower center", ncols=len(each), frameon=False, fontsize=8)


def says(runs: list[Run]) -> Iterator[str]:
    """Yields what the numbers show, in sentences."""
    for case in STUDY.cases:
        own = {name: plots.of(runs, case=case, contestant=name) for name in plots.names(plots.of(runs, case=case))}
        for name in (name for name in (who.DEQ, who.HYBRID, who.STACK) if name in own):
            yield f"{case}: {name} {_against_rules(own[name])}."
        for name in (name for name in (who.DEQ, who.HYBRID) if name in own):
            yield f"{case}, {name}, {_streamed(own[name])}."
        if own:
            seconds, values = at_equal_time({name: [run["curve"] for run in each] for name, each in own.items()})
            fared = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            yield f"{case}: after {seconds:.1f} s, when the quickest is done and others still train, errors: {fared}."


def _against_rules(runs: list[Run]) -> str:
    errors = [run["error"] for run in runs]
    told = {rule: against(errors, runs[0][rule], "less") for rule in runs[0]["references"]}
    each = ", ".join(f"{rule} {v.theirs:.2f}" + (f" ({v.word})" if v.word else "") for rule, v in told.items())
    return f"{mean(errors):.2f} against what needs no net: {each}"


def _streamed(runs: list[Run]) -> str:
    cold, warm, ahead = ([run[key] for run in runs] for key in effort.STARTS)
    saved = against([run["saved"] for run in runs], 0.0, "more")
    told = f"{abs(saved.ours):.0f} % {'fewer' if saved.ours > 0 else 'more'}" + (
        f", a {saved.word}" if saved.word else ""
    )
    worst = ", ".join(f"{max(run[f'{start}_residual'] for run in runs):.1e}" for start in effort.STARTS)
    return (
        f"window after window to a residual of {STREAMED:g}: {mean(cold):.1f} steps from nothing, {mean(warm):.1f} "
        f"from the last equilibrium ({told}), {mean(ahead):.1f} from the line through two; the largest residuals are "
        f"{worst}, and equilibria found warm and cold differ by at most {max(run['apart'] for run in runs):.1e}"
    )


@dataclass(frozen=True)
class Told:
    """How a task is spoken of."""

    unit: str
    step: str
    horizon: int


ERROR = "error (MASE)"
TOLD = {SUNSPOTS: Told("sunspot number", "years", 11), CO2: Told("CO2, ppm", "weeks", 26)}
DECAY = {SUNSPOTS: 10.0, CO2: 1.0}  # of 0.01, 1, 3 and, for sunspots, 10
SHARED = {"lr": 3e-3, "weight_decay": DECAY, "batch": 64, "tol": 1e-3, "max_steps": 40, "steps": [1, 2, 3, 4, 6, 8, 12]}
SHARED |= {"tols": [1e-1, 1e-2, STREAMED, 1e-4, 1e-5]}
TINY = {"epochs": 0.1, "features": 8, "depth": 2, "streamed": 4, "steps": [1, 2], "tols": [1e-2, STREAMED]}
STUDY = Study(
    name="series",
    title="Time series: several steps ahead, and warm starts",
    question=(
        "do equilibria forecast better than stacks, and do they need fewer steps where each window's solve begins at "
        "the equilibrium of the window before ([StreamDEQ, Ertenli et al. 2022](https://arxiv.org/abs/2204.13492))? "
        "The cell is `cells.MLP`; every net also has a linear path from the window to the forecast. "
        "Errors are mean absolute ones over the mean change from one value to the next in training (MASE, Hyndman & "
        "Koehler 2006). What rules without a net reach stands beside: the last value; that of a season ago, with and "
        "without the change of the last year; and least squares from the window to what follows."
    ),
    data=(
        "of statsmodels: yearly sunspot numbers 1700-2008 (309; 33 years to foretell 11, a season of 11), and weekly "
        "CO2 at Mauna Loa 1958-2001 (2,284, of which 59 are missing and interpolated linearly; 104 weeks to foretell "
        f"26, a season of 52). The last {TESTED:.0%} are for testing; windows of context and targets move by one. "
        "Epochs, learning rate and weight decay, the same for all of a series, are the best tried of quick runs, for "
        "DEQ, stack and block alike, on the last quarter of what is trained on. Seeds differ in initial weights and "
        "order of batches, and not in the split: a verdict does not allow for the chance of these two series."
    ),
    settings={
        "tiny": SHARED | TINY,
        "quick": SHARED | {"epochs": 30, "features": 32, "depth": 4, "streamed": 100},
        "full": SHARED | {"epochs": 30, "features": 128, "depth": 8, "streamed": 500},
    },
    contestants=who.ALL,
    measures=(
        Measure("error", ERROR, "less", main=True, digits=3),
        Measure("near", "one step ahead", "less", digits=3),
        Measure("far", "the last step ahead", "less", digits=3),
        Measure("last value", "of the last value", digits=3),
        Measure("seasonal naive", "of the season before", digits=3),
        Measure("seasonal naive with drift", "of it with drift", digits=3),
        Measure("linear", "of least squares", digits=3),
        Measure("cold", f"steps to {STREAMED:g}, cold", digits=2),
        Measure("warm", f"steps to {STREAMED:g}, warm", digits=2),
        Measure("saved", "saved by warm start, %"),
        *COSTS,
    ),
    run=run,
    pictures=pictures,
    says=says,
    cases=(SUNSPOTS, CO2),
    packages=("statsmodels",),
)
