"""Every kernel as PTX on the CPU: races, bounds, the same bits under every schedule, and values against float64.

`python -m tests.ptx` runs all cases for both chips, and prints more of what they find.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tritondeq.kernels import dispatch

from . import mutations
from .cases import CHIPS, load

ROOT = Path(__file__).parent.parent.parent
LEAST = (3, 6)  # of Triton, whose older releases give PTX that the emulator was not written for
CASES = load()
TL_STEPS = "steps/tl_steps.py"

pytestmark = pytest.mark.kernels


def run(chip: int, names: list[str], folder: Path) -> dict[str, dict]:
    """Runs these cases for a chip in a process of its own; returns what each found, by name.

    Cases of every run do so under two random schedules for their chip, and under one for the other.
    """
    file = folder / f"{chip}.json"
    command = [sys.executable, "-m", "tests.ptx", "--quick", "--chips", str(chip), "--json", str(file), *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    return {outcome["case"]: outcome for outcome in json.loads(file.read_text())}


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What was found of the cases whose tests run, by chip and name."""
    if dispatch.triton_version() < LEAST:
        pytest.skip(f"the emulator needs triton {'.'.join(map(str, LEAST))}")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    params = [item.callspec.params for item in items]
    wanted = {chip: [one["name"] for one in params if one.get("chip") == chip] for chip in CHIPS}
    folder = tmp_path_factory.mktemp("ptx")
    with ThreadPoolExecutor(len(CHIPS)) as pool:
        parts = {chip: pool.submit(run, chip, names, folder) for chip, names in wanted.items() if names}
        return {chip: part.result() for chip, part in parts.items()}


def each():
    """Yields (name, chip): cases of every run for both chips (one of them slow), others for one, no rare ones."""
    for name, case in CASES.items():
        for chip in CHIPS if case.smoke else () if case.rare else (case.chip,):
            marks = [] if case.smoke and chip == case.chip else pytest.mark.slow
            yield pytest.param(name, chip, marks=marks, id=f"{name}-{chip}")


@pytest.mark.parametrize("name, chip", each())
def test_kernels(outcomes, name, chip):
    outcome = outcomes[chip][name]
    assert not outcome["failures"], "\n".join(outcome["failures"])
    assert outcome["launches"], "nothing was launched"


def test_cases_of_every_kernel_run_in_the_fast_tests():
    first = {name: re.split("[_.]", name)[0] for name in CASES}
    assert {first[name] for name, case in CASES.items() if case.smoke} == set(first.values())


@pytest.mark.slow
def test_a_mutant_is_caught(tmp_path):
    """The order of the atomic that the last program relies on; `python -m tests.ptx.mutations` has the others."""
    name, schedules = "steps_split.picard", ["lockstep", "1"]
    mutants = [m for m in mutations.mutants() if (m.what, m.file) == ("sem=relaxed", TL_STEPS) and "ARRIVED" in m.code]
    mutant = mutants[0]
    mutations.copy(tmp_path)
    plain = {outcome["case"]: outcome for outcome in mutations.run(tmp_path, [name], 80, schedules)}
    assert mutations.judge(mutant, tmp_path, plain, 80, schedules)[0] == "caught"
    text = (ROOT / "kernels" / TL_STEPS).read_text()
    same = replace(mutant, new=text[mutant.start : mutant.end])
    assert mutations.judge(same, tmp_path, plain, 80, schedules)[0] == "equivalent"


@pytest.mark.slow
def test_counts_are_those_of_the_equations():
    """A product has 2 D operations for each element and term; a Picard step reads z and y and writes z+."""
    command = [
        sys.executable,
        "-m",
        "tests.ptx.counts",
        "--chips",
        "80",
        "--",
        "rows.affine 64, 2",
        "steps.picard 8192",
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    columns, affine, picard = (re.split(r"\s{2,}", line.strip()) for line in lines[1:])
    assert float(affine[1 + columns.index("FLOP")]) == 2 * 64 * 2
    assert 12 <= float(picard[1 + columns.index("bytes")]) <= 12.5
