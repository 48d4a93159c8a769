"""What the studies' pictures are drawn with: a contestant has the same colour in all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tritondeq import plot

from . import contestants as who
from .study import Run

COLOURS = dict(zip(who.ALL, plot.COLOURS, strict=True))
MARKS = dict(zip(who.ALL, "osDv^x", strict=True))


def of(runs: Iterable[Run], **equal: Any) -> list[Run]:
    """Those whose keys have these values."""
    return [run for run in runs if all(run[key] == value for key, value in equal.items())]


def names(runs: Iterable[Run]) -> list[str]:
    """Their contestants, in order."""
    return list(dict.fromkeys(run["contestant"] for run in runs))


def style(contestant: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """Colour and mark; those who are not in ALL get what is left, or grey."""
    spare = [colour for colour in plot.COLOURS if colour not in [COLOURS.get(other) for other in others]]
    unknown = [other for other in others if other not in COLOURS]
    colour = COLOURS.get(contestant) or (spare or ["0.3"])[unknown.index(contestant) % max(1, len(spare))]
    return {"color": colour, "marker": MARKS.get(contestant, "P")}


def lines(ax: Any, runs: list[Run], key: str, **options: Any) -> None:
    """A curve per contestant, of pairs [x, y] under `key`: the mean over seeds, and a band from least to most."""
    for name in names(runs):
        curves = np.array([run[key] for run in of(runs, contestant=name)], dtype=float)  # [seeds, points, 2]
        x, y = curves[..., 0].mean(axis=0), curves[..., 1]
        look = style(name, names(runs))
        ax.plot(x, y.mean(axis=0), label=name, markersize=4, linewidth=1.5, **look, **options)
        if len(y) > 1:
            ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=look["color"], alpha=0.13, linewidth=0)
    plot.tidy(ax)


def panels(figure: Any, rows: Sequence[str], columns: Sequence[tuple[str, str, str]], runs: list[Run]) -> list[Any]:
    """A row of axes per case and a column per (key, label of x, label of y), with `lines`; one legend below all."""
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, case in zip(grid, rows, strict=True):
        for ax, (key, x, y) in zip(row, columns, strict=True):
            lines(ax, [run for run in of(runs, case=case) if key in run], key)
            ax.set(xlabel=x, ylabel=y)
            ax.set_title(case, fontsize=10)
    legend(figure, grid[0, 0])
    return list(grid.flat)


def legend(figure: Any, ax: Any) -> None:
    """That of one of the axes, below all of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def bars(ax: Any, runs: list[Run], key: str) -> None:
    """A bar per contestant, the mean over seeds, and a dot for each of these; None is left out."""
    for i, name in enumerate(names(runs)):
        values = [run[key] for run in of(runs, contestant=name) if run.get(key) is not None]
        colour = style(name, names(runs))["color"]
        ax.bar(i, np.mean(values) if values else 0, color=colour, alpha=0.75, width=0.7)
        ax.plot([i] * len(values), values, ".", color="0.25", markersize=4)
    ax.set_xticks(range(len(names(runs))), names(runs), rotation=30, ha="right", fontsize=9)
    plot.tidy(ax)


def learning(figure: Any, cases: Sequence[str], runs: list[Run], label: str) -> None:
    """A learning curve against updates, and one against seconds, a row per case: from the `curve` of `train`."""
    views = {"updates": 0, "seconds of training": 1}
    split = [run | {name: [[p[i], p[2]] for p in run["curve"]] for name, i in views.items()} for run in runs]
    panels(figure, cases, [(name, name, label) for name in views], split)
