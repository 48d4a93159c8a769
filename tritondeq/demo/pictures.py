"""The demonstrations' pictures, as PNG."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..inspect import plot

if TYPE_CHECKING:
    from .digits import Data
    from .training import Run

SHOWN = 8  # images at each end


def save(draw: Callable[[Figure], None], path: Path, height: float = 4.0) -> Path:
    """Saves a picture that `draw` draws, and returns its path."""
    figure = Figure(figsize=(6.8, height), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=150)
    return path


def digits(shown: dict[str, Any], data: "Data", tol: float, out: Path) -> list[Path]:
    """Draws residual against step, and steps per image with the images at both ends, of the DEQ of one run."""

    def residuals(figure: Figure) -> None:
        ax = plot.residuals(shown["solves"], tol=tol, ax=figure.subplots())
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


def parity(runs: "list[Run]", trained: int, out: Path) -> Path:
    """Draws exact match against length: each seed thin, their mean thick."""

    def exact(figure: Figure) -> None:
        ax = plot.tidy(figure.subplots())
        for i, model in enumerate(dict.fromkeys(run.model for run in runs)):
            curves = [list(run.shown.values()) for run in runs if run.model == model]
            ax.plot(lengths, np.transpose(curves), color=plot.COLOURS[i], alpha=0.4, linewidth=1)
            # Each model's smaller than the last one's, so that all are seen where they meet.
            size: Any = {"linewidth": 3.6 - 1.1 * i, "markersize": 9 - 2.2 * i}
            ax.plot(lengths, np.mean(curves, axis=0), color=plot.COLOURS[i], label=model, marker="o", **size)
        ax.axvline(trained, color="0.4", linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, lengths)
        ax.set(xlabel="length, bits (dashed: the length trained on)", ylim=(-4, 104))
        ax.set(ylabel="strings with every bit right, % (up is better)")
        ax.set_title(f"Prefix parity, trained on {trained} bits: exact match (thin: single seeds)", fontsize=11)
        ax.legend(frameon=False)

    lengths = list(runs[0].shown)
    return save(exact, out / "parity_exact_match.png")
