"""The whole round of measurements: `python -m tritondeq bench`, or `python -m tritondeq.bench`."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import blocks, launches, measure, memory, report, shapes, solves, steps, uneven
from .common import installed

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"  # those that are committed
TESTS = Path(__file__).resolve().parents[1] / "tests"
ELSEWHERE = ("test_bench*.py", "test_offline*.py", "test_demo.py")  # tests that say nothing of the device
TESTS_SECONDS, TUNE_MINUTES, PART_SECONDS, SPARE_SECONDS = 150, 1.0, 90, 45
STOPPING_SECONDS = 20
COMPILE_UNTIL = 0.85  # of the time: compiling one more contestant may take half a minute
OLDEST = (8, 0)  # capability of a GPU
INTERRUPTED = 130
SECONDS = {"tiny": 0.02, "quick": 0.25, "full": 0.5}  # of measuring, each contestant; CUDA takes a third


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if a check failed; 2 for bad arguments; 130 after Ctrl-C, with what was finished written."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    these = shapes.asked(arguments)
    why = unwritable(arguments.out) or unfit(device) or shapes.too_large(these, device)
    if not arguments.minutes >= 0:
        why = f"argument --minutes: must be at least 0, got {arguments.minutes:g}"
    if why:
        parser.error(why)
    results = {"schema": SCHEMA, "suite": arguments.suite, "complete": False, "machine": measure.machine(device)}
    results |= {"shapes": [str(shape) for shape in these], "roofs": {}, "tests": None, "tuning": None}
    results |= {"left_out": [], "records": []}
    _say(_where(results["machine"]))
    if device.type == "cpu":
        _say("No GPU is used: this measures the torch backend on the CPU, not the Triton kernels.")
    for package, lost in (("torchdeq", "is not among the rivals"), ("matplotlib", "no pictures")):
        if not installed(package):
            _say(f'{package} is not installed, so {lost}: pip install "tritondeq[bench]"')
    status = 0
    try:
        _round(results, device, arguments, these)
        results["complete"] = not results["left_out"]
    except KeyboardInterrupt:
        _say("\ninterrupted; what was finished is written")
        status = INTERRUPTED
    path = arguments.out / f"{measure.name_of(results['machine'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    written = [path]
    if installed("matplotlib"):
        from . import pictures

        written += pictures.draw(results, arguments.out)
    print(report.table(results))
    for lost in results["left_out"]:
        _say(f"left out: {lost}")
    faults = report.faults(results)
    for fault in faults:
        _say(f"CHECK FAILED: {fault}")
    _say(f"written: {', '.join(map(str, written))}")
    return status or int(bool(faults))


def _round(results: dict[str, Any], device: torch.device, arguments: argparse.Namespace, these: list) -> None:
    """Fills `results`, in order: roofs, tests on the device, tuning, benchmarks. No part is begun after --minutes, or
    goes on for SPARE_SECONDS after that, or on a GPU for PART_SECONDS; what is missed is named in `left_out`."""
    began = time.monotonic()
    total = arguments.minutes * 60
    cuda = device.type == "cuda"

    def spent() -> float:
        return time.monotonic() - began

    seconds = SECONDS[arguments.suite] / (3 if cuda else 1)
    results["roofs"] = measure.roofs(device, arguments.suite != "full")
    if cuda and arguments.tests and TESTS.is_dir():
        results["tests"] = _tests()
    if cuda and arguments.tune:
        results["tuning"] = _tune(min(TUNE_MINUTES, (total - spent()) / 120))
        if not results["tuning"]["tuned"]:
            results["left_out"].append(f"tuning: {results['tuning']['says']}")

    def compiles() -> bool:
        return spent() < COMPILE_UNTIL * total

    parts = _parts(results, device, arguments.suite, these, seconds, compiles)
    for name, records in _progress(parts):
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
                broken = {"goal": "error", "case": name, "contestant": "", "rows": None, "width": None, "wrong": wrong}
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
) -> list[tuple[str, Iterator[dict]]]:
    """(name, records to be made) of everything that is measured, for `these` shapes if there are any."""
    cuda, lose = device.type == "cuda", results["left_out"].append

    def solve(case: solves.Case) -> tuple[str, Iterator[dict]]:
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
        ("launches", launches.run(device)),
        ("memory", memory.run(device, suite)),
        ("states", memory.states(device, suite)),
        ("rows of many depths", uneven.run(device, suite, seconds)),
        ("transformer", blocks.run(device, suite, seconds, compiles, lose)),
    ]
    return parts + [solve(case) for case in solves.cases(suite, cuda)]


def _tests() -> dict[str, Any]:
    """Runs the tests of the device in a few processes, for TESTS_SECONDS at most."""
    found = set(TESTS.rglob("test_*.py")) - {path for pattern in ELSEWHERE for path in TESTS.rglob(pattern)}
    files = sorted(found, key=lambda path: (-path.stat().st_size, path))
    shards = max(1, min(4, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder) / f"{i}.txt").open("w+") for i in range(shards)]
        runs = [
            subprocess.Popen(
                [*command, *map(str, files[i::shards])], cwd=TESTS.parent, stdout=log, stderr=subprocess.STDOUT
            )
            for i, log in enumerate(logs)
        ]
        end = time.monotonic() + TESTS_SECONDS
        try:
            ends = [_ended(run, end) for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.wait()
        said = []
        for log, code in zip(logs, ends, strict=True):
            log.seek(0)
            lines = log.read().strip().splitlines()
            log.close()
            said.append(f"stopped after {TESTS_SECONDS} s" if code is None else lines[-1] if lines else "said nothing")
    failed = any(code not in (None, 0) for code in ends)
    return {"passed": False if failed else None if None in ends else True, "says": "; ".join(said)}


def _ended(run: subprocess.Popen, end: float) -> int | None:
    """Its exit status, or None if it has none at that time."""
    try:
        return run.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _tune(minutes: float) -> dict[str, Any]:
    """Runs `python -m tritondeq tune` for so long at most; it writes each choice down as soon as it is made.

    In a process of its own: what it finds is read by whoever launches a kernel after it.
    """
    if importlib.util.find_spec("tritondeq.tune") is None:
        return {"tuned": False, "says": "this installation has no tritondeq.tune"}
    if minutes <= 0:
        return {"tuned": False, "says": "no time"}
    command = [sys.executable, "-m", "tritondeq", "tune"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": interruptible}
    with subprocess.Popen(command, **pipes) as run:
        try:
            out, err = run.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT) if os.name == "posix" else run.terminate()
            try:
                out, err = run.communicate(timeout=STOPPING_SECONDS)
            except subprocess.TimeoutExpired:
                run.kill()
                return {"tuned": False, "says": f"did not stop after {60 * minutes:.0f} s"}
        except BaseException:
            run.kill()
            raise
    lines = (out if run.returncode == 0 else err or out).strip().splitlines()
    says = lines[-1] if lines else "said nothing"
    return {"tuned": run.returncode in (0, INTERRUPTED), "says": says}


def _heeds_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# What a shell starts in the background ignores Ctrl-C, and so would what that starts.
interruptible = _heeds_interrupts if os.name == "posix" else None


def unwritable(folder: Path) -> str | None:
    """Why results can't be written there, and what to do, or None; makes the folder."""
    why = _refused(folder)
    return why and f"argument --out: cannot write to {folder}: {why}"


def unfit(device: torch.device) -> str | None:
    """Why the kernels can't be measured on this device, and what to do, or None."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"{name} has capability {has}, and the kernels need 8.0 (A100) or later: take --cpu"
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


def _progress(parts: list) -> Any:
    if installed("tqdm") and sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(parts, unit="case", file=sys.stderr)
    return parts


def _where(machine: dict[str, Any]) -> str:
    found = [machine["device"], f"torch {machine['torch']}", f"triton {machine['triton'] or 'not installed'}"]
    return ", ".join([*found, f"commit {machine['commit'] or 'unknown'}", f"{machine['backend']} backend"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

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
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone: measure the torch backend on the CPU")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
