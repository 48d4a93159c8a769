"""The demonstrations' pictures, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from .. import plot
from .results import Outcome, Run

SHOWN = 8  # images at each end


def save(draw: Callable[[Figure], None], path: Path, height: float = 4.0) -> Path:
    """The path of a PNG that `draw` drew, which is there whole or not at all."""
    figure = Figure(figsize=(6.8, height), layout="constrained")
    draw(figure)
    part = path.with_suffix(".part")
    try:
        figure.savefig(part, format="png", dpi=150)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def digits(runs: list[Run], allowed: Sequence[int], tol: float, out: Path) -> list[Path]:
    """Residual against step and steps per image, of the first seed; accuracy against steps allowed, mean over seeds."""
    first = next(run for run in runs if run.solves)
    return [
        save(lambda figure: _residuals(figure, first, tol), out / "digits_residual.png"),
        save(lambda figure: _steps(figure, first), out / "digits_steps.png", height=5.6),
        save(lambda figure: _allowed(figure, runs, allowed), out / "digits_accuracy.png"),
    ]


def _residuals(figure: Figure, run: Run, tol: float) -> None:
    ax = plot.residuals(run.solves, tol=tol, ax=figure.subplots())
    ax.set_title("Digits: the DEQ's residual on test images (median, middle 80 %)", fontsize=11)


def _steps(figure: Figure, run: Run) -> None:
    top, bottom = figure.subfigures(2, height_ratios=[1, 1.05])
    ax = plot.steps(run.counts, ax=top.subplots())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(ylabel="test images")
    ax.set_title("Digits: how many steps each test image takes", fontsize=11)
    order = run.counts.argsort(stable=True).tolist()
    ends = {"easiest": order[:SHOWN], "hardest": order[: -SHOWN - 1 : -1]}
    for row, (name, indices) in zip(bottom.subplots(2, SHOWN), ends.items(), strict=True):
        row[0].set_ylabel(name, fontsize=10)
        for ax, i in zip(row, indices, strict=True):
            _image(ax, run, i)


def _image(ax: Any, run: Run, i: int) -> None:
    """A test image, its steps, and what the net took it for if that is wrong."""
    label, guess = run.data.test_y[i].item(), run.guesses[i].item()
    ax.imshow(run.data.test_x[i, 0].cpu().numpy(), cmap="gray_r")
    wrong = "" if guess == label else f", read as {guess}"
    ax.set_title(f"{int(run.counts[i])} steps", fontsize=9, pad=3)
    ax.set_xlabel(f"{label}{wrong}", fontsize=9, color=plot.COLOURS[1] if wrong else "black", labelpad=2)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("0.8")


def _allowed(figure: Figure, runs: list[Run], allowed: Sequence[int]) -> None:
    ax = plot.tidy(figure.subplots())
    for model, colour in zip(_models(runs), plot.COLOURS, strict=False):
        own = [run for run in runs if run.model == model]
        if own[0].by_allowed:
            curve = np.mean([run.by_allowed for run in own], axis=0)
            ax.plot(allowed, curve, color=colour, label=model, marker="o", markersize=3)
        else:
            ax.axhline(np.mean([run.accuracy for run in own]), color=colour, linestyle="--", label=model)
    ax.set(xlabel="steps allowed at test time (evaluations of the block)", ylabel="test accuracy, %")
    ax.set_title("Digits: accuracy against steps allowed at test time", fontsize=11)
    ax.legend(frameon=False)


def parity(outcomes: list[Outcome], trained: int, out: Path) -> list[Path]:
    """Exact match against length, steps against length: each seed thin, their mean thick."""
    return [
        save(lambda figure: _exact(figure, outcomes, trained), out / "parity_exact_match.png"),
        save(lambda figure: _lengths(figure, outcomes, trained), out / "parity_steps.png"),
    ]


def _exact(figure: Figure, outcomes: list[Outcome], trained: int) -> None:
    ax = _by_length(figure, outcomes, trained, "exact")
    ax.set(ylabel="strings with every bit right, %", ylim=(-4, 104))
    ax.set_title(f"Prefix parity, trained on {trained} bits: exact match (thin: single seeds)", fontsize=11)


def _lengths(figure: Figure, outcomes: list[Outcome], trained: int) -> None:
    ax = _by_length(figure, outcomes, trained, "steps")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.set(ylabel="steps per string (evaluations of a block)")
    ax.set_title("Prefix parity: steps against length (thin: single seeds)", fontsize=11)


def _by_length(figure: Figure, outcomes: list[Outcome], trained: int, what: str) -> Any:
    ax = plot.tidy(figure.subplots())
    for i, model in enumerate(_models(outcomes)):
        own = [outcome for outcome in outcomes if outcome.model == model]
        lengths = list(own[0].scores)
        curves = [[getattr(outcome.scores[n], what) for n in lengths] for outcome in own]
        ax.plot(lengths, np.transpose(curves), color=plot.COLOURS[i], alpha=0.4, linewidth=1)
        # Each model's smaller than the last one's, so that all are seen where they meet.
        size = {"linewidth": 3.6 - 1.1 * i, "markersize": 9 - 2.2 * i}
        ax.plot(lengths, np.mean(curves, axis=0), color=plot.COLOURS[i], label=model, marker="o", **size)
    ax.axvline(trained, color="0.4", linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, lengths)
    ax.set(xlabel="length, bits (dashed: the length trained on)")
    ax.legend(frameon=False)
    return ax


def _models(results: list[Any]) -> list[str]:
    """Their models, in order."""
    return list(dict.fromkeys(result.model for result in results))
