"""The whole round of measurements: `python -m tritondeq bench`, or `python -m tritondeq.bench`."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tritondeq.kernels import devices
from tritondeq.toolbox import one_thread

from . import (
    blocks,
    first,
    host,
    launches,
    machine,
    measure,
    memory,
    processes,
    report,
    shapes,
    solves,
    steps,
    suspect,
    uneven,
)
from .machine import installed
from .processes import INTERRUPTED, TESTS

TESTS_SECONDS, TUNE_SECONDS, PART_SECONDS, SPARE_SECONDS = 150, 60, 90, 45
COMPILE_UNTIL = 0.85  # of the time: compiling one more contestant may take half a minute
SECONDS = {"tiny": 0.02, "quick": 0.25, "full": 0.5}  # of measuring, each contestant; CUDA takes a third
NEEDED = ("tqdm", "tabulate")

Part = tuple[str, Iterator[measure.Record]]


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes all there is; on a CPU in one thread.

    Returns:
        The exit status: 0; 1 if a check failed or a figure is suspect; 2 for bad arguments; 130 after Ctrl-C, with what
        was finished written.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    these = shapes.asked(arguments)
    why = unwritable(arguments.out) or unfit(device) or shapes.too_large(these, device)
    if missing := [package for package in NEEDED if not installed(package)]:
        why = f'{" and ".join(missing)} not installed: pip install "tritondeq[bench]"'
    if not arguments.minutes >= 0:
        why = f"argument --minutes: must be at least 0, got {arguments.minutes:g}"
    if arguments.first and (these or arguments.suite != parser.get_default("suite")):
        why = "argument --first: has sizes of its own: leave out --suite, --cell, --features, --rows and --dtype"
    if why:
        parser.error(why)
    with one_thread() if device.type == "cpu" else contextlib.nullcontext():
        return first.main(device, arguments, _print) if arguments.first else _measure(device, arguments, these)


def _measure(device: torch.device, arguments: argparse.Namespace, these: list[shapes.Shape]) -> int:
    """The exit status of a round, whose results are written."""
    results = {"schema": report.SCHEMA, "suite": arguments.suite, "complete": False}
    results |= {"machine": machine.describe(device), "shapes": [str(shape) for shape in these], "roofs": {}}
    results |= {"tests": None, "tuning": None, "left_out": [], "records": []}
    _print(_where(results["machine"]))
    if device.type == "cpu":
        _print("No GPU is used: this measures the torch backend on the CPU, not the Triton kernels.")
    for package, lost in (("torchdeq", "is not among the rivals"), ("matplotlib", "no pictures")):
        if not installed(package):
            _print(f'{package} is not installed, so {lost}: pip install "tritondeq[bench]"')
    status = 0
    try:
        _round(results, device, arguments, these)
        results["complete"] = not results["left_out"]
    except KeyboardInterrupt:
        _print("\ninterrupted; what was finished is written")
        status = INTERRUPTED
    return max(_write(results, arguments.out), status)


def _write(results: dict[str, Any], out: Path) -> int:
    """Writes JSON and pictures, prints the table, and returns the exit status that the results ask for."""
    suspect.mark(results["records"])
    path = out / f"{machine.name_of(results['machine'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    written = [path]
    if installed("matplotlib"):
        from . import pictures

        written += pictures.draw(results, out)
    print(report.table(results))
    for lost in results["left_out"]:
        _print(f"left out: {lost}")
    faults, flagged = report.faults(results), suspect.listed(results["records"])
    for fault in faults:
        _print(f"CHECK FAILED: {fault}")
    for figure in flagged:
        _print(f"SUSPECT: {figure}")
    _print(f"written: {', '.join(map(str, written))}")
    return int(bool(faults or flagged))


def _round(results: dict[str, Any], device: torch.device, arguments: argparse.Namespace, these: list) -> None:
    """Fills `results`, in order: limits of the machine, tests on the device, tuning, measurements.

    No part is begun after --minutes, or goes on for SPARE_SECONDS after that, or on a GPU for PART_SECONDS; what is
    missed is named in `left_out`.
    """
    began = time.monotonic()
    total = arguments.minutes * 60
    cuda = device.type == "cuda"

    def spent() -> float:
        return time.monotonic() - began

    def compiles() -> bool:
        return spent() < COMPILE_UNTIL * total

    seconds = SECONDS[arguments.suite] / (3 if cuda else 1)
    _print("Measuring the limits of this machine")
    results["roofs"] = machine.roofs(device, arguments.suite != "full")
    if cuda and arguments.tests and TESTS.is_dir():
        _print("Running the tests on the GPU")
        results["tests"] = processes.tests(TESTS, TESTS_SECONDS)
    if cuda and arguments.tune:
        _print("Tuning the kernels")
        code, text = processes.run(["-m", "tritondeq", "tune"], min(TUNE_SECONDS, (total - spent()) / 2))
        results["tuning"] = {"tuned": code in (None, 0), "text": text}  # a choice is written as soon as it is made
        if code:
            results["left_out"].append(f"tuning: {text}")
    for name, records in _progress(_parts(results, device, arguments.suite, these, seconds, compiles)):
        if spent() > total:
            results["left_out"].append(f"{name}: no time")
            continue
        most = min(PART_SECONDS if cuda else total, total + SPARE_SECONDS - spent())
        try:
            with measure.deadline(most):
                for record in records:
                    results["records"].append(record)
        except measure.Late:
            results["left_out"].append(f"{name}: stopped after {most:.0f} s")
        except Exception as error:
            if measure.out_of_memory(error):
                results["left_out"].append(f"{name}: out of memory; take fewer --rows or --features")
            else:
                wrong = f"raised {type(error).__name__}: {measure.line(error)}"
                broken = {"kind": "error", "case": name, "contestant": "", "rows": None, "width": None, "wrong": wrong}
                results["records"].append(broken)
        if cuda:
            measure.forget(device)


def _parts(
    results: dict[str, Any],
    device: torch.device,
    suite: str,
    these: list[shapes.Shape],
    seconds: float,
    compiles: Callable[[], bool],
) -> list[Part]:
    """(name, records to be made) of everything that is measured, for `these` shapes if there are any."""
    cuda, lose = device.type == "cuda", results["left_out"].append

    def solve(case: solves.Case) -> Part:
        return str(case), solves.run(case, device, results["roofs"], seconds, compiles, lose)

    if these:
        parts = [solve(case) for case in solves.asked(these, cuda and suite == "full")]
        for shape in these:
            parts.append((f"time per step, {shape}", steps.run(device, [shape], seconds, lose)))
            parts.append((f"memory, {shape}", memory.run(device, suite, [shape])))
        return parts
    parts = [
        ("evaluations", steps.evaluations(device, suite)),
        ("time per step", steps.run(device, steps.suite_shapes(suite, cuda), seconds, lose)),
        ("host time", host.run(device, seconds, 64 if suite == "tiny" else host.WIDE)),
        ("launches", launches.run(device)),
        ("memory", memory.run(device, suite)),
        ("states", memory.states(device, suite)),
        ("rows of many depths", uneven.run(device, suite, seconds)),
        ("transformer", blocks.run(device, suite, seconds, compiles, lose)),
    ]
    if not cuda:
        parts = [part for part in parts if part[0] not in ("launches", "rows of many depths")]
    return parts + [solve(case) for case in solves.cases(suite, cuda)]


def _progress(parts: list[Part]) -> Iterator[Part]:
    """The parts; shows which one is under way and what is left, as a bar, or a line a part where none can be drawn."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        columns, lines = shutil.get_terminal_size()  # tqdm draws nothing where a terminal reports no size
        bar = tqdm(parts, unit="part", file=sys.stderr, ncols=columns, nrows=lines)
        for part in bar:
            bar.set_description(part[0])
            yield part
        return
    began = time.monotonic()
    for done, part in enumerate(parts):
        spent = time.monotonic() - began
        left = f", about {tqdm.format_interval(spent / done * (len(parts) - done))} left" if done else ""
        _print(f"[{done + 1}/{len(parts)}] {part[0]} ({tqdm.format_interval(spent)} elapsed{left})")
        yield part


