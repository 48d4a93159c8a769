"""Barriers of a warp, fences and traps."""

import numpy as np

from ..errors import Fault, Unknown
from ..parse import Immediate


def full_mask(operand) -> None:
    """Raises Unknown unless an operand is the mask of all lanes."""
    if not isinstance(operand, Immediate) or operand.value & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Unknown("a mask of lanes other than -1")


def bar_warp(program, instruction):
    """A barrier of a warp."""
    full_mask(instruction.args[0])

    def run(group, mask):
        group.machine.time += 1
        warps = (group.threads[0] >> 5) + np.flatnonzero(group.whole(mask))
        group.cta.warp_synced[warps] = group.machine.time

    return run


def fence(program, instruction):
    """A fence between what threads stored and what wgmma reads."""

    def run(group, mask):
        group.cta.fenced[group.active(mask)] = group.machine.time

    return run


def trap(program, instruction):
    """An assertion of the kernel that failed."""

    def run(group, mask):
        raise Fault("a trap: an assertion of the kernel failed")

    return run
