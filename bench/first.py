"""The first minutes on a GPU: `python -m tritondeq bench --first`.

Every op solves small problems (problems.py) beside its reference in float64, and beside what an emulator computed of
the same compiled kernels (first_expected.json, which `python -m tests.ptx.expected` writes); ten figures follow
(figures.py), then the kernels' tests in the time that is left.

Bits are promised of results that the emulator found to rest on exactly rounded operations alone, for the release of
Triton that compiled them, on chips whose code has the same layouts. Elsewhere a difference is reported, in units of the
last place, and nothing fails.
"""

import argparse
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritondeq.kernels import devices, dispatch

from . import figures, machine, measure, processes, report
from .problems import OUTCOME, Problem, Result, listed

SCHEMA = 1
MINUTES = 5.0
EXPECTED = Path(__file__).parent / "first_expected.json"
FAILURES = 20  # of tests, after which no more are run
LEADING = 8  # values of a tensor that are kept beside its hash
FACTOR = 4.0  # how much further from float64 an op may be than its reference in the op's dtype, beside its tolerance
FLOOR = {torch.float32: 2e-6, torch.float64: 1e-12}  # relative error that an op may have whatever the reference's is
LATE = 2  # steps that a sample may take more than the reference, or fewer
EXACT = 1e-12  # tolerance of the reference in float64
SPARE = 15.0  # seconds after which a part that is late, and that no alarm can end, is taken for stuck
BOUND = (8, 9)  # major capabilities for which bits are promised

Print = Callable[[str], None]


def backend_of(device: torch.device) -> tuple[str | None, str]:
    """Returns (how kernels run on this device, or None; a sentence about it)."""
    if not dispatch.has_triton():
        return None, "Triton is not installed, so no op is compared: pip install triton"
    if why := dispatch.too_old():
        return None, f"No kernel runs: {why}"
    if device.type == "cuda":
        return "gpu", "The kernels run on the GPU."
    if dispatch.interpreting():
        return "interpreter", "No GPU is used: the kernels run in Triton's interpreter, which promises no bits."
    if devices.emulated:
        return "emulator", f"No GPU is used: the kernels run in the emulator of sm_{devices.emulated}."
    return (
        None,
        "No GPU is used, so that the references run alone: TRITON_INTERPRET=1 runs the kernels in an interpreter.",
    )


def main(device: torch.device, arguments: argparse.Namespace, say: Print) -> int:
    """Does all there is, writes it and prints it; returns the exit status of `python -m tritondeq bench`.

    Args:
        device: Where to run.
        arguments: Those of the command.
        say: Prints a line to stderr.
    """
    results, status = begin(device), 0
    seen = results["machine"]
    say(f"{seen['device']}, torch {seen['torch']}, triton {seen['triton']}, commit {seen['commit'] or 'unknown'}")
    try:
        fill(results, device, arguments, say)
        results["complete"] = not results["left_out"]
    except KeyboardInterrupt:
        say("\ninterrupted; what was finished is written")
        status = processes.INTERRUPTED
    return max(_write(results, arguments.out, say), status)


def _write(results: dict[str, Any], out: Path, say: Print) -> int:
    """Writes JSON, prints the tables, and returns the exit status that the results ask for."""
    path = out / f"first-{machine.name_of(results['machine'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), flush=True)
    for lost in results["left_out"]:
        say(f"left out: {lost}")
    for fault in (wrong := faults(results)):
        say(f"CHECK FAILED: {fault}")
    say(f"written: {path}")
    return int(bool(wrong))


