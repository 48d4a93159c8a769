"""Launch parameters of every op.

Each op has a pure function of its shape, named in SHAPES. Its upper-case keywords and `num_warps` are the tunable
choices, whose values TUNABLE lists; the function derives all else from them and from the shape, and returns None where
they do not fit. A choice can so make a launch slow, but never wrong. It comes from `override`, else from the table that
`python -m tritondeq tune` wrote for the GPU, else from the function itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Any

import torch

from . import devices, tables
from .devices import SHARED
from .dispatch import interpreting, triton_version

FEATURES = 256  # most of an affine cell that one launch holds
PROGRAMS = {16: 8, 32: 8, 64: 8, 128: 4, 256: 1}  # on one multiprocessor, by width
GROUP = 8192  # values that one program of group_norm holds
ROW = {4: 4096, 8: 1024}  # most elements of a row that a program of a fused step holds, by bytes of an element
WIDE = 32768  # elements of a sample from which a fused step has many programs alike
SPLIT = 128  # widest weights that each program of a whole solve splits into bf16 terms by itself
LARGE = 4096  # rows above which throughput matters more than latency
BESIDE = 5  # differences of Anderson whose small system fits in registers beside a program's part of the state
ENOUGH = 100  # tiles that keep a GPU busy

# Tiles of the affine steps by terms of W, the largest first: rows, columns, depth of a stage, stages in flight.
TILES = {
    1: ((128, 256, 64, 4), (128, 128, 64, 4), (64, 64, 64, 4), (16, 32, 128, 4)),
    2: ((256, 128, 32, 6), (128, 128, 64, 3), (64, 64, 32, 5), (16, 32, 128, 4)),
    3: ((128, 128, 32, 4), (64, 64, 32, 4), (16, 32, 128, 3)),
}
MORE_TILES = ((64, 128, 32, 4), (32, 64, 64, 4), (16, 64, 64, 4))  # that only a measurement picks


def cdiv(n: int, size: int) -> int:
    """Returns how many parts of this size hold n; triton.cdiv is a jitted function, which costs the host 5 us."""
    return -(-n // size)


@cache
def power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@cache
def block(width: int) -> int:
    """Returns the least power of two that holds this width and that a dot can take."""
    return max(16, power_of_two(width))


def row_bytes(shapes, block_b: int, resident: int, terms: int) -> int:
    """Returns the bytes of shared memory of a whole solve with `block_b` rows and `resident` terms of its weights."""
    block_d = block(shapes[0][1])
    tile = 4 * block_b * max(block(n) for shape in shapes for n in shape)  # on its way to the tensor cores' layout
    if resident < terms:
        tile = max(tile, 2 * min(64, block_d) * (block_d + block_b))
    return 2 * resident * sum(block(n) * block(m) for n, m in shapes) + tile + 1024


def can_stream() -> bool:
    """Returns whether Triton compiles whole solves that read terms from memory; its interpreter takes them all."""
    return triton_version() >= (3, 5) or interpreting()


def rows(
    *, batch, shapes, terms, memory, shared=SHARED, chip=90, BLOCK_B=None, STREAM=None, num_warps=None
) -> dict | None:
    """Parameters of a whole solve, row by row.

    Few rows in a tile give latency; many give throughput until registers spill. Tiles of 64 rows want the wgmma of
    sm_90, which does twice the work of mma in the same time. Where not all bf16 terms of a lone weight fit in shared
    memory, all but the first are streamed, BLOCK_K rows at a time. A tile takes new rows when half of its lanes are
    idle (REFILL): that costs about one and a half steps, and at 15 steps a row a tile of 16 loses least near there.

    Of `batch` only the side of LARGE matters. `shapes` are those of the weights, (out, in), each held in `terms` bf16
    terms; `memory` is Anderson's, 0 for Picard; `shared` is in bytes, and `chip` ten times the capability. A tile has
    BLOCK_B rows; with STREAM all terms but the first are streamed.
    """
    block_d = block(shapes[0][1])
    wide = max(block(n) for shape in shapes for n in shape)
    lone = len(shapes) == 1
    if STREAM is None:
        STREAM = lone and row_bytes(shapes, 16, terms, terms) > shared
    if STREAM and not can_stream():
        return None
    resident = 1 if STREAM else terms
    if BLOCK_B is None:
        BLOCK_B = 16
        if batch > LARGE and lone and not memory and not STREAM:
            large = (64, 32) if chip // 10 == 9 and (terms < 3 or wide < 128) else (32,)
            if wide == 256 and triton_version() == (3, 4):
                large = (32,)  # Triton 3.4 brings two tiles at a time into the tensor cores' layout
            BLOCK_B = next((rows for rows in large if row_bytes(shapes, rows, terms, terms) <= shared), 16)
    few = 4 if memory or not lone else 1
    warps = {16: few, 32: few, 64: 4, 128: 8 if memory or not lone else 4}.get(wide, 8)
    if BLOCK_B == 64:  # wgmma is of 4 warps
        warps = max(warps, 4)
    streams = lone and terms > 1 or not STREAM
    holds = BLOCK_B < 64 or (lone and not memory and (num_warps or warps) >= 4)
    if not (streams and holds and row_bytes(shapes, BLOCK_B, resident, terms) <= shared and _near(num_warps, warps)):
        return None
    tile = {"BLOCK_B": BLOCK_B, "BLOCK_D": block_d, "BLOCK_K": min(64, block_d), "STREAM": STREAM}
    tile["SPLIT"] = wide <= SPLIT and not STREAM
    programs, stages = PROGRAMS.get(wide, 1), 1 if memory else 2  # where terms are streamed; Anderson has no registers
    return tile | {"REFILL": BLOCK_B // 2, "num_warps": num_warps or warps, "num_stages": stages, "programs": programs}


def steps(*, width, itemsize, features=0, BLOCK_N=None, num_warps=None) -> dict | None:
    """Parameters of a fused solver step on samples of `width` elements of `itemsize` bytes.

    SPLITS programs of BLOCK_N elements share a sample. With `features` they hold whole rows of so many elements.
    """
    base = min(8192 // itemsize, max(128, power_of_two(width)))
    row = power_of_two(features) if features else 0
    if row > ROW[itemsize]:
        return None
    if features:
        base = max(row, min(base, max(128, row * power_of_two(width // features))))
    if BLOCK_N is None:
        BLOCK_N = base
    elif not max(row, 128, base // 4) <= BLOCK_N <= min(16384 // itemsize, 2 * base):
        return None
    elif BLOCK_N >= 2 * (width // features * row if features else width):
        return None
    warps = max(1, BLOCK_N * itemsize // 1024)
    if not _near(num_warps, warps):
        return None
    splits = -(-(width // features) // (BLOCK_N // row)) if features else -(-width // BLOCK_N)
    return {"BLOCK_N": BLOCK_N, "SPLITS": splits, "num_warps": num_warps or warps}


def one_launch(op: str, config: dict, *, itemsize: int, memory: int) -> bool:
    """Returns whether a step of Anderson or Broyden with these parameters is one launch.

    A program that has measured a whole sample goes on and mixes, where no register is spilled.
    """
    return config["SPLITS"] == 1 and itemsize == 4 and (op != "steps.anderson" or memory <= BESIDE)


def whole_rows(*, features, BLOCK_R=None, num_warps=None) -> dict | None:
    """Parameters of an op on whole rows: BLOCK_R of them in a program, by default 1024 elements or one row."""
    block_d = power_of_two(features)
    base = max(1, 1024 // block_d)
    if BLOCK_R is None:
        BLOCK_R = base
    warps = max(1, BLOCK_R * block_d // 512)
    if not (base <= 2 * BLOCK_R <= 8 * base and _near(num_warps, warps)):
        return None
    return {"BLOCK_R": BLOCK_R, "BLOCK_D": block_d, "num_warps": num_warps or warps}


def samples(*, features) -> dict | None:
    """Parameters of an op on whole samples, of which a solve has one; nothing to tune, it is short beside the solve."""
    return whole_rows(features=features)


def affine_steps(*, batch, features, terms, start=False, shared=SHARED, TILE=None, num_warps=None) -> dict | None:
    """Parameters of a step of the affine cell with its GEMM.

    By default TILE is the largest that fits and of which there are ENOUGH, else the smallest: large tiles read less
    from L2 for each FLOP, by 1 / BLOCK_M + 1 / (terms BLOCK_N). The epilogue takes a tile in SUB parts, so that no
    register is spilled. `start` is the first step, whose rows are float32 and are split into terms as they are read.
    """

    def fits(m: int, n: int, k: int, stages: int) -> bool:
        return stages * k * ((4 if start else 2) * m + 2 * terms * n) + m * n <= shared

    if TILE is None:
        for TILE in TILES[terms][-2:] if start else TILES[terms]:
            if -(-batch // TILE[0]) * -(-features // TILE[1]) >= ENOUGH and fits(*TILE):
                break
    elif not fits(*TILE) or (start and TILE[0] > 64) or (terms == 3 and TILE[0] * TILE[1] > 128 * 128):
        return None
    m, n, k, stages = TILE
    warps = num_warps or (8 if m * n > 64 * 64 else 4)
    if warps not in (4, 8):
        return None
    sub = max(1, m * n // (512 * warps))  # 16 elements a thread in each
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_stages": stages}
    return tile | {"GROUP": 8, "SUB": sub, "num_warps": warps}


def group_norm(*, pixels, width, BLOCK_P=None, num_warps=None) -> dict | None:
    """Parameters of GroupNorm on groups of `pixels` by `width` channels, BLOCK_P pixels in a program."""
    block_d = power_of_two(width)
    if block_d > GROUP:
        return None
    base = min(GROUP // block_d, power_of_two(pixels))
    if BLOCK_P is None:
        BLOCK_P = base
    elif not base <= 4 * BLOCK_P <= 8 * base or BLOCK_P >= 2 * pixels:
        return None
    warps = min(16, max(1, BLOCK_P * block_d // 512))
    if not _near(num_warps, warps):
        return None
    return {"BLOCK_P": BLOCK_P, "BLOCK_D": block_d, "SPLITS": -(-pixels // BLOCK_P), "num_warps": num_warps or warps}


def _near(chosen: int | None, warps: int) -> bool:
    """Returns whether a chosen number of warps is within a factor of 2 of the usual one."""
    return chosen is None or warps <= 2 * chosen <= 4 * warps


SHAPES: dict[str, Callable[..., dict | None]] = {
    **dict.fromkeys(("rows.affine", "rows.mlp", "rows.gated"), rows),
    **dict.fromkeys(("steps.picard", "steps.anderson", "steps.broyden"), steps),
    "steps.affine": affine_steps,
    **dict.fromkeys(("norms.residual", "norms.unit"), samples),
    "norms.residual_rms": whole_rows,
    "norms.group_norm": group_norm,
}

_WARPS = (1, 2, 4, 8, 16)
TUNABLE: dict[Callable, dict[str, tuple]] = {
    rows: {"BLOCK_B": (16, 32, 64), "STREAM": (False, True), "num_warps": _WARPS},
    steps: {"BLOCK_N": tuple(128 << i for i in range(6)), "num_warps": _WARPS},
    samples: {},
    whole_rows: {"BLOCK_R": tuple(1 << i for i in range(13)), "num_warps": _WARPS},
    group_norm: {"BLOCK_P": tuple(1 << i for i in range(15)), "num_warps": _WARPS},
    affine_steps: {"TILE": tuple(dict.fromkeys((*sum(TILES.values(), ()), *MORE_TILES))), "num_warps": _WARPS},
}


def key(op: str, **shape) -> dict[str, Any]:
    """Returns what a choice for this shape may depend on.

    It holds no more of the batch than the pure function uses, so that a sample's bits do not depend on its batch.
    """
    pure = SHAPES[op]
    shared = shape.pop("shared", SHARED)
    if pure is rows:
        sizes, terms, memory = tuple(map(tuple, shape["shapes"])), shape["terms"], shape["memory"]
        two = len(sizes) == 1 and not memory and row_bytes(sizes, 16, terms, terms) <= shared  # tiles, by the batch
        batch = LARGE + 1 if two and shape["batch"] > LARGE else 1
        return {"batch": batch, "shapes": sizes, "terms": terms, "memory": memory}
    if pure is steps:
        return {"features": 0} | shape | {"width": min(shape["width"], WIDE)}
    return {"start": False} | shape if pure is affine_steps else shape


def candidates(op: str, **shape) -> list[dict[str, Any]]:
    """Returns the choices that fit this shape, the pure function's, {}, first; none where it has none."""
    values = TUNABLE[SHAPES[op]]
    choices = [{}, *(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))]
    configs = [SHAPES[op](**shape, **choice) for choice in choices]
    if configs[0] is None:
        return []
    return [choices[i] for i, config in enumerate(configs) if config is not None and config not in configs[:i]]


