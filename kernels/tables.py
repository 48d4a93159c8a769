"""Tables of measured launch parameters: where they lie, which entries are taken, and how they are written.

A table is a JSON file about one GPU, in the user's cache folder:

    {"schema": 2, "gpu": "NVIDIA H100 80GB HBM3", "made": "triton 3.8, kernels 0123456789abcdef", "entries": [
      {"op": "steps.picard", "key": {"features": 0, "width": 4096, "itemsize": 4},
       "choice": {"BLOCK_N": 1024, "num_warps": 4}, "gain": 1.12, "measured": ["any 64x4096 fp32 Picard"],
       "date": "2026-01-31"}]}

`key` and `choice` are those of launch.py; an empty choice is the pure function's. A table of another GPU, another
Triton or other kernels, or one that can't be read, is ignored with one warning. launch.py takes an entry only where
its choice fits the shape.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: of two that write at once the last one wins
    fcntl = None  # type: ignore[assignment]

SCHEMA = 2
NEAR = {"batch", "features", "pixels", "shapes", "width"}  # sizes of a key, of which the nearest will do


@dataclass(frozen=True)
class Entry:
    """The choice of tunable parameters for one key of one op.

    Attributes:
        op: Name of the op.
        key: The `launch.key` of its shape.
        choice: Their values; empty where none was faster than the pure function's.
        gain: Time with the pure function's parameters over time with these.
        measured: The workloads that were timed.
        date: The day, as YYYY-MM-DD.
    """

    op: str
    key: dict[str, Any]
    choice: dict[str, Any]
    gain: float
    measured: list[str]
    date: str

    def __post_init__(self):
        """Turns the lists of JSON into tuples; raises TypeError where a field is of another kind."""
        kinds = {"op": str, "key": dict, "choice": dict, "gain": int | float, "measured": list, "date": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} of an entry is {str(getattr(self, name))[:40]!r}")
        for name in ("key", "choice"):
            object.__setattr__(self, name, {size: _sizes(value) for size, value in getattr(self, name).items()})


def _sizes(value: Any) -> Any:
    """Returns an integer, a bool or a nested tuple of them."""
    if isinstance(value, list | tuple):
        return tuple(map(_sizes, value))
    if type(value) not in (int, bool):
        raise TypeError(f"a size of an entry is {str(value)[:40]!r}")
    return value


def folder() -> Path:
    """Returns the user's cache folder: $TRITONDEQ_CACHE, else the platform's.

    Raises:
        OSError: there is no home folder to put it in.
    """
    chosen = os.environ.get("TRITONDEQ_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        fallback = Path.home() / {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    except RuntimeError as error:
        raise OSError("no home folder is known: set TRITONDEQ_CACHE to a folder that can be written to") from error
    return (Path(base) if os.path.isabs(base) else fallback) / "tritondeq"


def path(gpu: str) -> Path:
    """Returns the file of this GPU's table, whether it exists or not; raises as `folder` does."""
    return folder() / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def read(gpu: str) -> tuple[list[Entry], str | None]:
    """Returns the entries of this GPU's table, and what is wrong with it or None; raises as `folder` does."""
    file = path(gpu)
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return [], None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8
        return [], f"is damaged ({error})"
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or table.get("schema") != SCHEMA:
            return [], f"is no table of schema {SCHEMA}"
        if table.get("gpu") != gpu:
            return [], f"is not about {gpu}"
        if table.get("made") != made():
            return [], f"was made with {table.get('made')}, and this is {made()}"
        return [Entry(**entry) for entry in table["entries"]], None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return [], f"is damaged ({type(error).__name__}: {str(error)[:200]})"


@cache
def _entries(gpu: str) -> list[Entry]:
    """Returns the entries that launches take; warns of a table that is ignored."""
    try:
        entries, fault = read(gpu)
    except OSError:  # no home folder, so no table
        return []
    if fault:
        message = f"{path(gpu)} {fault}: it is ignored. `python -m tritondeq tune` writes it anew"
        warnings.warn(message, stacklevel=2)
    return entries


def forget() -> None:
    """Makes the next launch read the tables again."""
    _entries.cache_clear()
    made.cache_clear()


def nearest(gpu: str, op: str, key: dict[str, Any]) -> Entry | None:
    """Returns the entry of this op whose key is nearest.

    All sizes in NEAR must be within a factor of 2 of the key's, and all else equal; None where no entry is.
    """
    distances = {i: _distance(entry.key, key) for i, entry in enumerate(_entries(gpu)) if entry.op == op}
    best = min(distances, key=distances.__getitem__, default=None)
    return None if best is None or distances[best] == math.inf else _entries(gpu)[best]


def _distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    total = 0.0
    for name in a.keys() | b.keys():
        ours, theirs = _flat(a.get(name)), _flat(b.get(name))
        if ours == theirs:
            continue
        if name not in NEAR or len(ours) != len(theirs) or min(ours + theirs) <= 0:
            return math.inf
        for x, y in zip(ours, theirs, strict=True):
            total += abs(math.log2(x) - math.log2(y)) if x <= 2 * y <= 4 * x else math.inf
    return total


def _flat(value: Any) -> list[int]:
    if isinstance(value, tuple):
        return [number for one in value for number in _flat(one)]
    return [] if value is None else [value]


@cache
def made() -> str:
    """Returns what a measurement depends on: the version of Triton, and a hash of the kernels' sources."""
    try:
        import triton
    except ImportError:
        return "no triton"
    root = Path(__file__).parent
    sources = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        sources.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"triton {'.'.join(triton.__version__.split('.')[:2])}, kernels {sources.hexdigest()[:16]}"


def write(gpu: str, entry: Entry) -> Path:
    """Adds an entry to this GPU's table in place of the one of its key, and returns the file.

    A reader finds the old table or the new one. Two processes that write at once lose nothing, except on Windows,
    where the last one wins. A table that `read` finds wrong is begun anew.

    Raises:
        OSError: it can't be written.
    """
    file = path(gpu)
    with _locked(file):
        entries = [one for one in read(gpu)[0] if (one.op, one.key) != (entry.op, entry.key)]
        lines = ",\n".join(f"  {json.dumps(asdict(one))}" for one in [*entries, entry])
        head = json.dumps({"schema": SCHEMA, "gpu": gpu, "made": made()})
        handle, new = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".new")
        try:
            with open(handle, "w", encoding="utf-8") as out:
                out.write(f'{head[:-1]}, "entries": [\n{lines}\n]}}\n')
            os.replace(new, file)
        except BaseException:
            os.unlink(new)
            raise
    return file


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Waits until no other process writes this table; the lock goes with the process that holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def summary(gpu: str) -> str:
    """Returns one line about the table of this GPU: its file, and how many choices are in force or why none is."""
    try:
        entries, fault = read(gpu)
    except OSError as error:
        return f"no table: {error}"
    if fault:
        return f"{path(gpu)} {fault}: it is ignored. `python -m tritondeq tune` writes it anew"
    if not entries:
        return "no table: pure functions of the shape. `python -m tritondeq tune` measures"
    return f"{path(gpu)}: {len(entries)} choices, the last of {max(entry.date for entry in entries)}"
