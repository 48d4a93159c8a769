"""The whole round of measurements: `python -m tritondeq.bench`, or `python -m tritondeq bench`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import blocks, measure, memory, report, solves, steps, uneven

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"  # those that are committed
TESTS = Path(__file__).resolve().parents[1] / "tests"
TESTS_SECONDS = 150
INTERRUPTED = 130
SECONDS = {"tiny": 0.02, "quick": 0.25, "full": 0.5}  # of measuring, each contestant; CUDA takes a third


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if a check failed; 2 for bad arguments; 130 after Ctrl-C, with what was finished written."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.minutes >= 0:
        parser.error(f"argument --minutes: must be at least 0, got {arguments.minutes:g}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {arguments.out}: {error.strerror}")
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    results = {"schema": SCHEMA, "suite": arguments.suite, "complete": False, "machine": measure.machine(device)}
    results |= {"roofs": {}, "tests": None, "left_out": [], "records": []}
    _say(_where(results["machine"]))
    if device.type == "cpu":
        _say("No GPU is used: this measures the torch backend on the CPU, not the Triton kernels.")
    for package, lost in (("torchdeq", "is not among the rivals"), ("matplotlib", "no pictures")):
        if not report.installed(package):
            _say(f'{package} is not installed, so {lost}: pip install "tritondeq[bench]"')
    status = 0
    try:
        _round(results, device, arguments)
        results["complete"] = not results["left_out"]
    except KeyboardInterrupt:
        _say("\ninterrupted; what was finished is written")
        status = INTERRUPTED
    path = arguments.out / f"{measure.name_of(results['machine'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    written = [path, *(report.draw(results, arguments.out) if report.installed("matplotlib") else [])]
    print(report.table(results))
    faults = report.faults(results)
    for fault in faults:
        _say(f"CHECK FAILED: {fault}")
    _say(f"written: {', '.join(map(str, written))}")
    return status or int(bool(faults))


def _round(results: dict[str, Any], device: torch.device, arguments: argparse.Namespace) -> None:
    """Fills `results`, in order; what the time does not allow is named in `left_out`."""
    began = time.monotonic()
    quick = arguments.suite != "full"
    seconds = SECONDS[arguments.suite] / (3 if device.type == "cuda" else 1)
    results["roofs"] = measure.roofs(device, quick)
    if device.type == "cuda" and arguments.tests and TESTS.is_dir():
        results["tests"] = _tests()
    for name, records in _progress(_parts(results, device, arguments, seconds, began)):
        if time.monotonic() - began > arguments.minutes * 60:
            results["left_out"].append(name)
            continue
        for record in records:
            results["records"].append(record)


def _parts(results, device, arguments, seconds, began) -> list[tuple[str, Iterator[dict]]]:
    """(name, records to be made) of everything that is measured."""
    suite = arguments.suite

    def solve(case: solves.Case) -> Iterator[dict]:
        spent = (time.monotonic() - began) / 60
        compiled = spent < 0.7 * arguments.minutes
        if case.compiled and not compiled:
            results["left_out"].append(f"{case}, compiled")
        yield from solves.run(case, device, results["roofs"], seconds, compiled)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    parts = [
        ("evaluations", steps.evaluations(device, suite)),
        ("time per step", steps.run(device, suite, seconds)),
        ("memory", memory.run(device, suite)),
        ("transformer", blocks.run(device, suite, seconds)),
        ("rows of many depths", uneven.run(device, suite, seconds)),
    ]
    return parts + [(str(case), solve(case)) for case in solves.cases(suite, device.type == "cuda")]


def _tests() -> dict[str, Any]:
    """Runs the test suite on the device, for TESTS_SECONDS at most."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS), "--ignore", str(TESTS / "test_bench.py")]
    try:
        run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=TESTS_SECONDS)
    except subprocess.TimeoutExpired:
        return {"passed": None, "says": f"stopped after {TESTS_SECONDS} s"}
    lines = (run.stdout or run.stderr).strip().splitlines()
    return {"passed": run.returncode == 0, "says": lines[-1] if lines else "said nothing"}


def _progress(parts: list) -> Any:
    if report.installed("tqdm") and sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(parts, unit="case", file=sys.stderr)
    return parts


def _where(machine: dict[str, Any]) -> str:
    found = [machine["device"], f"torch {machine['torch']}", f"triton {machine['triton'] or 'not installed'}"]
    return ", ".join([*found, f"commit {machine['commit'] or 'unknown'}", f"{machine['backend']} backend"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tritondeq.bench", description=__doc__)
    parser.add_argument("--suite", choices=("quick", "full", "tiny"), default="quick", help="default: quick")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), metavar="DIR", help="default: bench_out")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not begun by then is left out; default: 8")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="do not run the tests on the GPU first")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone: measure the torch backend on the CPU")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