def parameters(op: str, device: torch.device | None = None, **shape) -> dict | None:
    """Returns the launch parameters of `op` for this shape on this device, or None where none would do.

    They are those of the override in force, else of the device's table, else of the pure function, as they are where a
    choice does not fit.
    """
    if device is not None and _recorded is not None:
        _recorded.append((op, shape))
    for name, choice, at in reversed(_overrides):
        if name == op and (at is None or at == key(op, **shape)):
            return _configured(op, choice, shape)
    config = _usual(op, None if device is None else devices.gpu(device), tuple(shape.items()), can_stream())
    return config and dict(config)


def _configured(op: str, choice: dict, shape: dict) -> dict | None:
    tunable = TUNABLE[SHAPES[op]].keys()
    chosen = {name: choice[name] for name in tunable & choice.keys()}
    config = SHAPES[op](**shape, **chosen) or SHAPES[op](**shape)
    return config and config | {name: value for name, value in choice.items() if name not in tunable}


@lru_cache(1024)
def _usual(op: str, name: str | None, items: tuple, streams: bool) -> dict | None:
    """Returns the parameters for a shape without overrides; `name` is the GPU's, where there is a table to look in."""
    shape, tunable = dict(items), TUNABLE[SHAPES[op]]
    if name is None:
        return SHAPES[op](**shape)
    entry = tables.nearest(name, op, key(op, **shape))
    known = entry is not None and all(value in tunable.get(part, ()) for part, value in entry.choice.items())
    return _configured(op, entry.choice if known else {}, shape)


