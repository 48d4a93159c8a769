"""Tables of measured launch parameters: where they lie, what is believed of them, and how they are written.

A table is a JSON file about one GPU, in the user's cache folder (written by `python -m tritondeq tune`) or shipped in
the package's `tuned` folder:

    {"schema": 1, "gpu": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "entries": [
        {"op": "picard", "shape": {"width": 4096, "itemsize": 4, "features": 0},
         "parameters": {"BLOCK_N": 1024, "num_warps": 4}, "measured": ["picard 64x4096 fp32"], "gain": 1.12,
         "triton": "3.6", "source": "0123456789abcdef", "date": "2026-01-31"}]}

`shape` and `parameters` are as space.py has them. An entry measured with another Triton or on other kernel sources is
stale: it is ignored. What does not fit is a warning, once a file, and is ignored too; launch.py believes an entry only
where it names one of its own candidates.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .space import Space

SCHEMA = 1
MOST_BYTES, MOST_ENTRIES = 1 << 20, 4096
MOST_SIZE = 1 << 40  # of a number in a shape
APART = {"dispatch", "launch", "space", "tables", "reference"}  # modules no kernel is compiled from


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """What was measured for one shape of one op.

    Attributes:
        shape, parameters: As the op's `Space` has them.
        measured: The problems that were timed.
        gain: Time of the pure function's parameters over that of these.
        triton, source: What it was measured with: `version` and `source`.
        path: The file it was read from.
    """

    op: str
    shape: dict[str, Any]
    parameters: dict[str, Any]
    measured: tuple[str, ...] = ()
    gain: float = 1.0
    triton: str = ""
    source: str = ""
    date: str = ""
    path: Path | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple:
        return self.op, tuple(sorted(self.shape.items()))

    @property
    def stale(self) -> bool:
        return self.triton != version() or self.source != source(self.op)


class Table(NamedTuple):
    """What one file says: its entries, stale ones among them, and what is wrong with it, if anything."""

    path: Path
    entries: list[Entry]
    fault: str | None


_only: list[Entry] = []  # of the trial that is going on
_warned: set[Path] = set()


def folder() -> Path:
    """The user's cache folder: $TRITONDEQ_CACHE, else that of the platform.

    Raises:
        OSError: there is no home folder to put it in.
    """
    told = os.environ.get("TRITONDEQ_CACHE")
    if told:
        return Path(told)
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(variable, "")
    try:
        fallback = Path.home() / {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    except RuntimeError as error:
        raise OSError("no home folder is known: set TRITONDEQ_CACHE to a folder that can be written to") from error
    return (Path(base) if os.path.isabs(base) else fallback) / "tritondeq"


def paths(gpu: Gpu) -> list[Path]:
    """The user's table of this GPU and the shipped one, whether they exist or not."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-") + ".json"
    shipped = Path(sys.modules[__package__.rpartition(".")[0]].__file__).parent / "tuned" / name
    with contextlib.suppress(OSError):
        return [folder() / name, shipped]
    return [shipped]


def read(path: Path, gpu: Gpu, spaces: dict[str, Space]) -> Table | None:
    """The table in this file; None where there is no file. Nothing that it says can raise, nor make it wait."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"it is no file of at most {MOST_BYTES} bytes")
        return _table(path, json.loads(path.read_bytes()), gpu, spaces)
    except (OSError, ValueError, RecursionError) as error:
        return Table(path, [], f"{type(error).__name__}: {str(error)[:200]}")


def _table(path: Path, told: Any, gpu: Gpu, spaces: dict[str, Space]) -> Table:
    if not isinstance(told, dict) or told.get("schema") != SCHEMA or not isinstance(told.get("entries"), list):
        raise ValueError(f"it is no table of schema {SCHEMA}")
    if (told.get("gpu"), told.get("capability")) != (gpu.name, list(gpu.capability)):
        raise ValueError(f"it is not about {gpu.name} of capability {list(gpu.capability)}")
    if len(told["entries"]) > MOST_ENTRIES:
        raise ValueError(f"it has more than {MOST_ENTRIES} entries")
    found, faults = {}, []
    for i, one in enumerate(told["entries"]):
        try:
            entry = _entry(path, one, spaces)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"entry {i}: {str(error)[:200]}")
        else:
            found[entry.key] = entry
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return Table(path, list(found.values()), faults[0] + more if faults else None)


def _entry(path: Path, told: Any, spaces: dict[str, Space]) -> Entry:
    names = {"op", "shape", "parameters", "measured", "gain", "triton", "source", "date"}
    if not isinstance(told, dict) or set(told) != names:
        raise ValueError(f"it must have {', '.join(sorted(names))}")
    if told["op"] not in spaces:
        raise ValueError(f"no op {told['op']!r} can be tuned")
    space = spaces[told["op"]]
    shape = {name: _size(value) for name, value in told["shape"].items()}
    parameters = {name: _size(value) for name, value in told["parameters"].items()}
    if set(shape) != set(space.keys) or set(parameters) != set(space.names):
        raise ValueError(f"{told['op']} has {', '.join(space.keys)} and takes {', '.join(space.names)}")
    strings = [told["triton"], told["source"], told["date"], *told["measured"]]
    if not isinstance(told["measured"], list) or not all(isinstance(one, str) for one in strings):
        raise ValueError("triton, source and date must be strings, and measured a list of them")
    gain = told["gain"]
    if type(gain) not in (int, float) or not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive number, got {gain!r}")
    of = {name: told[name] for name in ("op", "gain", "triton", "source", "date")}
    return Entry(shape=shape, parameters=parameters, measured=tuple(told["measured"]), path=path, **of)


def _size(value: Any, depth: int = 0) -> Any:
    """A size, a flag, or a tuple of tuples of them."""
    if isinstance(value, list) and depth < 2 and len(value) <= 8:
        return tuple(_size(one, depth + 1) for one in value)
    if type(value) not in (int, bool) or not 0 <= value <= MOST_SIZE:
        raise ValueError(f"takes integers from 0 to {MOST_SIZE}, got {str(value)[:40]!r}")
    return value


@cache
def _read_all(gpu: Gpu, ops: tuple) -> tuple[Entry, ...]:
    """All that is believed, the user's before what is shipped."""
    found: dict[tuple, Entry] = {}
    for path in paths(gpu):
        table = read(path, gpu, dict(ops))
        if table is None:
            continue
        if table.fault:
            warn(path, table.fault)
        for entry in table.entries:
            if not entry.stale:
                found.setdefault(entry.key, entry)
    return tuple(found.values())