def unwritable(folder: Path) -> str | None:
    """Returns why results can't be written there, and what to do, or None; makes the folder."""
    why = _refused(folder)
    return why and f"argument --out: cannot write to {folder}: {why}"


def unfit(device: torch.device) -> str | None:
    """Returns why the kernels can't be measured on this device, and what to do, or None."""
    if device.type != "cuda":
        return None
    if why := devices.lacks(device):
        return f"{torch.cuda.get_device_name(device)}: {why}: take --cpu"
    if not installed("triton"):
        return "Triton, which has the kernels and the clock, is not installed: pip install triton, or take --cpu"
    from triton import knobs

    folder = Path(knobs.cache.dir)
    why = _refused(folder)
    return why and f"Triton cannot write its cache to {folder}: {why}; set TRITON_CACHE_DIR to a folder it can write to"


def _refused(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def _where(machine: dict[str, Any]) -> str:
    words = [machine["device"], f"torch {machine['torch']}", f"triton {machine['triton'] or 'not installed'}"]
    return ", ".join([*words, f"commit {machine['commit'] or 'unknown'}", f"{machine['backend']} backend"])


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists what there is)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tritondeq bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", choices=("quick", "full", "tiny"), default="quick", help="default: quick")
    shapes.add(parser)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), metavar="DIR", help="default: bench_out")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not begun by then is left out; default: 8")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="do not run the tests on the GPU first")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="do not tune the kernels first")
    text = "5 minutes at most: compare every op with its reference, take ten figures, run the kernels' tests"
    parser.add_argument("--first", action="store_true", help=text)
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone: measure the torch backend on the CPU")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
