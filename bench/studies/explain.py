"""What an equilibrium explains: which inputs are hard, by its steps; how z* depends on them, by exact derivatives."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import tritondeq as tdeq

from . import contestants as who
from . import images, plots
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, Clock, solved
from .verdict import compare

POWER, STEP, TIGHT = 12, 1e-5, 1e-11  # iterations for a norm; of finite differences; tolerance of a reference
EARLY = 4  # evaluations


def run(job: Job) -> dict[str, Any]:
    """Trains one contestant with one seed and returns what was measured."""
    net, data, found = images.fitted(job)
    x, y, settings = data.test_x, data.test_y, job.settings
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(job.seed)).to(job.device)
    found |= {"tested": len(x), "accuracy": images.accuracy(net, x, y)} | solved(net.body)
    found |= hard(net, x, y, settings["noise"] * noise)
    few = slice(settings["few"])
    found |= flips(net, x, y, noise, settings)
    return found | sensitivity(net, x[few]) | exactness(net, x[few], noise[few])


@torch.no_grad()
def hard(net: images.Net, x: Tensor, y: Tensor, noise: Tensor) -> dict[str, Any]:
    """Measures how well effort, early residual and margin separate misread images, and effort noisy ones.

    Effort is steps of an equilibrium, or the last change of an explicit net; the residual is that after EARLY steps.
    Misread images are among noisy ones, noisy ones among clean ones. Measures are areas under the curve, 0.5 for none.
    `effort_margin` is their rank correlation (Spearman). `error_by_steps`: of an equilibrium, the share misread in % of
    the images that took so many steps, in fifths.
    """
    net(x)
    clean = effort(net)
    with traced(net.body):
        logits = net(x + noise)
    noisy, wrong = effort(net), logits.argmax(1) != y
    both = torch.cat([clean, noisy]), torch.cat([torch.zeros_like(wrong), torch.ones_like(wrong)])
    found = {"misread": 100 * wrong.float().mean().item(), "effort_tells": auc(noisy, wrong)}
    found |= {"margin_tells": auc(-margins(logits), wrong), "effort_tells_noise": auc(*both)}
    found["effort_margin"] = rank_correlation(noisy, margins(logits))
    if who.solution(net.body) is not None:
        trace = who.solution(net.body).trace
        found["residual_tells"] = auc(trace[min(EARLY, len(trace)) - 1].nan_to_num(0.0), wrong)  # it was done before
        fifths = noisy.argsort(stable=True).tensor_split(5)
        found["error_by_steps"] = [[noisy[i].mean().item(), 100 * wrong[i].float().mean().item()] for i in fifths]
    return found


@contextmanager
def traced(body: nn.Module) -> Iterator[None]:
    """Solves keep the residual of every step."""
    layer = who.core(body)
    if layer is not None:
        layer.trace = True
    yield
    if layer is not None:
        layer.trace = False


def effort(net: images.Net) -> Tensor:
    """Of each sample of the last call: steps, or the last change where all take the same steps."""
    return who.effort(net.body) if who.solution(net.body) is None else who.steps(net.body)


def margins(logits: Tensor) -> Tensor:
    """By how much the first is ahead of the second."""
    top = logits.topk(2).values
    return top[:, 0] - top[:, 1]


def auc(score: Tensor, label: Tensor) -> float | None:
    """Area under the receiver's curve; None where all labels are the same."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(label.cpu(), score.cpu())) if 0 < label.sum() < len(label) else None


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """None where all of one are the same."""
    from scipy.stats import spearmanr

    return float(spearmanr(a.cpu(), b.cpu()).statistic) if a.unique().numel() > 1 < b.unique().numel() else None


