"""Launch parameters of every op: pure functions of the shape, so that a laptop can list and compile all there are, and
what tables that were measured on the GPU at hand (tables.py) choose among those around them (space.py)."""

import contextlib
from collections.abc import Callable
from functools import cache, lru_cache

import torch

from . import space, tables
from .space import (
    GROUP,
    LARGE,
    PROCESSORS,
    ROW,
    SHARED,
    TILES,
    affine_fits,
    affine_tile,
    block,
    power_of_two,
    row_bytes,
    steps_of,
)

FEATURES = 256  # most of an affine cell that one launch holds
PROGRAMS = {16: 8, 32: 8, 64: 8, 128: 4, 256: 1}  # on one multiprocessor, by width


def rows(
    *, batch: int, shapes: list[tuple[int, int]], terms: int, memory: int, shared: int = SHARED, chip: int = 90
) -> dict | None:
    """Of a whole solve row by row, by a cell with weights [out, in] of these shapes; None where they don't fit in
    `shared` bytes.

    Few rows in a tile (BLOCK_B) give latency, many give throughput until registers spill: these are the largest tiles
    that don't, as tests/kernels/test_offline.py checks. 64 rows want the wgmma of sm_90 (`chip`), which does twice the
    work of mma in the same time: with one or two terms they are taken from 128 features on, too, where the rules'
    numbers spill (43 to 80 of 800 to 1500 instructions a step). Where the terms of a
    lone W don't fit together all but the first are streamed (STREAM), BLOCK_K rows at a time. Half a tile idles before
    its lanes take new rows (REFILL): taking them costs about one and a half steps, and at 15 steps a row a tile of 16
    loses least if 7 wait.
    """
    block_d = block(shapes[0][1])
    wide = max(block(n) for shape in shapes for n in shape)
    lone = len(shapes) == 1
    block_k = min(64, block_d)
    stream = lone and row_bytes(shapes, 16, terms, terms) > shared
    if row_bytes(shapes, 16, 1 if stream else terms, terms) > shared:
        return None
    block_b = 16
    if batch > LARGE and lone and not memory and not stream:
        large = (64, 32, 16) if chip // 10 == 9 and (terms < 3 or wide < 128) else (32, 16)
        if wide == 256 and tables.version() == "3.4":
            large = (32, 16)  # Triton 3.4 brings two tiles at a time into the tensor cores' layout
        block_b = next(rows for rows in large if row_bytes(shapes, rows, terms, terms) <= shared)
    few = 4 if memory or not lone else 1
    warps = {16: few, 32: few, 64: 4, 128: 8 if memory or not lone else 4}.get(wide, 8)
    if block_b == 64:
        warps = max(warps, 4)
    return {
        "BLOCK_B": block_b,
        "BLOCK_D": block_d,
        "BLOCK_K": block_k,
        "STREAM": stream,
        "REFILL": block_b // 2,
        "num_warps": warps,
        "num_stages": 1,
        "programs": PROGRAMS.get(wide, 1),
    }


