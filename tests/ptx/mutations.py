"""Breaks the kernels' barriers, atomics and masks, one by one, and prints which case sees it.

    python -m tests.ptx.mutations --help

Each mutant is a copy of the package in which one call differs: a barrier is left out, an atomic has a weaker order or
is left out, a load or store has no mask. Cases of the file it is in run until one fails. Where none does and the PTX of
each is what it was, the mutant is equivalent; where the PTX differs, it survives, unless EXPLAINED has the reason.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LONGEST = 240  # seconds of one mutant, after which it does not end
ORDERS = "relaxed", "acquire", "release"
# Cases by the file of a mutant, those that are quick and see the most first.
ROWS = ["affine_new_rows.failing", "affine_stream.wide", "affine_start.two", "mlp_new_rows.pre"]
ROWS += ["affine_batch_of_one.features", "gated_options.narrow"]
CASES = {
    "rows/skeleton.py": ROWS,
    "rows/tl_rows.py": ROWS,
    "steps/picard.py": ["steps_split.picard", "steps_restless.picard", "steps_failing_split.picard"],
    "steps/anderson.py": [
        *("steps_restless.anderson3", "steps_split.half", "steps_batch_of_one_split.anderson3", "steps_two_warps.half"),
        *("steps_failing_split.anderson3", "steps_one_number.half"),
    ],
    "steps/broyden.py": [
        *("steps_two_warps.broyden3", "steps_split.broyden3", "steps_restless.broyden3", "steps_one_number.broyden1"),
        *("steps_failing.broyden3", "steps_resumed.split"),
    ],
    "steps/tl_steps.py": [
        *("steps_split.picard", "steps_restless.picard", "steps_two_warps.anderson3", "products_small.start"),
        *("tail_options.rms_rows", "tail_split.picard", "steps_one_number.anderson3", "products_failing.plain"),
        *("tail_options.all", "steps_restless_split.picard"),
    ],
    "steps/affine.py": [
        *("products_failing.plain", "products_small.start", "products_small.adjoint", "products_group.narrow"),
        *("products_small.one_feature", "products_split.start", "products_fading.solve"),
    ],
    "norms/group_norm.py": ["group_norm_whole", "group_norm_split"],
    "norms/residual_rms.py": ["residual_rms"],
    "norms/residual.py": ["residual_far"],
    "norms/unit.py": ["unit"],
}
ORDERLESS = "the host reads the count when the launch has ended, and no other access is ordered by it"
# By file, mutation, and how the lines from the call to the one after it begin: why the PTX differs and nothing else.
EXPLAINED = {("steps/tl_steps.py", f"sem={order}", "tl.atomic_add(count_ptr, -"): ORDERLESS for order in ORDERS} | {
    ("rows/skeleton.py", "no barrier", "tl.debug_barrier()"): "it keeps W in shared memory, and orders nothing",
    ("steps/affine.py", "no barrier", "tl.debug_barrier() arrived = "): (
        "Triton puts a barrier of its own there, for the shared memory that the sums went through"
    ),
    ("rows/tl_rows.py", "no barrier", "tl.debug_barrier() tl.store(d_ptr"): (
        "each product that took what is overwritten had a barrier after it was loaded, as Triton compiles it"
    ),
}


@dataclass(frozen=True)
class Mutant:
    """A change of one call in a file: what stands from `start` to `end` becomes `new`."""

    file: str
    line: int
    what: str
    code: str
    start: int
    end: int
    new: str

    def of(self, text: str) -> str:
        """Returns the file's text with the change."""
        return text[: self.start] + self.new + text[self.end :]


def mutants() -> Iterator[Mutant]:
    """Yields every mutant, file by file."""
    for file in CASES:
        text = (ROOT / "kernels" / file).read_text()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tl."):
                where = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
                for what, new in _changes(node):
                    code = " ".join(line.strip() for line in text.splitlines()[node.lineno - 1 : node.end_lineno + 1])
                    yield Mutant(file, node.lineno, what, code, *where, new)


