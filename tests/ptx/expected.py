"""Writes what the emulator gives for the problems of `bench --first`: python -m tests.ptx.expected.

A tensor's bits are promised where they rest on exactly rounded operations alone. That is found out: its bits have to
stay where every approximate instruction is off by four units of the last place, up or down, and where tensor cores cut
each product of eight to 24 bits of the largest, or round sums to nearest; and no launch of the problem may have a
product and a sum in its PTX that ptxas is free to fuse. What ends a solve is promised only with the solution.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from contextlib import nullcontext
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it at its import
os.environ["TRITONDEQ_CACHE"] = os.devnull  # no folder: what is launched does not depend on this machine's tables

import torch
import triton

from tritondeq.bench.first import EXPECTED, kept
from tritondeq.bench.problems import OUTCOME, Problem, listed

from . import Driver, Options, tensor
from .inexact import DOWN, UP, coarse, fusable, off

CHIPS = (80, 90)
VARIANTS = ((None, "usual"), (UP, "coarse"), (DOWN, "nearest"))  # the last two show what is not exact


def found(driver: Driver, problem: Problem, promises: bool = True) -> dict[str, dict]:
    """Returns what is kept of each tensor of a problem, and with `promises` whether it is promised."""
    code, outcomes = set(), []
    for by, products in VARIANTS if promises else VARIANTS[:1]:
        driver.edit = lambda ptx, by=by: code.add(ptx) or off(ptx, by)
        driver.options.truncates = products != "nearest"
        with patch.object(tensor, "accumulate", coarse) if products == "coarse" else nullcontext():
            outcomes.append({name: kept(value) for name, value in problem.run(torch.device("cpu")).items()})
    first, *others = outcomes
    if not promises:
        return first
    same = {name for name, one in first.items() if all(other[name]["sha256"] == one["sha256"] for other in others)}
    if any(map(fusable, code)):
        same.clear()
    if "z" not in same:
        same -= set(OUTCOME)
    return {name: one | {"promised": name in same} for name, one in first.items()}


def main(argv: list[str] | None = None) -> int:
    """Writes the file, or with --check compares; returns 1 where it is not what the emulator gives."""
    parser = argparse.ArgumentParser("python -m tests.ptx.expected", description=__doc__)
    parser.add_argument("names", nargs="*", help="problems, by what their names begin with; all where there are none")
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), help="capabilities, times ten")
    parser.add_argument("--check", action="store_true", help="write nothing: compare with the file")
    parser.add_argument(
        "--bits", action="store_true", help="as --check, but not what is promised: in a third of the time"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = [one for one in listed() if not arguments.names or one.name.startswith(tuple(arguments.names))]
    if not chosen:
        parser.error("there is no such problem")
    chips = {}
    with tempfile.TemporaryDirectory(prefix="ptx-") as folder:
        for chip in arguments.chips:
            driver = Driver(chip, Options(lockstep=True), cache_dir=folder).activate()
            chips[str(chip)] = {}
            for problem in chosen:
                chips[str(chip)][problem.name] = tensors = found(driver, problem, not arguments.bits)
                promised = ", ".join(name for name, one in tensors.items() if one.get("promised"))
                what = "run" if arguments.bits else f"{promised or 'no bits are'} promised"
                print(f"sm_{chip} {problem.name}: {what}", flush=True)
    if not (arguments.check or arguments.bits):
        old = json.loads(EXPECTED.read_text())["chips"] if EXPECTED.exists() else {}
        for chip, new in chips.items():
            every = old.get(chip, {}) | new
            old[chip] = {one.name: every[one.name] for one in listed() if one.name in every}
        text = json.dumps({"triton": triton.__version__, "torch": torch.__version__, "chips": old}, indent=1)
        EXPECTED.write_text(re.sub(r"\[[^]]*\]", lambda values: " ".join(values[0].split()), text) + "\n")
        return 0
    known, wrong = json.loads(EXPECTED.read_text())["chips"], []
    for chip, new in chips.items():
        for name, tensors in new.items():
            old = known[chip].get(name, {})
            if old.keys() != tensors.keys() or any(not one.items() <= old[key].items() for key, one in tensors.items()):
                wrong.append(f"{chip} {name}")
    print(*(f"differs: sm_{one}" for one in wrong), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
