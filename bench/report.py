"""Tables and pictures from a results file.

`python -m tritondeq.bench.report FILE` prints all its tables; with `--readme README.md` it writes the short one between
the marks there.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Results = dict[str, Any]
MARKS = "<!-- bench: written by tritondeq.bench.report, not by hand -->\n", "<!-- /bench -->"
KEYS = ("schema", "suite", "complete", "machine", "roofs", "tests", "left_out", "records")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load(path: Path) -> Results:
    """A results file.

    Raises:
        ValueError: it is none.
    """
    try:
        results = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [key for key in KEYS if key not in results] if isinstance(results, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} is not a results file of tritondeq.bench: it lacks {', '.join(missing)}")
    return results


def faults(results: Results) -> list[str]:
    """What failed: results that are not equal, and tests. A case with a fault was not timed."""
    found = [f"{r['case']}: {r['wrong']}" for r in results["records"] if r.get("wrong")]
    tests = results["tests"]
    return found + ([f"tests: {tests['says']}"] if tests and tests["passed"] is False else [])


def table(results: Results) -> str:
    """The whole report in markdown."""
    lines = [_source(results)]
    roofs = {"copy": "copy {:.1f} GB/s", "fp32": "fp32 matmul {:.2f} TFLOP/s", "bf16": "bf16 matmul {:.2f} TFLOP/s"}
    scale = {"copy": 1e9, "fp32": 1e12, "bf16": 1e12}
    found = [text.format(results["roofs"][k] / scale[k]) for k, text in roofs.items() if k in results["roofs"]]
    lines += [f"Measured limits: {', '.join(found)}."] if found else []
    for title, rows in _tables(results):
        if len(rows) > 1:
            lines += ["", f"**{title}**", "", *_markdown(rows)]
    return "\n".join(lines)


def _source(results: Results) -> str:
    """Where these figures come from."""
    machine = results["machine"]
    text = (
        f"Measured on {machine['device']} ({machine['threads']} CPU threads, load {machine['load']} at the start), "
        f"torch {machine['torch']}, triton {machine['triton']}, torchdeq {machine['torchdeq']}, "
        f"commit {machine['commit']}, {machine['backend']} backend, suite {results['suite']}"
    )
    text += "." if results["complete"] else ", not complete."
    return text + (
        " The torch backend on a CPU: says nothing of the Triton kernels." if machine["kind"] == "cpu" else ""
    )


def summary(results: Results) -> str:
    """The price of a step, for a README."""
    titles = {title.split(":")[0]: rows for title, rows in _tables(results)}
    return "\n".join([_source(results), "", *_markdown(titles["Price of a step"]), ""])


def into(text: str, results: Results) -> str:
    """`text` with what stands between its marks made new.

    Raises:
        ValueError: it has no marks.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"no place for the table: it belongs between {begin.strip()} and {end}")
    return text[: text.index(begin) + len(begin)] + summary(results) + text[text.index(end) :]


def _tables(results: Results) -> Iterable[tuple[str, list[list[str]]]]:
    records = [r for r in results["records"] if not r.get("wrong")]
    for train, title in ((False, "Whole solve"), (True, "Training step")):
        solves = [r for r in records if r["case"][0] == "G" and "seconds" in r and r.get("train") is train]
        names = list(dict.fromkeys(r["contestant"] for r in solves if r["contestant"] != "tritondeq"))
        rows = [["case", "steps", "tritondeq", *([] if train else ["of the limit"]), *names]]
        for case, group in _by(solves, "case").items():
            ours = group["tritondeq"]
            row = [case, str(ours["steps"]), _time(ours["seconds"])]
            row += [] if train else [f"{100 * ours['of_limit']:.1f}%" if ours.get("of_limit") else ""]
            rows.append(row + [f"{group[n]['over_ours']:.2f}x" if n in group else "" for n in names])
        yield f"{title}: time of tritondeq, and how many times as long the others take", rows
    rows = [["cell", "solver", "time per evaluation", "over the bare cell's", "target", "ops per step", "at most"]]
    for r in records:
        if r["goal"] == "steps":
            target = "" if r["target"] is None else f"{r['target']:g}"
            ops = ["" if r["ops"] is None else f"{r['ops']:g}", "" if r["most_ops"] is None else str(r["most_ops"])]
            over = f"{r['over_cell']:.2f}"
            rows.append([f"{r['rows']}x{r['width']}", r["contestant"], _time(r["seconds"]), over, target, *ops])
    yield "Price of a step", rows
    yield (
        "Evaluations until the worst row is at 1e-4",
        _pivot(records, "evaluations", lambda r: str(r["steps"] or "none")),
    )
    kind = "peak" if results["machine"]["kind"] == "cuda" else "saved for backward"
    yield f"Memory of a training step, {kind}", _pivot(records, "G10", lambda r: f"{r['bytes'] / 2**20:.2f} MiB")


def _pivot(records: list[dict], goal: str, show) -> list[list[str]]:
    chosen = [r for r in records if r["goal"] == goal]
    names = list(dict.fromkeys(r["contestant"] for r in chosen))
    rows = [["case", *names]]
    for case, group in _by(chosen, "case").items():
        rows.append([case, *(show(group[n]) if n in group else "" for n in names)])
    return rows


def _by(records: list[dict], key: str) -> dict[str, dict[str, dict]]:
    groups: dict[str, dict[str, dict]] = {}
    for r in records:
        groups.setdefault(r[key], {})[r["contestant"]] = r
    return groups


def _markdown(rows: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the pictures there is data for, and returns their paths: speed-up by shape, per cent of the limit, time
    per step over the bare cell's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in results["records"] if not r.get("wrong")]
    timed = [r for r in records if "over_ours" in r]
    pictures = {
        "speedup": ("time over tritondeq's (log)", "over_ours", [r for r in timed if r["contestant"] != "tritondeq"]),
        "limit": ("share of the measured limit", "of_limit", [r for r in timed if r.get("of_limit")]),
        "step": (
            "time per evaluation over the bare cell's (log)",
            "over_cell",
            [r for r in records if r["goal"] == "steps"],
        ),
    }
    paths = []
    for name, (label, key, chosen) in pictures.items():
        if not chosen:
            continue
        groups = _by(chosen, "case")
        names = list(dict.fromkeys(r["contestant"] for r in chosen))
        figure, axes = pyplot.subplots(figsize=(2 + 0.28 * len(groups) * len(names) ** 0.8 + 2, 4.2))
        for i, contestant in enumerate(names):
            at = [
                (j + (i - len(names) / 2) * 0.8 / len(names), g[contestant][key])
                for j, g in enumerate(groups.values())
                if contestant in g
            ]
            axes.bar([x for x, _ in at], [y for _, y in at], 0.8 / len(names), label=contestant)
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), list(groups), rotation=40, ha="right", fontsize=7)
        axes.set_ylabel(label)
        axes.set_title(f"{results['machine']['device']}, {results['machine']['backend']} backend", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of a results file, or writes the short one into a README."""
    parser = argparse.ArgumentParser(prog="python -m tritondeq.bench.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a JSON file of python -m tritondeq.bench")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="write the short table between the marks of PATH")
    arguments = parser.parse_args(argv)
    try:
        results = load(arguments.file)
        if arguments.readme is None:
            print(table(results))
        else:
            arguments.readme.write_text(into(arguments.readme.read_text(), results))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
