"""Launch parameters of every op: pure functions of the shape, so that a laptop can list and compile all there are."""

import contextlib
from collections.abc import Callable
from functools import cache

import torch

SHARED = 166912  # bytes of shared memory a block can have on sm_80, the least of the chips we aim at
LARGE = 4096  # rows from which throughput matters more than latency
PROGRAMS = {16: 8, 32: 8, 64: 8, 128: 4, 256: 1}  # on one multiprocessor, by width


def affine(*, batch: int, features: int, terms: int, memory: int, shared: int = SHARED) -> dict | None:
    """Of the whole-solve affine op; None where W does not fit in `shared` bytes.

    Few rows in a tile (BLOCK_B) give latency, many give throughput until registers spill: these are the largest tiles
    that don't, as tests/kernels/test_offline.py checks. Where the terms of W don't fit together all but the first are
    streamed (STREAM), BLOCK_K rows at a time.
    """
    block_d = max(16, 1 << (features - 1).bit_length())
    block_k = min(64, block_d)

    def bytes_of(block_b: int, resident: int) -> int:
        tile = 4 * block_b * block_d  # on its way between the layouts of memory and tensor cores
        if resident < terms:
            tile = max(tile, 2 * block_k * (block_d + block_b))
        return 2 * resident * block_d**2 + tile + 1024

    stream = bytes_of(16, terms) > shared
    if stream and bytes_of(16, 1) > shared:
        return None
    block_b = 16
    if batch > LARGE and not memory and not stream:
        large = 32 if block_d == 256 or (block_d == 128 and terms > 1) else 64
        block_b = large if bytes_of(large, terms) <= shared else 16
    warps = {16: 4 if memory else 1, 32: 4 if memory else 1, 64: 4, 128: 8 if memory or block_b == 64 else 4, 256: 8}[
        block_d
    ]
    if block_b == 64:
        warps = max(warps, 4)
    return {
        "BLOCK_B": block_b,
        "BLOCK_D": block_d,
        "BLOCK_K": block_k,
        "STREAM": stream,
        "num_warps": warps,
        "num_stages": 1,
        "programs": PROGRAMS[block_d],
    }


def steps(*, width: int, itemsize: int) -> dict:
    """Of a fused solver step: SPLITS programs share a sample, a function of its width alone, so that a sample's bits do
    not depend on its batch."""
    most = 8192 // itemsize
    block = min(most, max(128, 1 << (width - 1).bit_length()))
    splits = -(-width // block)
    return {"BLOCK_N": block, "SPLITS": splits, "num_warps": max(1, block * itemsize // 1024)}


# Tiles of the output by terms of W, the largest first, each with the depth of a stage and how many are in flight. The
# ones of 256 take the shared memory of sm_90: on sm_80 registers would spill in the loop over the depth.
TILES = {
    1: ((128, 256, 64, 4), (128, 128, 64, 4), (64, 64, 64, 4), (16, 32, 128, 4)),
    2: ((256, 128, 32, 6), (128, 128, 64, 3), (64, 64, 32, 5), (16, 32, 128, 4)),
    3: ((128, 128, 32, 4), (64, 64, 32, 4), (16, 32, 128, 3)),  # of 256 x 128 Triton 3.6 makes nothing on sm_100
}
ENOUGH = 100  # tiles that keep a GPU busy


def affine_steps(*, batch: int, features: int, terms: int, start: bool = False, shared: int = SHARED) -> dict:
    """Of a step of the affine cell with its GEMM: the largest tile that fits in `shared` bytes and of which there are
    ENOUGH, else the smallest. `start` is the first step, whose rows are float32 and split as they come.

    Large tiles read less from L2 for each FLOP, by 1 / BLOCK_M + 1 / (terms BLOCK_N). The epilogue takes them in SUB
    parts, so that no register is spilled, as tests/kernels/test_offline_affine_steps.py checks.
    """
    for block_m, block_n, block_k, stages in TILES[terms][-2:] if start else TILES[terms]:
        stage = block_k * ((4 if start else 2) * block_m + 2 * terms * block_n)
        enough = -(-batch // block_m) * -(-features // block_n) >= ENOUGH
        if enough and stages * stage + block_m * block_n <= shared:  # the latter for a part on its way between layouts
            break
    warps = 8 if block_m * block_n > 64 * 64 else 4
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": 8,
        "SUB": max(1, block_m * block_n // (512 * warps)),  # 16 elements a thread in each
        "num_warps": warps,
        "num_stages": stages,
    }


# What the rule below reckons with, of an H200: FLOP/s of cuBLAS by what the cell multiplies in, bytes/s, the seconds of
# a launch, multiprocessors, and the share of cuBLAS' rate that the kernel reaches.
RATES = {"fp32": 60e12, "tf32": 395e12, "bf16": 790e12}
BANDWIDTH, LAUNCH, PROCESSORS, SHARE = 4.3e12, 2e-6, 132, 0.7


def affine_seconds(*, rows: int, features: int, terms: int, cell: str) -> tuple[float, float]:
    """(of a launch here, of cuBLAS and a fused step after it): a prediction, which no GPU has measured.

    Here: waves of tiles on PROCESSORS, each 2 BLOCK_M BLOCK_N D FLOP a term, or W's bytes if they take longer, then
    22 bytes an element. Apart: 2 B D^2 FLOP in `cell`, a key of RATES, or W's bytes, then 24 bytes an element (z and u
    read, y written; y and z read, z written) and a second launch.
    """
    config = affine_steps(batch=rows, features=features, terms=terms)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    waves = -(-(-(-rows // block_m) * -(-features // block_n)) // PROCESSORS)
    tile = 2 * block_m * block_n * features * terms / (SHARE * RATES["bf16"] / PROCESSORS)
    here = max(waves * tile, 2 * terms * features**2 / BANDWIDTH)
    itemsize = 2 if cell == "bf16" else 4
    apart = max(2 * rows * features**2 / RATES[cell], itemsize * features**2 / BANDWIDTH)
    state = rows * features / BANDWIDTH
    return LAUNCH + here + 22 * state, 2 * LAUNCH + apart + 24 * state


SHAPES: dict[str, Callable[..., dict | None]] = {
    "affine": affine,
    "affine_steps": affine_steps,
    "picard": steps,
    "anderson": steps,
    "broyden": steps,
}


def parameters(op: str, **shape) -> dict | None:
    """Launch parameters of `op` for this shape, `programs` of them on each multiprocessor; None where none would do."""
    return SHAPES[op](**shape)


@cache
def shared_memory(device: torch.device | None) -> int:
    """Bytes of shared memory a block can have on this device."""
    if device is None or device.type != "cuda":
        return SHARED
    told = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    if told is not None:
        return told
    from triton.runtime import driver  # torch 2.6 does not tell

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device):
    """Makes it the device that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
