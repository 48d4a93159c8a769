"""Tables from results files.

`python -m tritondeq.bench.report FILE` prints all that it holds; `--readme README.md` writes the short tables of all
files given between the marks there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import host, suspect
from .measure import Record

Results = dict[str, Any]
Rows = list[list[str]]
SCHEMA = 2
MARKS = "<!-- bench: written by tritondeq.bench.report, not by hand -->\n", "<!-- /bench -->"
KEYS = ("schema", "suite", "complete", "machine", "roofs", "tests", "left_out", "records")
FOLDER = Path(__file__).parent / "results"  # those that are committed; a wheel has none
SHORT = 10  # rows of a README's table at most
# The solves that a README shows: cell, rows (None: any) and width.
SHOWN = (("affine", 64, 128), ("affine", 256, 256), ("mlp", None, 128), ("gated", None, 128))


def load(path: Path) -> Results:
    """Reads a results file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no results file, or one of another schema.
    """
    try:
        results = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [key for key in KEYS if key not in results] if isinstance(results, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} is not a results file of tritondeq.bench: it lacks {', '.join(missing)}")
    if results["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {results['schema']}, and this version reads {SCHEMA}: measure again")
    suspect.mark(results["records"])
    return results


def committed() -> list[Path]:
    """Returns the committed results files.

    Raises:
        FileNotFoundError: there are none, as in a wheel.
    """
    if not (paths := sorted(FOLDER.glob("*.json"))):
        raise FileNotFoundError("this installation has no committed results: they are in the repository, bench/results")
    return paths


def faults(results: Results) -> list[str]:
    """Returns what failed: results that are not equal, and tests. A case with a fault was not timed."""
    wrong = [f"{r['case']}: {r['wrong']}" for r in results["records"] if r.get("wrong")]
    tests = results["tests"]
    return wrong + ([f"tests: {tests['text']}"] if tests and tests["passed"] is False else [])


def table(results: Results) -> str:
    """Returns the whole report in markdown."""
    lines = [_source(results)]
    roofs = {"copy": "copy {:.1f} GB/s", "fp32": "fp32 matmul {:.2f} TFLOP/s", "bf16": "bf16 matmul {:.2f} TFLOP/s"}
    scale = {"copy": 1e9, "fp32": 1e12, "bf16": 1e12}
    limits = [text.format(results["roofs"][k] / scale[k]) for k, text in roofs.items() if k in results["roofs"]]
    lines += [f"Measured limits: {', '.join(limits)}."] if limits else []
    for title, rows in _tables(results["records"]):
        if len(rows) > 1:
            lines += ["", f"**{title}**", "", markdown(rows)]
    if flagged := suspect.listed(results["records"]):
        lines += ["", "**Suspect: figures that cannot be, marked (?)**", "", *(f"* {line}" for line in flagged)]
    return "\n".join(lines)


def summary(results: Results) -> str:
    """Returns a table of at most SHORT rows for a README, and on a GPU the pictures."""
    rows = [["what", "tritondeq", "torchdeq", "plain loop"], *_short(results["records"])[:SHORT]]
    lines = [_source(results), "", markdown(rows)]
    if results["machine"]["kind"] == "cuda":
        from .machine import name_of

        shown = {"speedup": "Time of others over tritondeq's, by shape", "memory": "Peak memory of training, by steps"}
        stem = name_of(results["machine"])
        lines += ["", *(f"![{what}](bench/results/{stem}-{name}.png)" for name, what in shown.items())]
    return "\n".join([*lines, ""])


def into(text: str, files: list[Path]) -> str:
    """Returns `text` with what stands between its marks made new from these files, in this order.

    Raises:
        ValueError: it has no marks, or a file is no results file.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"no place for the table: it belongs between {begin.strip()} and {end}")
    made = "\n".join(summary(load(file)) for file in files)
    return text[: text.index(begin) + len(begin)] + made + text[text.index(end) :]


def markdown(rows: Rows) -> str:
    """Returns a table whose first row is the head; the first column to the left, the others to the right.

    Raises:
        ModuleNotFoundError: tabulate is not installed.
    """
    from tabulate import tabulate

    align = ("left", *("right" for _ in rows[0][1:]))
    return tabulate(rows[1:], rows[0], tablefmt="github", colalign=align, disable_numparse=True)


def _source(results: Results) -> str:
    """Where these figures come from."""
    machine = results["machine"]
    text = (
        f"Measured on {machine['device']} ({machine['threads']} CPU threads, load {machine['load']} at the start), "
        f"torch {machine['torch']}, triton {machine['triton']}, torchdeq {machine['torchdeq']}, "
        f"commit {machine['commit']}, {machine['backend']} backend, suite {results['suite']}"
    )
    text += "." if results["complete"] else ", not complete."
    return text + (" The Triton kernels do not run on a CPU: these are torch's." if machine["kind"] == "cpu" else "")


