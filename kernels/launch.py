"""Launch parameters of every op: pure functions of the shape, so that a laptop can list and compile all there are."""

import contextlib
from collections.abc import Callable
from functools import cache

import torch

SHARED = 166912  # bytes of shared memory a block can have on sm_80, the least of the chips we aim at
GROUP = 8192  # values that one program of group_norm holds at most
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


def group_norm(*, pixels: int, width: int) -> dict | None:
    """Of GroupNorm, by the pixels and channels of one group; None where the channels of a pixel don't fit a program."""
    block_d = 1 << (width - 1).bit_length()
    if block_d > GROUP:
        return None
    block_p = min(GROUP // block_d, 1 << (pixels - 1).bit_length())
    warps = min(16, max(1, block_p * block_d // 512))
    return {"BLOCK_P": block_p, "BLOCK_D": block_d, "SPLITS": -(-pixels // block_p), "num_warps": warps}


SHAPES: dict[str, Callable[..., dict | None]] = {"affine": affine, "group_norm": group_norm}
SHAPES |= {"picard": steps, "anderson": steps, "broyden": steps}


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