def jacobian(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [B, 10], their derivatives by the pixels [B, 10, P])."""
    x = x.clone().requires_grad_()
    logits = net(x)
    rows = [torch.autograd.grad(logits[:, i].sum(), x, retain_graph=True)[0] for i in range(logits.shape[1])]
    return logits.detach(), torch.stack(rows, 1).flatten(2)


def flips(net: images.Net, x: Tensor, y: Tensor, noise: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures how well margin and distance predict which images, read rightly, change their class under noise.

    The distance is that to the nearest border, margin over slope (Moosavi-Dezfooli et al. 2016). `linear`: by noise,
    the median relative error of the change of logits that the derivative predicts.
    """
    with Clock(x.device) as clock:
        logits, slopes = jacobian(net, x)
    ahead = logits.gather(1, y[:, None]) - logits
    slope = (slopes.gather(1, y[:, None, None].expand(-1, 1, slopes.shape[2])) - slopes).norm(dim=2)
    others = torch.ones_like(ahead, dtype=torch.bool).scatter_(1, y[:, None], False)
    distance = (ahead / slope.clamp_min(1e-12)).masked_fill(~others, torch.inf).amin(1)
    right, linear = logits.argmax(1) == y, []
    for level in settings["levels"]:
        with torch.no_grad():
            change = net(x + level * noise) - logits
        predicted = torch.einsum("blp,bp->bl", slopes, level * noise.flatten(1))
        linear.append([level, ((change - predicted).norm(dim=1) / change.norm(dim=1)).median().item()])
    with torch.no_grad():
        flipped = net(x + settings["noise"] * noise).argmax(1) != y
    found = {"slope": torch.linalg.matrix_norm(slopes, 2).median().item(), "linear_by_noise": linear}
    found |= {"linear": linear[0][1], "jacobian_seconds": clock.spent / len(x)}
    found["margin_foretells"] = auc(-margins(logits)[right], flipped[right])
    return found | {"distance_foretells": auc(-distance[right], flipped[right])}