def reread() -> None:
    """Makes the next launch read the tables again."""
    _usual.cache_clear()
    tables.entries.cache_clear()


# Backward passes on CUDA run in a thread of autograd, so that these two are the process's and not a thread's.
_overrides: list[tuple[str, dict, dict | None]] = []
_recorded: list[tuple[str, dict]] | None = None


@contextlib.contextmanager
def override(op: str, choice: dict[str, Any], at: dict[str, Any] | None = None) -> Iterator[None]:
    """Launches `op` with this choice in place of the table's, in all threads, until the block ends.

    `choice` has values of tunable parameters, from which the pure function derives the others; further constants, such
    as REFILL, replace those of the result. Other shapes than those of the `key` `at` are left alone.
    """
    _overrides.append((op, choice, at))
    try:
        yield
    finally:
        _overrides.remove((op, choice, at))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yields a list that gets (op, shape) of every launch, of all threads, until the block ends; it does not nest."""
    global _recorded
    _recorded = asked = []
    try:
        yield asked
    finally:
        _recorded = None


def too_large(op: str, shapes, terms: int, memory: int, device: torch.device | None) -> str | None:
    """Returns why weights of these shapes can't be held by a multiprocessor of this device, or None."""
    shared, sizes = devices.shared_memory(device), tuple(map(tuple, shapes))
    problem = {"batch": 1, "shapes": sizes, "terms": terms, "memory": memory, "shared": shared}
    if _usual(op, None, tuple(problem.items()), can_stream()):
        return None
    size = 2 * terms * sum(n * m for n, m in shapes)
    split = "" if terms == 1 else f" in {terms} bf16 terms"
    return f"{size} bytes of weights{split} do not fit in {shared} bytes of shared memory"
