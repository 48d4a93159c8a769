"""Properties of the device that kernels are launched on."""

import contextlib
from functools import cache

import torch

SHARED = 166912  # bytes of shared memory that a block can have on sm_80, the least of the chips we aim at
LEAST = 80  # the chip from which on kernels run: those before it have no bfloat16
# The chip whose code Triton's driver runs on CPU tensors, which only a driver of the tests does, and its shared memory.
emulated: int | None = None
_EMULATED_SHARED = {80: SHARED, 90: 232448, 100: 232448}


@cache
def gpu(device: torch.device) -> str | None:
    """Returns the name of the GPU, after which its table is named; None of what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def shared_memory(device: torch.device | None) -> int:
    """Returns the bytes of shared memory that a block can have on this device; sm_80's of what is no GPU."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return _EMULATED_SHARED[emulated] if emulated else SHARED
    return _shared_memory(device)


@cache
def _shared_memory(device: torch.device) -> int:
    size = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    if size is not None:
        return size
    from triton.runtime import driver  # torch 2.6 lacks the property

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def chip(device: torch.device) -> int:
    """Returns ten times the capability of the device, and 90 without a GPU."""
    return _chip(device) if device.type == "cuda" else emulated or 90


@cache
def _chip(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def lacks(device: torch.device) -> str | None:
    """Returns why kernels can't run on this device, where it is a GPU, or None."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "this torch is built for ROCm, and the kernels are for CUDA"
    if chip(device) < LEAST:
        return f"the GPU is of capability {chip(device) / 10}, and the kernels need {LEAST / 10} or later"
    return None


def capturing(device: torch.device) -> bool:
    """Returns whether a graph is being captured on the stream that is current on this device."""
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many programs run at once at least; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device):
    """Returns a context in which Triton launches on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