def _short(records: list[Record]) -> Rows:
    """Rows of what a newcomer asks: a solve, a training step, the loop beside its cell, memory."""
    rows = []

    def add(what: str, chosen: list[Record], ours: str, theirs: str, plain: str, show: Callable[[Record], str]) -> None:
        by = {r["contestant"]: r for r in chosen}
        if ours in by:
            rows.append([what, *(show(by[name]) if name in by else "" for name in (ours, theirs, plain))])

    timed = [r for r in records if "seconds" in r and not r.get("wrong")]
    for kind, title, plain in (("solve", "solve", "eager loop"), ("train", "training step", "tied loop")):
        for cell, rows_, width in SHOWN:
            chosen = [r for r in timed if r["kind"] == kind and (r["cell"], r["width"]) == (cell, width)]
            chosen = [r for r in chosen if rows_ in (None, r["rows"])]
            if chosen:
                what = f"{title}, {chosen[0]['case'].rsplit(' ', 1)[0]}"
                add(what, chosen, "tritondeq", "torchdeq Picard", plain, _seconds)
    steps = [r for r in timed if r["kind"] == "steps"]
    for solver, name in (("Picard", "Picard"), ("Anderson", "Anderson(5)")):
        case = [r for r in steps if r["case"] == steps[-1]["case"]]
        plain = "eager loop" if solver == "Picard" else "eager Anderson"
        count = case[0]["steps"] if case else 0
        what = f"{count} evaluations by {solver}, {case[0]['rows']}x{case[0]['width']}" if case else ""
        add(what, case, name, f"torchdeq {solver}", plain, lambda r: _seconds(r, r["steps"]))
    memory = [r for r in records if r["kind"] == "memory" and not r.get("wrong")]
    if memory:
        most = max(r["steps"] for r in memory if r["net"] == memory[0]["net"])
        chosen = [r for r in memory if r["net"] == memory[0]["net"] and r["steps"] == most]
        add(f"memory of a training step, {chosen[0]['case']}", chosen, "tritondeq", "torchdeq", "tied loop", _bytes)
    return rows


def _tables(records: list[Record]) -> Iterator[tuple[str, Rows]]:
    """(title, rows) of all there are, with a row of names first."""
    right = [r for r in records if not r.get("wrong")]
    timed = [r for r in right if "seconds" in r]
    for kind, title in (("solve", "Whole solve"), ("train", "Training step")):
        chosen = [r for r in timed if r["kind"] == kind]
        names = list(dict.fromkeys(r["contestant"] for r in chosen if r["contestant"] != "tritondeq"))
        limit = ["of the limit"] if kind == "solve" else []
        rows = [["case", "steps", "tritondeq", *limit, *names]]
        for case, group in _by_case(chosen).items():
            ours = group["tritondeq"]
            row = [case, str(ours["steps"]), _seconds(ours)]
            row += [_percent(ours)] if limit else []
            rows.append(row + [_times(group[name], "over_ours") if name in group else "" for name in names])
        yield f"{title}: time of tritondeq, and how many times as long the others take", rows
    yield "Time of a solve against its steps", _pivot(timed, "depth", _seconds)
    rows = [["case", "solver", "time per evaluation", "over the bare cell's", "torch operations per step"]]
    for r in timed:
        if r["kind"] == "steps":
            over = _times(r, "over_cell") if r.get("over_cell") else ""
            rows.append([r["case"], r["contestant"], _seconds(r), over, f"{r['ops']:g}" if r.get("ops") else ""])
    yield "Price of a step: a whole call of fixed_point, its steps read, beside as many bare evaluations", rows
    yield "What a small layer waits for", host.table([r for r in timed if r["kind"] == "host"])
    rows = [["solver", "launches beside the cell", "copies", "host syncs", "looks at a flag copied before"]]
    for r in right:
        if r["kind"] == "launches":
            rows.append([r["contestant"], *(f"{r[k]:.2f}" for k in ("launches", "copies", "syncs", "looks"))])
    yield "What a step asks of the host", rows
    needed = _pivot(right, "evaluations", lambda r: str(r["steps"] or "none"))
    yield "Evaluations until the worst row is at 1e-4", needed
    yield "Peak memory of a training step", _pivot(right, "memory", _bytes)
    yield "States held beside the cell by a forward solve", _pivot(right, "states", lambda r: f"{r['states']:.1f}")


def _pivot(records: list[Record], kind: str, show: Callable[[Record], str]) -> Rows:
    chosen = [r for r in records if r["kind"] == kind]
    names = list(dict.fromkeys(r["contestant"] for r in chosen))
    rows = [["case", *names]]
    for case, group in _by_case(chosen).items():
        rows.append([case, *(show(group[n]) if n in group else "" for n in names)])
    return rows


def _by_case(records: list[Record]) -> dict[str, dict[str, Record]]:
    groups: dict[str, dict[str, Record]] = {}
    for r in records:
        groups.setdefault(r["case"], {})[r["contestant"]] = r
    return groups


def _seconds(r: Record, times: int = 1) -> str:
    seconds = r["seconds"] * times
    return (f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms") + _flag(r)


def _times(r: Record, key: str) -> str:
    return f"{r[key]:.2f}x{_flag(r)}"


def _percent(r: Record) -> str:
    return f"{100 * r['of_limit']:.1f}%{_flag(r)}" if r.get("of_limit") else ""


def _bytes(r: Record) -> str:
    return f"{r['bytes'] / 2**20:.2f} MiB"


def _flag(r: Record) -> str:
    return " (?)" if r.get("suspect") else ""


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of results files, or writes the short ones into a README; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tritondeq.bench.report", description=__doc__)
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="JSON of tritondeq.bench; default: all committed"
    )
    parser.add_argument("--readme", type=Path, metavar="PATH", help="write the short tables between the marks of PATH")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw the pictures of the file, the last of several")
    arguments = parser.parse_args(argv)
    try:
        files = arguments.files or committed()
        if arguments.readme is not None:
            arguments.readme.write_text(into(arguments.readme.read_text(), files))
        else:
            print("\n\n".join(table(load(file)) for file in files))
        if arguments.draw is not None:
            from . import pictures

            arguments.draw.mkdir(parents=True, exist_ok=True)
            print("\n".join(map(str, pictures.draw(load(files[-1]), arguments.draw))))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f'{error.name} is missing: pip install "tritondeq[bench]"', file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
