"""Launches of kernels, which cost the host less from the second of a kind on.

Triton looks at every argument of a launch, and at every constant that the kernel's module defines, which takes several
times as long as the launch does. Here what was compiled for the same kinds of arguments is launched as it is.
"""

from typing import Any

import torch
from torch import Tensor

from . import devices
from .dispatch import interpreting

ALIGNED = 16  # bytes of which Triton wants to know whether an address is a multiple
LONG = 2**31  # from which on an integer takes 64 bits

_known: dict[int, "_Known"] = {}  # by the id of the kernel: its own hash takes a look at its source


class Constants:
    """The last arguments of a kernel, which are constants, and Triton's options: made once for many launches."""

    def __init__(self, kernel: Any, **named: Any):
        first = len(kernel.arg_names) - len(named.keys() & set(kernel.arg_names))
        self.given = tuple(map(named.pop, kernel.arg_names[first:]))
        self.options = named


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *first: Any,
    constants: Constants | None = None,
    **named: Any,
) -> tuple[Any, list]:
    """Launches a kernel on a device, with its first arguments, and the others and Triton's options by name.

    `constants` may stand for what has a name: then nothing of it is looked at again.

    Returns:
        What Triton compiled, or None in its interpreter; and the arguments in the kernel's order.
    """
    if constants is None:
        given, options = [*first, *map(named.pop, kernel.arg_names[len(first) :])], named
    else:
        given, options = [*first, *constants.given], constants.options
    with devices.on(device):
        if interpreting():
            return kernel[grid](**_by_name(kernel, given), **options), given
        known = _known.get(id(kernel)) or _known.setdefault(id(kernel), _Known(kernel))
        key = device, devices.emulated, known.kinds(given), constants or (*options.values(), *known.constant(given))
        compiled = known.compiled.get(key)
        if compiled is None:
            compiled = known.compiled[key] = kernel[grid](**_by_name(kernel, given), **options)
        else:
            compiled[(*grid, 1, 1)](*given)
    return compiled, given


def kind(value: Any) -> Any:
    """Returns all of an argument that what is compiled may depend on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if isinstance(value, tuple):
        return value if set(map(type, value)) == {int} else tuple(map(kind, value))
    return float if isinstance(value, float) else (type(value), value)  # True is 1, and another argument


def _by_name(kernel: Any, given: list[Any]) -> dict[str, Any]:
    return dict(zip(kernel.arg_names, given, strict=True))


class _Known:
    """What has been compiled of a kernel, by the kinds of its arguments."""

    def __init__(self, kernel: Any):
        self.kernel, self.compiled = kernel, dict[Any, Any]()
        places: tuple[list[int], ...] = ([], [], [])
        for i, parameter in enumerate(kernel.params):
            places[0 if parameter.is_constexpr else 2 if parameter.do_not_specialize else 1].append(i)
        self.constants, self.looked_at, self.counts = places

    def constant(self, given: list[Any]) -> tuple[Any, ...]:
        """Returns the constants among these arguments."""
        constants = tuple([given[i] for i in self.constants])
        return tuple(map(type, constants)), constants

    def kinds(self, given: list[Any]) -> tuple[Any, ...]:
        """Returns the kinds of the others, of which two are equal only where Triton would compile the same."""
        return (
            *[kind(given[i]) for i in self.looked_at],
            *[(type(given[i]), given[i] < LONG) for i in self.counts],
        )
