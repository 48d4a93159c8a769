"""Forward hooks on a block that is iterated: a hook that watches sees one call a solve, one that changes it sees all.

What a hook does is known once it has returned a value. A hook that has not is quiet while a solve evaluates the block,
and sees the one evaluation at the solution. Which of the two is on belongs to the thread, for others may call the same
block; so hooks are wrapped where they lie, and never taken away.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn


@dataclass(eq=False)
class Shown:
    """The call of a block that its hooks see: as the layer of its place, from x to z."""

    block: nn.Module
    x: Tensor
    z: Tensor
    changed: bool = False  # whether a hook, quiet in the solve, returned a value


class _Thread(threading.local):
    def __init__(self) -> None:
        self.shown: Shown | bool = True  # what hooks see: all, nothing, or one call
        self.batch_dims: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of the last injection


HERE = _Thread()


@contextlib.contextmanager
def showing(shown: Shown | bool) -> Iterator[None]:
    """Lets hooks see that; within an evaluation that is hidden, nothing."""
    before = HERE.shown
    HERE.shown = before and shown
    try:
        yield
    finally:
        HERE.shown = before


class _Hook:
    def __init__(self, hook: Any):
        self.hook, self.changes = hook, False

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        shown = HERE.shown
        if self.changes:
            return self.hook(module, args, *rest)
        if shown is False:
            return None
        if isinstance(shown, Shown) and module is shown.block:
            out = (shown.z, *rest[-1][1:]) if isinstance(rest[-1], tuple) else shown.z
            args, rest = (shown.x, *args[1:]), (*rest[:-1], out)
        result = self.hook(module, args, *rest)
        if result is not None:
            self.changes = True
            if isinstance(shown, Shown):
                shown.changed = True
        return result


def watched(block: nn.Module) -> bool:
    """Makes the block's hooks heed `showing`; returns whether any of them watches."""
    watching = False
    for module in block.modules():
        for key, hook in list(module._forward_hooks.items()):
            if not isinstance(hook, _Hook):
                module._forward_hooks[key] = hook = _Hook(hook)
            watching |= not hook.changes
    return watching