def push(net: images.Net, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, J v, J'J v) with J = dz/dx: forward by differentiating the pull twice, which needs second derivatives."""
    x = x.clone().requires_grad_()
    z = net.features(x)
    probe = torch.zeros_like(z, requires_grad=True)
    (pulled,) = torch.autograd.grad(z, x, probe, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, probe, v, retain_graph=True)
    (back,) = torch.autograd.grad(z, x, pushed.detach())
    return z.detach(), pushed.detach(), back


def sensitivity(net: images.Net, x: Tensor) -> dict[str, Any]:
    """`stretch`: the largest singular value of dz/dx, by power iteration, times ||x|| / ||z||; the median of images."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    for _ in range(POWER):
        v = v / per_sample(v)
        z, pushed, v = push(net, x, v)
    return {"stretch": (per_sample(pushed) * per_sample(x) / per_sample(z)).median().item()}


def per_sample(t: Tensor) -> Tensor:
    """Norms, to divide t by."""
    return torch.linalg.vector_norm(t, dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)


def exactness(net: images.Net, x: Tensor, v: Tensor) -> dict[str, Any]:
    """Returns median relative errors of J v.

    `exact`: in float64 against central differences; `as_trained`: in float32 at the tolerance of training against that
    in float64.
    """
    fine = tightened(net)
    x64, v64 = x.double(), v.double()
    pushed = push(fine, x64, v64)[1]
    with torch.no_grad():
        differences = (fine.features(x64 + STEP * v64) - fine.features(x64 - STEP * v64)) / (2 * STEP)
    coarse = push(net, x, v)[1].double()
    error = {"exact": (pushed, differences), "as_trained": (coarse, pushed)}
    return {key: (per_sample(a - b) / per_sample(b)).median().item() for key, (a, b) in error.items()}


def tightened(net: nn.Module) -> nn.Module:
    """A copy in float64 that solves to TIGHT, forward and backward."""
    fine = copy.deepcopy(net).double()
    for layer in fine.modules():
        if isinstance(layer, tdeq.DEQ) and not isinstance(layer.adjoint, tdeq.Unrolled):
            layer.tol, layer.max_steps, layer.adjoint = TIGHT, 500, tdeq.Implicit()
    return fine


def pictures(runs: list[Run]) -> dict[str, Draw]:
    """Returns what to draw, by name."""
    cases = [case for case in STUDY.cases if plots.of(runs, case=case)]
    scores = [("effort_tells", "steps or last change"), ("margin_tells", "margin")]

    def told(figure: Any) -> None:
        for row, case in zip(figure.subplots(len(cases), 2, squeeze=False, sharey=True), cases, strict=True):
            for ax, (key, label) in zip(row, scores, strict=True):
                plots.bars(ax, plots.of(runs, case=case), key)
                ax.axhline(0.5, color="0.4", linestyle="--", linewidth=1)
                ax.set(ylabel="errors told, AUC", ylim=(0.3, 1))
                ax.set_title(f"{case}: by {label}", fontsize=9)

    noise = "noise, standard deviation"
    slopes = [("linear_by_noise", noise, "error of the derivative"), ("error_by_steps", "steps (fifths)", "misread, %")]

    def derivative(figure: Any) -> None:
        for ax in plots.panels(figure, cases, slopes, runs)[::2]:
            ax.set(xscale="log", yscale="log")

    return {"hard": told, "derivative": derivative}


def says(runs: list[Run]) -> Iterator[str]:
    """Yields what the numbers show, in sentences."""
    for case in STUDY.cases:
        for name in (who.DEQ, who.HYBRID):
            both = [
                [r[key] for r in plots.of(runs, case=case, contestant=name) if r.get(key) is not None]
                for key in ("effort_tells", "margin_tells")
            ]
            if all(both):
                told = compare(*both, "more")
                yield (
                    f"{case}, {name}: its errors under noise are told by its steps with an area under the curve of "
                    f"{told.ours:.2f}, by its own margin with {told.theirs:.2f}{told.word and ': a ' + told.word}."
                )
            own = [run for run in plots.of(runs, case=case, contestant=name) if run.get("error_by_steps")]
            if own:
                ends = [mean(run["error_by_steps"][i][j] for run in own) for i in (0, -1) for j in (0, 1)]
                yield (
                    f"{case}, {name}, under noise: of the fifth with the fewest steps (mean {ends[0]:.1f}) "
                    f"{ends[1]:.1f} % are misread, of the fifth with the most ({ends[2]:.1f}) {ends[3]:.1f} %."
                )


OWN = {"noise": 0.3, "levels": [0.003, 0.01, 0.03, 0.1, 0.3], "few": 64}
STUDY = Study(
    name="explain",
    title="What an equilibrium explains",
    question=(
        "do the steps of a solve say which images are hard, better than what any net has, the margin between its two "
        "best classes? And are derivatives of z* by the implicit function theorem as exact as those of a stack, and as "
        "good at foretelling what noise does? Effort is steps for an equilibrium, and for explicit nets the relative "
        "change that the last block makes. The nets are those of `images`."
    ),
    data=f"as in `images`; noise of standard deviation {OWN['noise']:g} for what is called noisy.",
    settings={
        "tiny": images.STUDY.settings["tiny"] | OWN | {"few": 4, "levels": [0.01, 0.1]},
        "quick": images.STUDY.settings["quick"] | OWN,
        "full": images.STUDY.settings["full"] | OWN | {"few": 256},
    },
    contestants=tuple(name for name in who.ALL if name != who.WIDE),
    measures=(
        Measure("accuracy", "test accuracy, %", "more", tested="tested"),
        Measure("misread", "errors under noise, %", "less", tested="tested"),
        Measure("effort_tells", "errors told by effort, AUC", "more", digits=3, main=True),
        Measure("residual_tells", f"errors told by the residual after {EARLY} steps, AUC", digits=3),
        Measure("margin_tells", "errors told by margin, AUC", "more", digits=3),
        Measure("effort_margin", "rank correlation of effort and margin", digits=2),
        Measure("effort_tells_noise", "noise told by effort, AUC", "more", digits=3),
        Measure("margin_foretells", "flips foretold by margin, AUC", "more", digits=3),
        Measure("distance_foretells", "flips foretold by distance, AUC", "more", digits=3, main=True),
        Measure("linear", "error of the derivative's prediction", "less", digits=3, main=True),
        Measure("slope", "slope of logits", "less", digits=2),
        Measure("stretch", "condition of z", "less", digits=2),
        Measure("exact", "J v against differences, 1e-9", digits=2, scale=1e9),
        Measure("as_trained", "J v as trained, error in %", digits=3, scale=100),
        Measure("jacobian_seconds", "time of a Jacobian, ms an image", "less", digits=2, scale=1e3),
        *(measure for measure in COSTS if measure.key != "sample_seconds"),
    ),
    run=run,
    pictures=pictures,
    says=says,
    cases=images.STUDY.cases,
)
