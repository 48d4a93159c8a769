"""Launches of kernels, which cost the host less from the second of a kind on.

Triton looks at every argument of a launch, and at every constant that the kernel's module defines, which takes several
times as long as the launch does. Here what was compiled for the same kinds of arguments is launched as it is.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import devices
from .dispatch import interpreting

ALIGNED = 16  # bytes of which Triton wants to know whether an address is a multiple
LONG = 2**31  # from which on an integer takes 64 bits

_compiled: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *first: Any, **named: Any) -> tuple[Any, list]:
    """Launches a kernel on a device, with its first arguments, the others by name, and Triton's options.

    Returns:
        What Triton compiled, or None in its interpreter; and the arguments in the kernel's order.
    """
    given = dict(zip(kernel.arg_names, first, strict=False))
    given |= {name: named.pop(name) for name in kernel.arg_names[len(first) :]}
    with devices.on(device):
        if interpreting():
            return kernel[grid](**given, **named), [*given.values()]
        kinds = (by(value) for by, value in zip(_kinds(kernel), given.values(), strict=True))
        key = (kernel, device, devices.emulated, *named.values(), *kinds)
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = _compiled[key] = kernel[grid](**given, **named)
        else:
            compiled[(*grid, 1, 1)](*given.values())
    return compiled, [*given.values()]


def kind(value: Any) -> Any:
    """Returns all of an argument that what is compiled may depend on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if isinstance(value, tuple):
        return value if set(map(type, value)) == {int} else tuple(map(kind, value))
    return float if isinstance(value, float) else _constant(value)


def _constant(value: Any) -> Any:
    return type(value), value  # True is 1, and another argument


def _unspecialised(value: Any) -> Any:
    return type(value), value < LONG


@cache
def _kinds(kernel: Any) -> list[Any]:
    """Returns for each parameter of a kernel the function of its value that is part of the key."""
    return [_constant if p.is_constexpr else _unspecialised if p.do_not_specialize else kind for p in kernel.params]
