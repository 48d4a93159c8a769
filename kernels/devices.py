"""Properties of the device that kernels are launched on."""

import contextlib
from functools import cache

import torch

SHARED = 166912  # bytes of shared memory that a block can have on sm_80, the least of the chips we aim at


@cache
def gpu(device: torch.device) -> str | None:
    """Returns the name of the GPU, after which its table is named; None of what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@cache
def shared_memory(device: torch.device | None) -> int:
    """Returns the bytes of shared memory that a block can have on this device; sm_80's of what is no GPU."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return SHARED
    size = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    if size is not None:
        return size
    from triton.runtime import driver  # torch 2.6 lacks the property

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def chip(device: torch.device) -> int:
    """Returns ten times the capability of the device, and 90 without a GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many programs run at once at least; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device):
    """Returns a context in which Triton launches on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
