"""Launch parameters of every op: pure functions of the shape, so that a laptop can list and compile all there are."""

import contextlib
from collections.abc import Callable
from functools import cache

import torch

SHARED = 166912  # bytes of shared memory a block can have on sm_80, the least of the chips we aim at


def affine(*, batch: int, features: int, terms: int, memory: int, adjoint: bool, shared: int = SHARED) -> dict | None:
    """Of the whole-solve affine op; None where W does not fit in shared memory.

    Rows in a tile (BLOCK_B) trade latency for throughput, until registers spill. Terms of W that do not stay in shared
    memory are streamed (STREAM), BLOCK_K of their rows at a time.
    """
    block_d = max(16, 1 << (features - 1).bit_length())
    wide = block_d == 256
    block_b = 16
    if not memory and batch > 4096:
        block_b = 32 if wide else 64
    tile = 2 * block_b * block_d + 2048  # the increment on its way to the tensor cores, and the row sums
    resident = terms
    if terms * 2 * block_d**2 + tile > shared:
        resident = 1
    stream = resident < terms
    block_k = 32
    if resident * 2 * block_d**2 + tile + stream * 2 * block_k * (block_d + block_b) > shared:
        return None
    warps = 8 if wide or block_b == 64 else 4
    return dict(
        BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_K=block_k, STREAM=stream, num_warps=warps, num_stages=1, programs=1
    )


SHAPES: dict[str, Callable[..., dict | None]] = {"affine": affine}


def parameters(op: str, **shape) -> dict | None:
    """Launch parameters of `op` for this shape; None where it can't be launched."""
    return SHAPES[op](**shape)


@cache
def shared_memory(device: torch.device | None) -> int:
    """Bytes of shared memory a block can have on this device."""
    if device is None or device.type != "cuda":
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device):
    """Makes it the device that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