def _changes(call: ast.Call) -> Iterator[tuple[str, str]]:
    name, order = call.func.attr, next((k for k in call.keywords if k.arg == "sem"), None)
    if name == "debug_barrier":
        yield "no barrier", "None"
    elif name.startswith("atomic"):
        for weaker in ORDERS:
            rest = [k for k in call.keywords if k is not order]
            sem = ast.keyword("sem", ast.Constant(weaker))
            yield f"sem={weaker}", ast.unparse(ast.Call(call.func, call.args, [*rest, sem]))
        if order is None:
            yield "left out", "None"
    elif name in ("load", "store") and any(k.arg == "mask" for k in call.keywords):
        rest = [k for k in call.keywords if k.arg not in ("mask", "other")]
        yield "no mask", ast.unparse(ast.Call(call.func, call.args, rest))


def copy(folder: Path) -> None:
    """Copies the package and the tests of its PTX, as they would be installed."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tritondeq", folder / "tritondeq", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "tritondeq" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "ptx", folder / "tests" / "ptx", ignore=ignore)


def run(folder: Path, names: list[str], chip: int, schedules: list[str], known: Path | None = None):
    """Runs cases of a copy, until one finds what `known` has not; returns what they found, None if they do not end."""
    file = folder / "outcomes.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.ptx",
        "--chips",
        str(chip),
        "--json",
        str(file),
        "--cache",
        str(folder / "cache"),
    ]
    command += ["--schedules", *schedules, *(["--until", str(known)] if known else []), "--", *names]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return None
    if not file.exists():
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(file.read_text())


def judge(mutant: Mutant, folder: Path, plain: dict[str, dict], chip: int, schedules: list[str]) -> tuple[str, str]:
    """Returns (verdict, by what) of one mutant; `plain` has what the cases of the package itself found."""
    at, known = folder / "tritondeq" / "kernels" / mutant.file, folder / "known.json"
    text = at.read_text()
    at.write_text(mutant.of(text))
    known.write_text(json.dumps([*plain.values()]))
    try:
        found = run(folder, [*plain], chip, schedules, known)
    finally:
        at.write_text(text)
    if found is None:
        return "caught", "it does not end"
    if found[-1]["new"]:
        return "caught", f"{found[-1]['case']}: {' '.join(found[-1]['new'][0].split())[:110]}"
    if all(outcome["ptx"] == plain[outcome["case"]]["ptx"] for outcome in found):
        return "equivalent", "the PTX of every case is the same"
    for (file, what, code), reason in EXPLAINED.items():
        if (mutant.file, mutant.what) == (file, what) and mutant.code.startswith(code):
            return "explained", reason
    return "SURVIVES", " ".join(outcome["case"] for outcome in found)[:110]


def main() -> int:
    """Prints the table; returns 1 where a mutant survives."""
    parser = argparse.ArgumentParser("python -m tests.ptx.mutations", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of mutants; all where there are none")
    parser.add_argument("--files", nargs="+", default=list(CASES), choices=list(CASES), help="only mutants of these")
    parser.add_argument("--chip", type=int, default=80, help="capability, times ten")
    parser.add_argument("--schedules", nargs="+", default=["lockstep", "1"], help="as of python -m tests.ptx")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args()
    chosen = [(n, one) for n, one in enumerate(mutants()) if n in (args.numbers or [n]) and one.file in args.files]
    if args.list:
        for n, one in chosen:
            print(f"{n} {one.file}:{one.line} {one.what}: {one.code[:100]}")
        return 0
    survive = 0
    with tempfile.TemporaryDirectory(prefix="ptx-mutants-") as name:
        folder = Path(name)
        copy(folder)
        plain = {}
        for file in {one.file for _, one in chosen}:
            found = run(folder, CASES[file], args.chip, args.schedules)
            plain[file] = {outcome["case"]: outcome for outcome in found or []}
            for name, outcome in plain[file].items():
                if outcome["failures"]:
                    print(f"{name} fails without a mutant; what else it finds with one counts", flush=True)
        for n, one in chosen:
            start = time.perf_counter()
            verdict, by = judge(one, folder, plain[one.file], args.chip, args.schedules)
            survive += verdict == "SURVIVES"
            where = f"{one.file}:{one.line}"
            print(
                f"{n:<4}{where:<26}{one.what:<13}{verdict:<11}{time.perf_counter() - start:>5.0f} s  {by}", flush=True
            )
            if verdict == "SURVIVES":
                print(f"      {one.code}", flush=True)
    return bool(survive)


if __name__ == "__main__":
    sys.exit(main())