def fill(results: dict[str, Any], device: torch.device, arguments: argparse.Namespace, say: Print) -> None:
    """Fills `results`, in order: problems, figures, tests; what the time does not allow is named in `left_out`."""
    total, began = 60 * min(arguments.minutes, MINUTES), time.monotonic()
    how, sentence = backend_of(device)
    say(sentence)

    def stuck(name: str, into: list) -> None:
        """Ends the process while its main thread waits for a kernel that does not end."""
        results["stuck"] = f"{name}: the GPU did not answer after {len(into)} were done"
        _write(results, arguments.out, say)
        os._exit(1)

    def part(name: str, into: list, records: Iterator[dict[str, Any]]) -> None:
        left = total - (time.monotonic() - began)
        watch = threading.Timer(max(left, 0.0) + SPARE, stuck, (name, into))
        watch.daemon = True
        watch.start()
        try:
            with measure.deadline(left):
                for record in records if left > 0 else ():
                    into.append(record)
        except measure.Late:
            left = 0.0
        finally:
            watch.cancel()
        if left <= 0:
            results["left_out"].append(f"{name}: the time was over after {len(into)}")

    if dispatch.has_triton():
        say("Comparing every op with its reference")
        known = expected()
        part("problems", results["problems"], compared(device, how, known))
        if known is None:
            results["left_out"].append(f"bits: this installation has no {EXPECTED.name}, which is in the repository")
    else:
        results["left_out"].append(f"problems: {sentence}")
    say("Taking ten figures")
    part("figures", results["figures"], figures.run(device, how))
    if how != "gpu":
        results["left_out"].append("figures: not measured on a GPU")
        results["left_out"].append("tests: they are for a GPU")
    elif arguments.tests and processes.TESTS.is_dir():
        say("Running the kernels' tests in the time that is left")
        left = total - (time.monotonic() - began)
        results["tests"] = processes.tests(processes.TESTS / "kernels", left, FAILURES)
        if results["tests"]["passed"] is None:
            results["left_out"].append(f"tests: {results['tests']['text']}")
    else:
        results["left_out"].append("tests: not asked for" if not arguments.tests else "tests: there are none here")


def begin(device: torch.device) -> dict[str, Any]:
    """Returns results of which nothing has been done."""
    known = expected()
    emulated = {name: known[name] for name in ("triton", "torch")} if known else None
    made = {"schema": SCHEMA, "kind": "first", "complete": False, "machine": machine.describe(device)}
    return made | {"emulator": emulated, "problems": [], "figures": [], "tests": None, "stuck": None, "left_out": []}


def faults(results: dict[str, Any]) -> list[str]:
    """Returns a sentence about each thing that failed."""
    wrong = [f"{r['name']}: {r['wrong']}" for r in (*results["problems"], *results["figures"]) if r["wrong"]]
    wrong += [results["stuck"]] if results["stuck"] else []
    tests = results["tests"]
    return wrong + ([f"tests: {tests['text']}"] if tests and tests["passed"] is False else [])


def expected() -> dict[str, Any] | None:
    """Returns what the emulator gave, or None where the file does not lie beside this one."""
    return json.loads(EXPECTED.read_text()) if EXPECTED.exists() else None


