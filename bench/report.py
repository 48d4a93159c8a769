"""Tables from results files.

`python -m tritondeq.bench.report FILE` prints all that it holds; `--readme README.md` writes the short tables of all
files given between the marks there.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import measure, predict, targets
from .common import Results, markdown_table

MARKS = "<!-- bench: written by tritondeq.bench.report, not by hand -->\n", "<!-- /bench -->"
KEYS = ("schema", "suite", "complete", "machine", "roofs", "tests", "left_out", "records")


def load(path: Path) -> Results:
    """A results file, and in `targets` what follows from its records for each target of its machine.

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
    return results | {"targets": targets.plain(results)}


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
            lines += ["", f"**{title}**", "", *markdown_table(rows)]
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
    """The price of a step on a CPU, the targets and the pictures on a GPU, for a README."""
    tables = {title.split(":")[0]: rows for title, rows in _tables(results)}
    cuda = results["machine"]["kind"] == "cuda"
    lines = [_source(results), "", *markdown_table(tables["Targets" if cuda else "Price of a step"])]
    if cuda:
        shown = {"speedup": "Time of others over tritondeq's, by shape", "memory": "Peak memory of training, by steps"}
        stem = measure.name_of(results["machine"])
        lines += ["", *(f"![{what}](bench/results/{stem}-{name}.png)" for name, what in shown.items())]
    return "\n".join([*lines, ""])


def into(text: str, files: list[Path]) -> str:
    """`text` with what stands between its marks made new from these files, in this order.

    Raises:
        ValueError: it has no marks, or a file is no results file.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"no place for the table: it belongs between {begin.strip()} and {end}")
    made = "\n".join(summary(load(file)) for file in files)
    return text[: text.index(begin) + len(begin)] + made + text[text.index(end) :]


def _targets(results: Results) -> list[list[str]]:
    predicted = predict.table() if results["machine"]["kind"] == "cuda" else {}
    rows = [["target", "what", "bound", "worst case", "measured", "verdict"]]
    rows[0] += ["predicted", "predicted / measured"] if predicted else []
    for one in targets.verdicts(results):
        target, guess = one.target, predicted.get(one.target.key)
        sign = "at most" if target.most else "at least"
        row = [target.key, target.what, f"{sign} {target.show(target.bound)}", one.case or ""]
        row += [target.show(one.value) if one.value is not None else "", str(one)]
        if guess:
            row += [target.show(guess.value), f"{guess.value / one.value:.2f}" if one.value else ""]
        rows.append(row)
    return rows


def _tables(results: Results) -> Iterable[tuple[str, list[list[str]]]]:
    """(title, rows) of all there are, with a row of names first."""
    records = [r for r in results["records"] if not r.get("wrong")]
    timed = [r for r in records if "seconds" in r]
    cuda = results["machine"]["kind"] == "cuda"
    for train, title in ((False, "Whole solve"), (True, "Training step")):
        solves = [r for r in records if "over_ours" in r and r.get("train") is train and r["goal"] != "depth"]
        names = list(dict.fromkeys(r["contestant"] for r in solves if r["contestant"] != "tritondeq"))
        beside = ["predicted / measured"] if cuda else []
        rows = [["case", "steps", "tritondeq", *([] if train else ["of the limit"]), *beside, *names]]
        for case, group in _by(solves, "case").items():
            ours = group["tritondeq"]
            row = [case, str(ours["steps"]), _time(ours["seconds"])]
            row += [] if train else [f"{100 * ours['of_limit']:.1f}%" if ours.get("of_limit") else ""]
            row += [_held(ours)] if cuda else []
            rows.append(row + [f"{group[n]['over_ours']:.2f}x" if n in group else "" for n in names])
        yield f"{title}: time of tritondeq, and how many times as long the others take", rows
    yield "Time of a solve against its steps", _pivot(timed, "depth", lambda r: _time(r["seconds"]))
    rows = [["cell", "solver", "time per evaluation", "over the bare cell's", "target", "ops per step", "at most"]]
    for r in timed:
        if r["goal"] == "steps":
            name = r["contestant"]
            bound = targets.of_step(results["machine"]["kind"], r["rows"], r["width"], name)
            ops = ["", ""] if r.get("ops") is None else [f"{r['ops']:g}", str(targets.OPS[name])]
            over = f"{r['over_cell']:.2f}" if r.get("over_cell") else ""
            cell = r["case"].removeprefix("step ")
            rows.append([cell, name, _time(r["seconds"]), over, f"{bound:g}" if bound else "", *ops])
    yield "Price of a step", rows
    rows = [["solver", "launches beside the cell", "copies", "host syncs", "looks at a flag copied before"]]
    for r in records:
        if r["goal"] == "G12":
            rows.append([r["contestant"], *(f"{r[k]:.2f}" for k in ("launches", "copies", "syncs", "looks"))])
    yield "What a step asks of the host", rows
    yield (
        "Evaluations until the worst row is at 1e-4",
        _pivot(records, "evaluations", lambda r: str(r["steps"] or "none")),
    )
    kind = "saved for backward" if any(r.get("kind") == "saved" for r in records) else "at its peak"
    yield f"Memory of a training step, {kind}", _pivot(records, "G10", lambda r: f"{r['bytes'] / 2**20:.2f} MiB")
    yield "States kept beside the cell by a forward solve", _pivot(records, "states", lambda r: f"{r['states']:.1f}")
    yield "Targets", _targets(results)


def _held(ours: dict) -> str:
    """What predict.py says of a whole solve over what was measured: on the device, where that was measured."""
    guess, measured = predict.record(ours), ours.get("device_seconds") or ours["seconds"]
    return f"{guess / measured:.2f}" if guess else ""


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


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of results files, or writes the short ones into a README."""
    parser = argparse.ArgumentParser(prog="python -m tritondeq.bench.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a JSON file of python -m tritondeq.bench")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="write the short tables between the marks of PATH")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw the pictures of the file, the last of several")
    arguments = parser.parse_args(argv)
    try:
        if arguments.readme is not None:
            arguments.readme.write_text(into(arguments.readme.read_text(), arguments.files))
        else:
            print("\n\n".join(table(load(file)) for file in arguments.files))
        if arguments.draw is not None:
            from . import pictures

            arguments.draw.mkdir(parents=True, exist_ok=True)
            print("\n".join(map(str, pictures.draw(load(arguments.files[-1]), arguments.draw))))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f'{error.name} is missing: pip install "tritondeq[bench]"', file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
