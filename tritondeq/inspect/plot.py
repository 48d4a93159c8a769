"""Pictures of solves, by matplotlib, which is imported when one is drawn."""

from typing import Any

import numpy as np
from torch import Tensor

from ..solution import Solution

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the colour-blind can distinguish them


def residuals(
    solves: Solution | Tensor | dict[str, Solution | Tensor], *, tol: float | None = None, ax: Any = None
) -> Any:
    """Plots the relative residual against the step: median over samples, and the band that holds the middle 80 %.

    Args:
        solves: Solutions of solves with `trace=True`, or their traces, [steps, *batch]; by label if there are several.
        tol: Draws a line there.
        ax: Matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: A Solution has no trace.
        ModuleNotFoundError: Matplotlib is missing.
    """
    traces = _arrays(solves, "trace")
    ax = _axes(ax)
    for i, (label, trace) in enumerate(traces.items()):
        count, colour = np.arange(1, len(trace) + 1), COLOURS[i % len(COLOURS)]
        low, middle, high = np.nanquantile(trace.reshape(len(trace), -1), [0.1, 0.5, 0.9], axis=1)
        ax.fill_between(count, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(count, middle, color=colour, label=label)
    if tol is not None:
        ax.axhline(tol, color="0.4", linestyle="--", linewidth=1)
        ax.text(1, tol, "tolerance ", color="0.4", ha="right", va="bottom", transform=ax.get_yaxis_transform())
    label = "relative residual  ‖f(z) − z‖ / ‖f(z)‖  (down is better)"
    ax.set(yscale="log", xlabel="step (evaluations of the cell)", ylabel=label)
    return _legend(ax, traces)


def steps(solves: Solution | Tensor | dict[str, Solution | Tensor], *, ax: Any = None) -> Any:
    """Plots the histogram of steps per sample, of Solutions or of their steps; else as `residuals` does."""
    counts = _arrays(solves, "steps")
    ax = _axes(ax)
    values = np.concatenate([count.ravel() for count in counts.values()])
    bins = np.arange(values.min(), values.max() + 2) - 0.5
    for i, (label, count) in enumerate(counts.items()):
        ax.hist(count.ravel(), bins, color=COLOURS[i % len(COLOURS)], alpha=0.7, label=label, rwidth=0.9)
    ax.set(xlabel="steps (evaluations of the cell)", ylabel="samples")
    return _legend(ax, counts)


def tidy(ax: Any) -> Any:
    """Removes the frame on the right and on top, puts a light grid behind the data, and returns the axes."""
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


def _legend(ax: Any, labels: dict[str, Any]) -> Any:
    if any(labels):
        ax.legend(frameon=False)
    return ax


def _arrays(solves: Any, name: str) -> dict[str, np.ndarray]:
    """Returns this attribute of each Solution, or the tensor that was given, by label."""
    solves = solves if isinstance(solves, dict) else {"": solves}
    tensors = {label: getattr(s, name) if isinstance(s, Solution) else s for label, s in solves.items()}
    if any(tensor is None for tensor in tensors.values()):
        raise ValueError("solves must have a trace: solve with trace=True")
    return {label: tensor.detach().float().cpu().numpy() for label, tensor in tensors.items()}
