"""What launch parameters may be: the spaces around the pure functions of launch.py, which list what may be tuned.

A measured table (tables.py) can only choose among these, so it can make a launch slow, and not wrong. What a choice may
depend on is its `key`: no more than the pure function's own parameters do where they decide a sample's bits, so that
measuring changes rounding from one machine to another and never from one batch to another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

SHARED = 166912  # bytes of shared memory a block can have on sm_80, the least of the chips we aim at
GROUP = 8192  # values that one program of group_norm holds at most
ROW = {4: 4096, 8: 1024}  # most elements of a row that a program of a fused solver step holds, by their size
WIDE = 32768  # elements of a sample from which a fused solver step's programs are many
LARGE = 4096  # rows from which throughput matters more than latency
WARPS = 16  # most of a program

# Tiles of the output by terms of W, the largest first, each with the depth of a stage and how many are in flight. The
# ones of 256 take the shared memory of sm_90: on sm_80 registers would spill in the loop over the depth.
TILES = {
    1: ((128, 256, 64, 4), (128, 128, 64, 4), (64, 64, 64, 4), (16, 32, 128, 4)),
    2: ((256, 128, 32, 6), (128, 128, 64, 3), (64, 64, 32, 5), (16, 32, 128, 4)),
    3: ((128, 128, 32, 4), (64, 64, 32, 4), (16, 32, 128, 3)),  # of 256 x 128 Triton 3.6 makes nothing on sm_100
}
MORE_TILES = ((64, 128, 32, 4), (32, 64, 64, 4), (16, 64, 64, 4))  # that only a measurement picks
PROCESSORS = 132  # multiprocessors of an H200


def power_of_two(n: int) -> int:
    """Least that is no less."""
    return 1 << (n - 1).bit_length()


def block(width: int) -> int:
    """Least power of two that holds it, and that a dot can take."""
    return max(16, power_of_two(width))


def row_bytes(shapes, block_b: int, resident: int, terms: int) -> int:
    """Shared memory of a whole solve row by row, with so many terms of its weights [out, in] resident."""
    block_d = block(shapes[0][1])
    tile = 4 * block_b * max(block(n) for shape in shapes for n in shape)  # on its way to the tensor cores' layout
    if resident < terms:
        tile = max(tile, 2 * min(64, block_d) * (block_d + block_b))
    return 2 * resident * sum(block(n) * block(m) for n, m in shapes) + tile + 1024


def steps_of(block: int, width: int, itemsize: int, features: int) -> dict:
    """Launch parameters of a fused solver step with programs of `block` columns."""
    rows = block // power_of_two(features) if features else 0
    splits = -(-(width // features) // rows) if features else -(-width // block)
    return {"BLOCK_N": block, "SPLITS": splits, "num_warps": max(1, block * itemsize // 1024)}


def affine_tile(
    block_m: int, block_n: int, block_k: int, stages: int, warps: int | None = None, group: int = 8
) -> dict:
    """Launch parameters of a step with its GEMM, for this tile."""
    warps = warps or (8 if block_m * block_n > 64 * 64 else 4)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": group,
        "SUB": max(1, block_m * block_n // (512 * warps)),  # 16 elements a thread in each
        "num_warps": warps,
        "num_stages": stages,
    }


def affine_fits(block_m: int, block_n: int, block_k: int, stages: int, terms: int, start: bool, shared: int) -> bool:
    stage = block_k * ((4 if start else 2) * block_m + 2 * terms * block_n)
    return stages * stage + block_m * block_n <= shared  # the latter for a part on its way between layouts


@dataclass(frozen=True)
class Space:
    """What can be chosen for one pure function.

    Attributes:
        names: Parameters that are chosen; the others follow from them and from the shape.
        keys: Names in the key.
        key: A shape as far as a choice may depend on it; itself a shape that the pure function takes.
        near: Sizes in the key, of which the nearest will do; the rest of it has to be equal.
        around: (parameters of the pure function, **shape) -> others for that shape.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    key: Callable[..., dict]
    near: tuple[str, ...]
    around: Callable[..., Iterator[dict]]


def _warps(*numbers: float) -> list[int]:
    return sorted({int(n) for n in numbers if 1 <= n <= WARPS})


def _near_warps(warps: int) -> list[int]:
    return _warps(warps / 2, warps, 2 * warps)


def _rows_key(*, batch, shapes, terms, memory, shared=SHARED, **chip) -> dict:
    """A row's bits are the same in batches of all sizes, or of those on one side of LARGE where the pure function has
    two tiles. Anderson with 1 or 3 differences takes what 2 or 4 do, which want more registers."""
    shapes = tuple(tuple(shape) for shape in shapes)
    two = len(shapes) == 1 and not memory and row_bytes(shapes, 16, terms, terms) <= shared
    batch = LARGE + 1 if two and batch > LARGE else 1
    return {"batch": batch, "shapes": shapes, "terms": terms, "memory": memory + memory % 2}