def steps(*, width: int, itemsize: int, features: int = 0) -> dict | None:
    """Of a fused solver step: SPLITS programs share a sample, a function of its width alone, so that a sample's bits do
    not depend on its batch. Where a tail wants rows of `features` a program has whole ones; None where none fits."""
    block = min(8192 // itemsize, max(128, power_of_two(width)))
    if features:
        row = power_of_two(features)
        if row > ROW[itemsize]:
            return None
        block = max(row, min(block, row * power_of_two(width // features)))
    return steps_of(block, width, itemsize, features)


BESIDE = 5  # differences of Anderson whose small system fits in registers beside a program's part of the state


def one_launch(op: str, config: dict, *, itemsize: int, memory: int) -> bool:
    """Whether a step of Anderson or Broyden with these parameters is one launch: a program that has measured a whole
    sample goes on and mixes, where no register is spilled, as tests/kernels/test_offline_steps.py checks."""
    return config["SPLITS"] == 1 and itemsize == 4 and (op != "steps.anderson" or memory <= BESIDE)


def whole_rows(*, features: int) -> dict:
    """Of an op on whole rows: a tile of 1024 elements, or one row; 16 elements a thread."""
    block_d = power_of_two(features)
    block_r = max(1, 1024 // block_d)
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": block_r * block_d // 512}


ENOUGH = 100  # tiles that keep a GPU busy


def affine_steps(*, batch: int, features: int, terms: int, start: bool = False, shared: int = SHARED) -> dict:
    """Of a step of the affine cell with its GEMM: the largest tile that fits in `shared` bytes and of which there are
    ENOUGH, else the smallest. `start` is the first step, whose rows are float32 and split as they come.

    Large tiles read less from L2 for each FLOP, by 1 / BLOCK_M + 1 / (terms BLOCK_N). The epilogue takes them in SUB
    parts, so that no register is spilled, as tests/kernels/test_offline_affine_steps.py checks.
    """
    for tile in TILES[terms][-2:] if start else TILES[terms]:
        if -(-batch // tile[0]) * -(-features // tile[1]) >= ENOUGH and affine_fits(*tile, terms, start, shared):
            break
    return affine_tile(*tile)


def group_norm(*, pixels: int, width: int) -> dict | None:
    """Of GroupNorm, by the pixels and channels of one group; None where the channels of a pixel don't fit a program."""
    block_d = power_of_two(width)
    if block_d > GROUP:
        return None
    block_p = min(GROUP // block_d, power_of_two(pixels))
    warps = min(16, max(1, block_p * block_d // 512))
    return {"BLOCK_P": block_p, "BLOCK_D": block_d, "SPLITS": -(-pixels // block_p), "num_warps": warps}


SHAPES: dict[str, Callable[..., dict | None]] = {
    "rows.affine": rows,
    "rows.mlp": rows,
    "rows.gated": rows,
    "norms.residual_rms": whole_rows,
    "steps.affine": affine_steps,
    "norms.group_norm": group_norm,
    "steps.picard": steps,
    "steps.anderson": steps,
    "steps.broyden": steps,
}


SPACES = {
    rows: space.ROWS,
    steps: space.STEPS,
    whole_rows: space.WHOLE_ROWS,
    affine_steps: space.AFFINE_STEPS,
    group_norm: space.GROUP_NORM,
}


def parameters(op: str, device: torch.device | None = None, **shape) -> dict | None:
    """Launch parameters of `op` for this shape, `programs` of them on each multiprocessor; None where none would do.

    They are the pure function's, but for a device whose tables have a choice for this shape or for the nearest one.
    """
    pure = SHAPES[op]
    if device is None or gpu(device) is None or pure not in SPACES:
        return pure(**shape)
    found = _chosen(op, device, tuple(shape.items()))
    return found and dict(found)


@lru_cache(1024)
def _chosen(op: str, device: torch.device, items: tuple) -> dict | None:
    shape, among = dict(items), SPACES[SHAPES[op]]
    configs = candidates(op, **shape)
    key = among.key(**shape)
    entry = tables.nearest(op, key, among.near, gpu(device), spaces()) if configs else None
    if entry is not None:
        for config in configs:
            if all(config[name] == entry.parameters[name] for name in among.names):
                return config
        if entry.shape == key:
            tables.warn(entry.path, f"{op} at {key} can't take {entry.parameters}")
    return configs[0] if configs else None


def candidates(op: str, **shape) -> list[dict]:
    """The launch parameters among which a measurement may choose: those of the pure function first, then others near
    them, all within the same arithmetic of shared memory; none where the pure function has none."""
    pure = SHAPES[op]
    base = pure(**shape)
    if base is None or pure not in SPACES:
        return [base] if base else []
    found = [base]
    for config in SPACES[pure].around(base, **shape):
        if config not in found:
            found.append(config)
    return found


def spaces() -> dict[str, space.Space]:
    """By op, of those that can be tuned."""
    return {op: SPACES[pure] for op, pure in SHAPES.items() if pure in SPACES}


def reread() -> None:
    """Forgets what the tables said: the next launch reads them again."""
    _chosen.cache_clear()
    tables.forget()


@contextlib.contextmanager
def trial(op: str, shape: dict, config: dict):
    """Launches `op` with this candidate for `shape`, in place of all tables."""
    chosen = {name: config[name] for name in SPACES[SHAPES[op]].names}
    with tables.only(tables.Entry(op, SPACES[SHAPES[op]].key(**shape), chosen)):
        _chosen.cache_clear()
        try:
            yield
        finally:
            _chosen.cache_clear()


@cache
def gpu(device: torch.device) -> tables.Gpu | None:
    """Whose tables a launch on this device looks at; None for what is no GPU."""
    if device.type != "cuda":
        return None
    return tables.Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def too_large(op: str, shapes, terms: int, memory: int, device: torch.device | None) -> str | None:
    """Why weights of these shapes can't be held by a multiprocessor of this device, or None."""
    shared = shared_memory(device)
    if SHAPES[op](batch=1, shapes=shapes, terms=terms, memory=memory, shared=shared):
        return None
    size = 2 * terms * sum(n * m for n, m in shapes)
    of = "" if terms == 1 else f" in {terms} bf16 terms"
    return f"{size} bytes of weights{of} do not fit in {shared} bytes of shared memory"


@cache
def shared_memory(device: torch.device | None) -> int:
    """Bytes of shared memory a block can have on this device."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return SHARED
    told = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    if told is not None:
        return told
    from triton.runtime import driver  # torch 2.6 does not tell

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def chip(device: torch.device) -> int:
    """Ten times its capability, 90 for an H100; of no GPU, that."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def limits(device: torch.device) -> dict[str, int]:
    """What of a device the pure functions ask, where they do."""
    return {"shared": shared_memory(device), "chip": chip(device)}


@cache
def multiprocessors(device: torch.device | None) -> int:
    """How many programs run at once at least: 1 in the interpreter; of a GPU that is not here, an H200's."""
    if device is None or (device.type == "cuda" and not torch.cuda.is_available()):
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device):
    """Makes it the device that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
