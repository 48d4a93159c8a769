"""Runs kernels in the emulator, under several schedules, and compares them with float64: python -m tests.ptx --help."""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it at its import
os.environ["TRITONDEQ_CACHE"] = os.devnull  # no folder: what is launched does not depend on this machine's tables

import torch

from . import Driver, Options
from .cases import CASES, CHIPS, Case, load

WIDTHS = {"case": 35, "chip": 4, "launches": 8, "warps": 5, "schedules": 12, "bits": 6, "races": 5}
WIDTHS |= {"bounds": 6, "notes": 5, "error": 7, "bound": 7, "seconds": 7}  # of the table's columns


def run(case: Case, driver: Driver, schedules: list[str]) -> dict:
    """Runs a case under every schedule; returns a row of the table, with `failures`, one sentence each."""
    start, first, reports, failures, races, faults, notes = time.process_time(), None, [], [], {}, [], {}
    outcome, same, ptx = None, True, set()
    for schedule in schedules:
        driver.options.seed = None if schedule == "lockstep" else int(schedule)
        driver.options.lockstep = schedule == "lockstep"
        driver.reports.clear()
        driver.edit = functools.partial(_remember, ptx)
        torch.manual_seed(0)
        try:
            outcome = case.run()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{schedule}: {type(error).__name__} at {at.name}, line {at.lineno}: {error}"[:2000])
        reports = list(driver.reports)
        races |= {_place(race): f"{schedule}: {race}" for report in reports for race in report.races}
        apart = [note for report in reports for note in report.notes if note.scope == "lanes"]
        notes |= {_place(note): f"{schedule}: lanes disagree: {note}" for note in apart}
        if faults:
            break
        failures += [f"{schedule}: {wrong}" for wrong in outcome.wrong]
        if not outcome.error <= outcome.bound:
            failures.append(f"{schedule}: an error of {outcome.error:.2e}, and the bound is {outcome.bound:.2e}")
        bits = [x.contiguous().flatten().view(torch.uint8) for x in outcome.bits]
        first = first or bits
        if not all(map(torch.equal, bits, first)):
            same = False
            failures.append(f"{schedule}: other bits than under {schedules[0]}")
    failures += [*faults, *races.values(), *([] if case.notes else notes.values())]
    return {
        "case": case.name,
        "chip": driver.arch,
        "launches": len(reports),
        "warps": max((report.warps for report in reports), default=0),
        "schedules": " ".join(schedules),
        "bits": "same" if same else "DIFFER",
        "races": len(races),
        "bounds": "FAULT" if faults else "kept",
        "notes": len(notes),
        "error": outcome and outcome.error,
        "bound": outcome and outcome.bound,
        "seconds": round(time.process_time() - start, 2),
        "ptx": hashlib.sha256("\n".join(sorted(ptx)).encode()).hexdigest(),
        "failures": failures,
    }


def _new(outcome: dict, known: list[dict]) -> list[str]:
    """Returns the failures that the same case does not have in `known`, whatever the numbers in them."""

    def plain(failure):
        return re.sub(r"%\w+|[-+.\w]*\d[-+.\w]*", "", failure)

    old = {plain(failure) for one in known if one["case"] == outcome["case"] for failure in one["failures"]}
    return [failure for failure in outcome["failures"] if plain(failure) not in old]


def _remember(known: set[str], ptx: str) -> str:
    """Returns the PTX, having added it without what depends on where the source lies."""
    code = ptx.partition(".section")[0]  # what follows is for debuggers
    known.add(re.sub(r"^\s*\.(?:loc|file).*|//.*", "", code, flags=re.M))
    return ptx


def _place(race) -> tuple[str, ...]:
    """Returns where a race is, in the source."""
    return race.kind, race.space, *(end.rpartition("  at ")[2] for end in (race.first, race.second))


def main() -> int:
    """Runs what the command line names; returns 1 where anything fails."""
    load()
    parser = argparse.ArgumentParser("python -m tests.ptx", description=__doc__)
    parser.add_argument("names", nargs="*", help="names of cases, or beginnings of them; all where there are none")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, help="capabilities, times ten")
    parser.add_argument("--schedules", nargs="+", default=["lockstep", "1", "2"], help="lockstep, or seeds of an order")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer schedules, as test runs take",
    )
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--cache", help="a folder for compiled kernels; by default one that is deleted")
    parser.add_argument("--until", type=Path, help="end with the first case that finds what this file has not")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    args = parser.parse_args()
    begins = tuple(name for name in args.names if name not in CASES)
    chosen = [one for name, one in CASES.items() if not args.names or name in args.names or name.startswith(begins)]
    order = {name: i for i, name in enumerate(args.names)}
    chosen.sort(key=lambda one: min((i for name, i in order.items() if one.name.startswith(name)), default=0))
    if args.list or not chosen:
        print(*(one.name for one in chosen), sep="\n")
        return 0 if chosen else 2
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    torch.set_num_threads(1)
    outcomes, known = [], json.loads(args.until.read_text()) if args.until else None
    with tempfile.TemporaryDirectory(prefix="ptx-") as folder:
        for chip in args.chips:
            driver = Driver(chip, Options(raise_races=False), cache_dir=args.cache or folder).activate()
            for one in chosen:
                schedules = args.schedules[: one.most]
                if args.quick:
                    schedules = schedules[1 if one.smoke and chip == one.chip else -1 :] or schedules
                outcomes.append(run(one, driver, schedules))
                if len(outcomes) == 1:
                    _print({name: name for name in WIDTHS})
                _print(outcomes[-1])
                outcomes[-1]["new"] = _new(outcomes[-1], known or [])
                if args.until and outcomes[-1]["new"]:
                    break
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=1))
    failed = [outcome for outcome in outcomes if outcome["failures"]]
    print(f"{len(outcomes)} outcomes, {len(failed)} failed, {sum(o['seconds'] for o in outcomes):.0f} s of one core")
    return bool(failed)


def _print(row: dict) -> None:
    cells = {name: f"{v:.1e}" if isinstance(v := row[name], float) and name != "seconds" else str(v) for name in WIDTHS}
    print(" ".join(cell.ljust(WIDTHS[name]) for name, cell in cells.items()), flush=True)
    for failure in row.get("failures", ()):
        print("    " + failure.replace("\n", "\n    "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
