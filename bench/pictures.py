"""Pictures of a results file: speed-up by shape, share of the limit, price of a step, memory and time against steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import name_of
from .measure import Record

# Of Okabe and Ito, distinct to the colour-blind; a contestant has the same one in every picture.
COLOURS = {
    "tritondeq": "#000000",
    "tritondeq Anderson": "#0072B2",
    "tritondeq, compiled cell": "#0072B2",
    "tritondeq Unrolled": "#CC79A7",
    "eager loop": "#E69F00",
    "eager Anderson": "#E69F00",
    "torchdeq Picard": "#D55E00",
    "torchdeq Anderson": "#D55E00",
    "tied loop": "#009E73",
    "untied stack": "#56B4E9",
    "compiled cell in a loop": "#CC79A7",
    "compiled tied loop": "#009E73",
    "compiled untied stack": "#56B4E9",
    "bare cell": "#999999",
    "bare cell, graph": "#999999",
    "Picard": "#000000",
    "Picard, graph": "#000000",
    "Anderson(5)": "#0072B2",
    "Anderson(5), graph": "#0072B2",
    "lockstep": "#CC79A7",
}


BETTER = {"less": "\N{LEFTWARDS ARROW} lower is better", "more": "higher is better \N{RIGHTWARDS ARROW}"}


def style(name: str) -> dict[str, Any]:
    """Returns colour and marker: squares are Anderson's, triangles compiled, diamonds graphs, hollow ones rivals."""
    marker = "^" if "compiled" in name else "D" if "graph" in name else "s" if "Anderson" in name else "o"
    hollow = "torchdeq" in name or "eager" in name
    colour = COLOURS.get(name, "#777777")
    line = {"linestyle": ":", "zorder": 3} if "Unrolled" in name else {}  # it lies on the tied loop's
    return {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour, **line}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures there is data for, named after the machine, and returns their paths.

    Records that are wrong or suspect are not drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in results["records"] if not r.get("wrong") and not r.get("suspect")]
    timed = [r for r in records if "over_ours" in r and r["kind"] != "depth"]
    others = [r for r in timed if r["contestant"] != "tritondeq"]
    limits = [r for r in timed if r.get("of_limit")]
    steps = [r for r in records if r["kind"] == "steps" and r.get("over_cell") and "bare" not in r["contestant"]]
    memory = [r for r in records if r["kind"] == "memory"]
    depth = [r for r in records if r["kind"] == "depth" and "seconds" in r]
    slower = "time over that of tritondeq; right of the line, tritondeq is faster"
    pictures: dict[str, tuple[list[Record], Callable]] = {
        "speedup": (others, lambda r: _dots(pyplot, r, "over_ours", slower, "")),
        "limit": (limits, lambda r: _dots(pyplot, r, "of_limit", "share of the measured limit", "more")),
        "step": (steps, lambda r: _dots(pyplot, r, "over_cell", "time per evaluation over the bare cell's", "less")),
        "memory": (memory, lambda r: _lines(pyplot, r, "bytes", 2**20, "peak memory of a training step, MiB")),
        "depth": (depth, lambda r: _lines(pyplot, r, "seconds", 1e-3, "time of a solve, ms")),
    }
    machine, paths = results["machine"], []
    for name, (chosen, make) in pictures.items():
        if chosen:
            figure = make(chosen)
            figure.suptitle(f"{machine['device']}, {machine['backend']} backend", fontsize=9)
            path = folder / f"{name_of(machine)}-{name}.png"
            figure.savefig(path, dpi=130)
            pyplot.close(figure)
            paths.append(path)
    return paths


def _dots(pyplot: Any, records: list[Record], key: str, label: str, better: str) -> Any:
    """A line of dots a case, the cases from top to bottom as they were measured."""
    cases = list(dict.fromkeys(r["case"] for r in records))
    names = list(dict.fromkeys(r["contestant"] for r in records))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.27 * len(cases)), layout="constrained")
    for name in names:
        points = [(r[key], cases.index(r["case"])) for r in records if r["contestant"] == name]
        axes.plot(*zip(*points, strict=True), markersize=6, label=name, **style(name) | {"linestyle": "none"})
    axes.axvline(1, color="0.4", linewidth=1)
    note = f"\n{BETTER[better]}" if better else ""
    axes.set(xscale="log", xlabel=f"{label} (log){note}", ylim=(len(cases) - 0.5, -0.5))
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    _decimal(axes.xaxis)
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _lines(pyplot: Any, records: list[Record], key: str, unit: float, label: str) -> Any:
    """A line a contestant against the number of steps, a panel a net."""
    nets = list(dict.fromkeys(_net(r) for r in records))
    size = (2.2 + 3.6 * len(nets), 3.6)
    figure, panels = pyplot.subplots(1, len(nets), figsize=size, layout="constrained", squeeze=False)
    lines: dict[str, Any] = {}
    for axes, net in zip(panels[0], nets, strict=True):
        here = [r for r in records if _net(r) == net]
        for name in dict.fromkeys(r["contestant"] for r in here):
            points = sorted((r["steps"], r[key] / unit) for r in here if r["contestant"] == name)
            (lines[name],) = axes.plot(*zip(*points, strict=True), markersize=5, linewidth=1.3, **style(name))
        axes.set(xscale="log", yscale="log", xlabel="steps, or blocks of an explicit net")
        axes.set_ylabel(f"{label} (log)\n{BETTER['less']}", fontsize=9)
        axes.set_title(net, fontsize=9)
        counts = sorted({r["steps"] for r in here})
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        _decimal(axes.yaxis)
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _net(record: Record) -> str:
    """What is solved, without the number of steps."""
    return record["case"].removesuffix(f" {record['steps']} steps")


def _decimal(axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, where there are few of them, else at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
