"""Pictures of solves, by matplotlib, which is imported when one is drawn."""

from typing import Any

import numpy as np
from torch import Tensor

from .solution import Solution

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by the colour-blind too


def residuals(solves: Solution | Tensor | dict[str, Solution | Tensor], *, tol: float | None = None, ax: Any = None):
    """Relative residual against step: median over samples, and the band that holds the middle 80 % of them.

    Args:
        solves: Solutions of solves with `trace=True`, or their traces, [steps, *batch]; by label if there are several.
        tol: Draws a line there.
        ax: Matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: a Solution has no trace.
        ModuleNotFoundError: matplotlib is missing.
    """
    solves = solves if isinstance(solves, dict) else {"": solves}
    traces = {label: _trace(solve) for label, solve in solves.items()}
    ax = _axes(ax)
    for (label, trace), colour in zip(traces.items(), _cycle(len(traces)), strict=True):
        steps = np.arange(1, len(trace) + 1)
        low, middle, high = np.nanquantile(trace, [0.1, 0.5, 0.9], axis=1)
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(steps, middle, color=colour, label=label)
    if tol is not None:
        ax.axhline(tol, color="0.4", linestyle="--", linewidth=1)
        ax.text(1, tol, "tolerance ", color="0.4", ha="right", va="bottom", transform=ax.get_yaxis_transform())
    ax.set(yscale="log", xlabel="step (evaluations of the cell)", ylabel="relative residual  ‖f(z) − z‖ / ‖f(z)‖")
    if any(traces):
        ax.legend(frameon=False)
    return ax


def steps(solves: Solution | Tensor | dict[str, Solution | Tensor], *, ax: Any = None):
    """Histogram of steps per sample.

    Args:
        solves: Solutions, or their steps, of any shape; by label if there are several.
        ax: Matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    solves = solves if isinstance(solves, dict) else {"": solves}
    counts = {
        k: (v.steps if isinstance(v, Solution) else v).detach().flatten().cpu().numpy() for k, v in solves.items()
    }
    ax = _axes(ax)
    values = np.concatenate(list(counts.values()))
    bins = np.arange(values.min(), values.max() + 2) - 0.5
    for (label, count), colour in zip(counts.items(), _cycle(len(counts)), strict=True):
        ax.hist(count, bins, color=colour, alpha=0.7, label=label, rwidth=0.9)
    ax.set(xlabel="steps (evaluations of the cell)", ylabel="samples")
    if any(counts):
        ax.legend(frameon=False)
    return ax


def tidy(ax: Any) -> Any:
    """No frame on the right and on top, and a light grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    return ax


def _axes(ax: Any) -> Any:
    if ax is None:
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            message = 'tritondeq.plot draws with matplotlib: pip install "tritondeq[demo]"'
            raise ModuleNotFoundError(message, name=error.name) from error
        ax = pyplot.subplots(layout="constrained")[1]
    return tidy(ax)


def _trace(solve: Solution | Tensor) -> np.ndarray:
    """[steps, samples]."""
    trace = solve.trace if isinstance(solve, Solution) else solve
    if trace is None:
        raise ValueError("solves must have a trace: solve with trace=True")
    return trace.detach().reshape(len(trace), -1).float().cpu().numpy()


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
