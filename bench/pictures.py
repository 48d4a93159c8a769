"""Pictures of a results file: speed-up by shape, share of the limit, price of a step, memory and time against steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import measure
from .common import Results

# Of Okabe and Ito, told apart by the colour-blind; a contestant has its own in every picture.
COLOURS = {
    "tritondeq": "#000000",
    "tritondeq Anderson": "#0072B2",
    "tritondeq, compiled cell": "#0072B2",
    "tritondeq Unrolled": "#CC79A7",
    "eager loop": "#E69F00",
    "eager Anderson": "#E69F00",
    "torchdeq Picard": "#D55E00",
    "torchdeq Anderson": "#D55E00",
    "torchdeq Anderson(6)": "#D55E00",
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


def style(name: str) -> dict[str, Any]:
    """Colour and marker: Anderson's are squares, compiled ones triangles, graphs diamonds."""
    marker = "^" if "compiled" in name else "D" if "graph" in name else "s" if "Anderson" in name else "o"
    hollow = "torchdeq" in name or "eager" in name
    colour = COLOURS.get(name, "#777777")
    line = {"linestyle": ":", "zorder": 3} if "Unrolled" in name else {}  # where the tied loop's is
    return {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour, **line}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the pictures there is data for, named after the machine, and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in results["records"] if not r.get("wrong")]
    timed = [r for r in records if "over_ours" in r and r["goal"] != "depth"]
    rivals = [r for r in timed if r["contestant"] != "tritondeq"]
    forward = [r for r in timed if r.get("of_limit")]
    steps = [r for r in records if r["goal"] == "steps" and r.get("over_cell") and "bare" not in r["contestant"]]
    memory = [r for r in records if r["goal"] == "G10"]
    nets = list(dict.fromkeys(r.get("net", "Affine") for r in memory))
    kept = "saved memory" if any(r.get("kind") == "saved" for r in memory) else "peak memory"
    depth = [r for r in records if r["goal"] == "depth" and "seconds" in r]
    pictures: dict[str, tuple[list, Callable]] = {
        "speedup": (rivals, lambda: _dots(pyplot, rivals, "over_ours", "time over tritondeq's")),
        "limit": (forward, lambda: _dots(pyplot, forward, "of_limit", "share of the measured limit")),
        "step": (steps, lambda: _dots(pyplot, steps, "over_cell", "time per evaluation over the bare cell's")),
        "memory": (memory, lambda: _lines(pyplot, memory, nets, "bytes", 2**20, f"{kept} of a training step, MiB")),
        "depth": (depth, lambda: _lines(pyplot, depth, [None], "seconds", 1e-3, "time of a solve, ms")),
    }
    machine, paths = results["machine"], []
    for name, (chosen, make) in pictures.items():
        if not chosen:
            continue
        figure = make()
        figure.suptitle(f"{machine['device']}, {machine['backend']} backend", fontsize=9)
        path = folder / f"{measure.name_of(machine)}-{name}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _dots(pyplot, records: list[dict], key: str, label: str):
    """A line of dots a case, the cases from top to bottom as they were measured."""
    cases = list(dict.fromkeys(r["case"] for r in records))
    names = list(dict.fromkeys(r["contestant"] for r in records))
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.27 * len(cases)), layout="constrained")
    for name in names:
        of = [(r[key], cases.index(r["case"])) for r in records if r["contestant"] == name]
        axes.plot(*zip(*of, strict=True), markersize=6, label=name, **style(name) | {"linestyle": "none"})
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set(xscale="log", xlabel=f"{label} (log)", ylim=(len(cases) - 0.5, -0.5))
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    _decimal(axes.xaxis)
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _lines(pyplot, records: list[dict], nets: list[str | None], key: str, unit: float, label: str):
    """A line a contestant against the number of steps, a panel a net."""
    figure, panels = pyplot.subplots(
        1, len(nets), figsize=(2.2 + 3.6 * len(nets), 3.6), layout="constrained", squeeze=False
    )
    named: dict[str, Any] = {}
    for axes, net in zip(panels[0], nets, strict=True):
        here = [r for r in records if net is None or r.get("net", "Affine") == net]
        for name in dict.fromkeys(r["contestant"] for r in here):
            of = sorted((r["steps"], r[key] / unit) for r in here if r["contestant"] == name)
            (named[name],) = axes.plot(*zip(*of, strict=True), markersize=5, linewidth=1.3, **style(name))
        counts = sorted({r["steps"] for r in here})
        shape = here[0]["case"].split(" ", 1)[1].rsplit(f" {here[0]['steps']} steps", 1)[0]
        axes.set(xscale="log", yscale="log", xlabel="steps, or blocks of an explicit net", ylabel=f"{label} (log)")
        axes.set_title(shape if net in (None, shape.split()[0]) else f"{net} {shape}", fontsize=9)
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        _decimal(axes.yaxis)
    figure.legend(named.values(), named, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _decimal(axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, where there are few of them, else at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