def nearest(op: str, key: dict, near: tuple[str, ...], gpu: Gpu, spaces: dict[str, Space]) -> Entry | None:
    """The entry whose shape is nearest to `key`, by the ratios of the sizes `near`, with all else in it equal; None
    where a size is not between measured ones, nor within a factor of 2 of them."""
    fit = []
    for entry in _only or _read_all(gpu, tuple(spaces.items())):
        if entry.op == op and all(
            _form(entry.shape[name]) == _form(key[name]) if name in near else entry.shape[name] == key[name]
            for name in key
        ):
            fit.append((entry, _sizes([entry.shape[name] for name in near])))
    wanted = _sizes([key[name] for name in near])
    for i, size in enumerate(wanted):
        measured = [sizes[i] for _, sizes in fit]
        if not measured or not min(measured) / 2 <= size <= 2 * max(measured):
            return None
    return min(fit, key=lambda one: sum(abs(math.log2(a / b)) for a, b in zip(one[1], wanted, strict=True)))[0]


def _form(value: Any) -> Any:
    """How numbers are nested in it, and which are 0, which is near to no other."""
    return tuple(map(_form, value)) if isinstance(value, tuple) else value == 0


def _sizes(value: Any) -> list[int]:
    """The numbers in it, one after the other."""
    return [n for one in value for n in _sizes(one)] if isinstance(value, list | tuple) else [max(value, 1)]


def warn(path: Path | None, fault: str) -> None:
    """Says once of each file what is wrong with it."""
    if path not in _warned:
        _warned.add(path)
        message = f"{path}: {fault}; what it says of that is ignored. `python -m tritondeq tune --fresh` writes it anew"
        warnings.warn(message, stacklevel=2)


def forget() -> None:
    """The next launch reads the tables again."""
    _read_all.cache_clear()
    _warned.clear()


@contextlib.contextmanager
def only(entry: Entry) -> Iterator[None]:
    """As if this entry were all that is known."""
    _only[:] = [entry]
    try:
        yield
    finally:
        _only.clear()


@cache
def version() -> str:
    """Triton's, as far as measurements depend on it; empty where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return ".".join(triton.__version__.split(".")[:2])


@cache
def source(op: str) -> str:
    """A hash of the files that this op's kernels are made of: its own, and what that imports of this folder."""
    found, left = {}, [op]
    while left:
        name = left.pop()
        path = Path(__file__).with_name(f"{name}.py")
        if name in found or name in APART or not path.exists():
            continue
        found[name] = path.read_text(encoding="utf-8")
        left += re.findall(r"^from \.(\w+) import", found[name], re.M)
        for names in re.findall(r"^from \. import (.+)$", found[name], re.M):
            left += re.findall(r"\w+", names)
    text = "\0".join(f"{name}\0{found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(gpu: Gpu, entry: Entry, spaces: dict[str, Space]) -> Path:
    """Adds an entry to the user's table, in place of the one of its shape, and says where that is.

    Whoever reads meanwhile finds the old table or the new one, and two that write at once lose nothing.

    Raises:
        OSError: it can't be written.
    """
    path = folder() / paths(gpu)[0].name
    with locked(path):
        old = read(path, gpu, spaces)
        kept = {one.key: one for one in old.entries} if old else {}
        kept[entry.key] = replace(entry, path=None)
        told = [{name: value for name, value in asdict(one).items() if name != "path"} for one in kept.values()]
        table = {"schema": SCHEMA, "gpu": gpu.name, "capability": gpu.capability, "entries": told}
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(_lines(table))
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    return path


def _lines(table: dict) -> str:
    """JSON with a line for each entry, so that a table can be reviewed."""
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    head = json.dumps({name: value for name, value in table.items() if name != "entries"})
    return f'{head[:-1]}, "entries": [\n{entries}\n]}}\n'


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else writes this file; the lock goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as file:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
