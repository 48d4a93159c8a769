"""Tables of measured launch parameters: where they lie, which entries are taken, and how they are written.

A table is a JSON file about one GPU, in the user's cache folder:

    {"schema": 2, "gpu": "NVIDIA H100 80GB HBM3", "made": "triton 3.8, kernels 0123456789abcdef", "entries": [
      {"op": "steps.picard", "key": {"features": 0, "width": 4096, "itemsize": 4},
       "choice": {"BLOCK_N": 1024, "num_warps": 4}, "gain": 1.12, "measured": ["any 64x4096 fp32 Picard"],
       "date": "2026-01-31"}]}

A table of another GPU, another Triton or other kernels, or one that can't be read, is ignored with one warning.
"""

import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = 2
NEAR = {"batch", "features", "pixels", "shapes", "width"}  # sizes of a key, of which the nearest will do


@dataclass(frozen=True)
class Entry:
    """The choice of tunable parameters for a `launch.key` of an op; empty where the pure function's were the fastest.

    `gain` is the time with the pure function's parameters over that with these, `measured` the workloads that were
    timed, and `date` the day, as YYYY-MM-DD.
    """

    op: str
    key: dict[str, Any]
    choice: dict[str, Any]
    gain: float
    measured: list[str]
    date: str

    def __post_init__(self):
        """Turns the lists of JSON into tuples; raises TypeError where a field is of another kind."""
        if not all(map(isinstance, vars(self).values(), (str, dict, dict, int | float, list, str))):
            raise TypeError(f"a field of another kind in {self}")
        for name in ("key", "choice"):
            object.__setattr__(self, name, {part: _sizes(value) for part, value in getattr(self, name).items()})


def _sizes(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_sizes, value))
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no size")
    return value


def path(gpu: str) -> Path:
    """Returns the file of this GPU's table, in $TRITONDEQ_CACHE or else in tritondeq/ of the user's cache folder.

    Raises:
        FileNotFoundError: There is no home folder to put it in; the message is a sentence.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("TRITONDEQ_CACHE") or f"{base}/tritondeq"
    try:
        return Path(folder).expanduser() / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")
    except RuntimeError as error:
        message = "no home folder is known: set TRITONDEQ_CACHE to a folder that can be written to"
        raise FileNotFoundError(message) from error


def read(gpu: str) -> tuple[list[Entry], str | None]:
    """Returns the entries of this GPU's table, and what is wrong with it, beginning with its path, or None."""
    try:
        file = path(gpu)
        table = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.get("schema") != SCHEMA:
            return [], f"{file} is no table of schema {SCHEMA}"
        if table.get("gpu") != gpu:
            return [], f"{file} is not about {gpu}"
        if table.get("made") != made():
            return [], f"{file} was made with {table.get('made')}, and this is {made()}"
        return [Entry(**entry) for entry in table["entries"]], None
    except (FileNotFoundError, NotADirectoryError):
        return [], None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return [], f"{file} is damaged ({type(error).__name__}: {str(error)[:200]})"


@cache
def entries(gpu: str) -> list[Entry]:
    """Returns the entries that launches take, none where the table has a fault, of which it warns."""
    known, fault = read(gpu)
    if fault:
        warnings.warn(f"{fault}: it is ignored. `python -m tritondeq tune` writes it anew", stacklevel=2)
    return known


def nearest(gpu: str, op: str, key: dict[str, Any]) -> Entry | None:
    """Returns the entry of this op whose key is nearest.

    All sizes in NEAR must be within a factor of 2 of the key's, and all else equal; None where no entry is.
    """
    distances = [(_distance(one.key, key), i) for i, one in enumerate(entries(gpu)) if one.op == op]
    least, i = min(distances, default=(math.inf, 0))
    return None if least == math.inf else entries(gpu)[i]


def _distance(a: Any, b: Any) -> float:
    """Returns how many factors of two lie between two keys; infinite where one may not stand for the other."""
    if a == b:
        return 0.0
    if isinstance(a, dict):
        same = a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - NEAR)
        return sum(_distance(a[name], b[name]) for name in a) if same else math.inf
    if isinstance(a, tuple) and isinstance(b, tuple):
        return sum(map(_distance, a, b)) if len(a) == len(b) else math.inf
    near = isinstance(a, int) and isinstance(b, int) and 0 < a <= 2 * b <= 4 * a
    return abs(math.log2(a / b)) if near else math.inf


def made() -> str:
    """Returns what a measurement depends on: the version of Triton, and a hash of the kernels' sources."""
    try:
        import triton
    except ImportError:
        return "no triton"
    root, sources = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        sources.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"triton {'.'.join(triton.__version__.split('.')[:2])}, kernels {sources.hexdigest()[:16]}"


def write(gpu: str, entry: Entry) -> Path:
    """Adds an entry to this GPU's table in place of the one of its key, and returns the file.

    A reader finds the old table or the new one; of two processes that write at the same moment the last one wins. A
    table with a fault is begun anew.

    Raises:
        OSError: It can't be written.
    """
    file = path(gpu)
    table = [one for one in read(gpu)[0] if (one.op, one.key) != (entry.op, entry.key)]
    lines = ",\n".join(f"  {json.dumps(asdict(one))}" for one in [*table, entry])
    head = json.dumps({"schema": SCHEMA, "gpu": gpu, "made": made()})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(f'{head[:-1]}, "entries": [\n{lines}\n]}}\n', encoding="utf-8")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    return file


def summary(gpu: str) -> str:
    """Returns one line about the table of this GPU: its file, and how many choices are in force or why none is."""
    known, fault = read(gpu)
    if fault:
        return f"{fault}: it is ignored. `python -m tritondeq tune` writes it anew"
    if not known:
        return "no table: pure functions of the shape. `python -m tritondeq tune` measures"
    return f"{path(gpu)}: {len(known)} choices, the last of {max(entry.date for entry in known)}"