def compared(device: torch.device, how: str | None, known: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a record for each problem; an op that raises is wrong, and the next one follows."""
    chip = devices.chip(device)
    beside = known["chips"].get("80" if chip < 90 else "90", {}) if known and how else {}
    binding = how in ("gpu", "emulator") and chip // 10 in BOUND and bool(known) and same_triton(known["triton"])
    for problem in listed():
        record = {"name": problem.name, "op": problem.op, "error": None, "reference_error": None, "bound": None}
        record |= {"bits": {}, "wrong": None}
        try:
            _compare(record, problem, device, how, beside.get(problem.name, {}), binding)
        except Exception as error:
            record["wrong"] = f"raised {type(error).__name__}: {measure.line(error)}"
        yield record


def same_triton(version: str) -> bool:
    """Returns whether this Triton is of that release: another one compiles other code, whose sums have other orders."""
    return dispatch.triton_version() == tuple(map(int, version.split(".")[:2]))


def _compare(
    record: dict[str, Any], problem: Problem, device: torch.device, how: str | None, beside: dict, binding: bool
) -> None:
    exact = problem.reference(device, torch.float64, EXACT)
    near = problem.reference(device, problem.dtype, problem.tol)
    record["reference_error"] = _error(near, exact)
    record["bound"] = FACTOR * record["reference_error"] + FLOOR[problem.dtype] + problem.tol
    if how is None:
        return
    got = problem.run(device)
    record["error"] = _error(got, exact)
    wrong = []
    if not record["error"] <= record["bound"]:
        wrong.append(f"an error of {record['error']:.1e}, and the bound is {record['bound']:.1e}")
    if "steps" in got:
        if (late := (got["steps"] - near["steps"]).abs().max().item()) > LATE:
            wrong.append(f"{late} steps more or fewer than the reference")
        if not torch.equal(got["status"], near["status"]):
            wrong.append(f"status {got['status'].tolist()}, and the reference's is {near['status'].tolist()}")
    for name, value in got.items():
        if name in beside:
            record["bits"][name] = bits = _beside(value, beside[name], binding)
            if bits["promised"] and not bits["same"]:
                wrong.append(f"{name} has other bits than the emulator's, which are promised ({bits['ulps']} ulps)")
    record["wrong"] = "; ".join(wrong) or None


def _error(got: Result, exact: Result) -> float:
    """Returns the largest relative error of a row of what was computed; of a NaN, infinity."""
    worst = 0.0
    for name, value in got.items():
        if name not in OUTCOME:
            a, b = (x.double().flatten(1) for x in (value, exact[name]))
            error = (a - b).norm(dim=1) / b.norm(dim=1)
            worst = max(worst, error.nan_to_num(nan=math.inf).max().item())
    return worst


def kept(value: Tensor) -> dict[str, Any]:
    """Returns what is kept of a tensor: the hash of its bits, and its leading values."""
    data = value.detach().cpu().contiguous()
    digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"sha256": digest, "leading": data.flatten()[:LEADING].tolist()}


def _beside(value: Tensor, known: dict[str, Any], binding: bool) -> dict[str, Any]:
    """Returns whether a tensor has these bits, whether that is promised, and how far its leading values are off."""
    mine = kept(value)
    ulps = max(map(lambda a, b: _ulps(a, b, value.dtype), mine["leading"], known["leading"]))
    return {"promised": binding and known["promised"], "same": mine["sha256"] == known["sha256"], "ulps": ulps}


def _ulps(a: float, b: float, dtype: torch.dtype) -> float | None:
    """Returns |a - b| in units of the last place of b; of integers, the difference."""
    if not dtype.is_floating_point:
        return abs(a - b)
    digits = 24 if dtype == torch.float32 else 53
    return round(abs(a - b) / 2.0 ** (max(math.frexp(b)[1], -100) - digits), 1)


def table(results: dict[str, Any]) -> str:
    """Returns what was found, in markdown."""
    rows = [["op and problem", "error", "reference's", "promised bits", "other bits", ""]]
    for r in results["problems"]:
        bits = r["bits"].values()
        promised, others = ([b for b in bits if b["promised"] is which] for which in (True, False))
        far = max((b["ulps"] for name, b in r["bits"].items() if name not in OUTCOME), default=0)
        cells = [_number(r["error"]), _number(r["reference_error"]), _count(promised), _count(others)]
        cells[-1] += f", {far:g} ulps" if far else ""
        rows.append([r["name"], *cells, "WRONG" if r["wrong"] else "" if r["error"] is not None else "not run"])
    text = report.markdown(rows) if len(rows) > 1 else ""
    rows = [["figure", "size", "device", "host"]]
    rows += [[r["name"], r["size"], *(_time(r[part]) for part in ("device", "host"))] for r in results["figures"]]
    text += "\n\n" + report.markdown(rows) if len(rows) > 1 else ""
    if tests := results["tests"]:
        outcome = {True: "passed", False: "FAILED", None: "not finished"}[tests["passed"]]
        text += f"\n\nTests of the kernels: {outcome}: {tests['text'].splitlines()[-1]}"
    return text.strip()


def _count(bits: list[dict[str, Any]]) -> str:
    return f"{sum(b['same'] for b in bits)} of {len(bits)} same" if bits else ""


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def _time(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e6:.1f} us"