def _rows(base: dict, *, batch, shapes, terms, memory, shared=SHARED, **chip) -> Iterator[dict]:
    lone = len(shapes) == 1
    tiles = [16, 32, 64] if lone and not memory else [16, 32]
    for block_b, stream in product(tiles, [False, True] if lone and terms > 1 else [False]):
        if row_bytes(shapes, block_b, 1 if stream else terms, terms) > shared:
            continue
        for warps in _near_warps(base["num_warps"]):
            if block_b < 64 or warps >= 4:
                yield base | {"BLOCK_B": block_b, "STREAM": stream, "REFILL": block_b // 2, "num_warps": warps}
    for programs in _warps(base["programs"] / 2, 2 * base["programs"]):
        yield base | {"programs": programs}
    for refill in (base["BLOCK_B"] // 4, 3 * base["BLOCK_B"] // 4):
        yield base | {"REFILL": refill}


def _steps(base: dict, *, width: int, itemsize: int, features: int = 0) -> Iterator[dict]:
    least = power_of_two(features) if features else 128
    padded = width // features * least if features else max(width, least)
    for scale in (0.25, 0.5, 1, 2):
        block_n = int(base["BLOCK_N"] * scale)
        if least <= block_n <= 16384 // itemsize and block_n < 2 * padded:
            for warps in _near_warps(block_n * itemsize / 1024):
                yield steps_of(block_n, width, itemsize, features) | {"num_warps": warps}


def _whole_rows(base: dict, *, features: int) -> Iterator[dict]:
    for scale in (0.5, 1, 2, 4):
        block_r = int(base["BLOCK_R"] * scale)
        if block_r:
            for warps in _near_warps(block_r * base["BLOCK_D"] / 512):
                yield base | {"BLOCK_R": block_r, "num_warps": warps}


def _affine_steps(base: dict, *, batch, features, terms, start=False, shared=SHARED) -> Iterator[dict]:
    own = base["BLOCK_M"], base["BLOCK_N"], base["BLOCK_K"], base["num_stages"]
    tiles = TILES[terms][-2:] if start else TILES[terms] + MORE_TILES
    for tile in tiles:
        for warps in _warps(4, 8) if affine_fits(*tile, terms, start, shared) else []:
            yield affine_tile(*tile, warps)
    for stages in (own[3] - 1, own[3] + 1):
        if stages > 1 and affine_fits(*own[:3], stages, terms, start, shared):
            yield affine_tile(*own[:3], stages)
    for group in (4, 16):
        yield affine_tile(*own, group=group)


def _group_norm(base: dict, *, pixels: int, width: int) -> Iterator[dict]:
    for scale in (0.25, 0.5, 1, 2):
        block_p = int(base["BLOCK_P"] * scale)
        if 1 <= block_p < 2 * pixels and block_p * base["BLOCK_D"] <= 2 * GROUP:
            for warps in _near_warps(block_p * base["BLOCK_D"] / 512) or [1]:
                yield base | {"BLOCK_P": block_p, "SPLITS": -(-pixels // block_p), "num_warps": warps}


def _itself(**shape) -> dict:
    return shape


def _steps_key(*, width, itemsize, features=0) -> dict:
    """Samples of WIDE elements or more are many programs alike, and share a choice."""
    return {"width": min(width, WIDE), "itemsize": itemsize, "features": features}


def _affine_key(*, batch, features, terms, start=False, **shared) -> dict:
    return {"batch": batch, "features": features, "terms": terms, "start": start}


ROWS = Space(
    names=("BLOCK_B", "STREAM", "REFILL", "num_warps", "programs"),
    keys=("batch", "shapes", "terms", "memory"),
    key=_rows_key,
    near=("shapes",),
    around=_rows,
)
STEPS = Space(("BLOCK_N", "num_warps"), ("width", "itemsize", "features"), _steps_key, ("width", "features"), _steps)
WHOLE_ROWS = Space(("BLOCK_R", "num_warps"), ("features",), _itself, ("features",), _whole_rows)
AFFINE_STEPS = Space(
    names=("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages"),
    keys=("batch", "features", "terms", "start"),
    key=_affine_key,
    near=("batch", "features"),
    around=_affine_steps,
)
GROUP_NORM = Space(("BLOCK_P", "num_warps"), ("pixels", "width"), _itself, ("pixels", "width"), _group_norm)
