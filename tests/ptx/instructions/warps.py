"""What lanes of a warp do together."""

import numpy as np

from ..errors import Fault, Unknown
from ..parse import TYPES, Not
from .control import full_mask

_LANES = np.arange(32)
_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def _partners(mode: str, distance, clamp):
    """Returns from which lane each lane takes its value, and whether that lies in range, [warps, 32] each."""
    segment = clamp >> 8 & 31
    limit, first = (_LANES & segment) | (clamp & 31 & ~segment), _LANES & segment
    distance = distance & 31
    if mode == "up":
        lanes = _LANES - distance
    elif mode == "down":
        lanes = _LANES + distance
    elif mode == "bfly":
        lanes = _LANES ^ distance
    else:
        lanes = first | (distance & ~segment)
    inside = lanes >= limit if mode == "up" else lanes <= limit
    return np.where(inside, lanes, _LANES), inside


def shfl(program, instruction):
    """A shuffle. A lane may have nothing to give: Triton 3.6 shuffles what only some lanes have loaded."""
    mode = instruction.parts[2]
    targets = program.targets(instruction.args[0])
    value, distance, clamp = (program.source(one, "b32") for one in instruction.args[1:4])
    full_mask(instruction.args[4])
    if len(targets) > 2:
        raise Unknown(f"{len(targets)} destinations")

    def run(group, mask):
        group.whole(mask)
        by, limits = (group.get(one, mask).astype(np.int64).reshape(group.warps, 32) for one in (distance, clamp))
        lanes, inside = _partners(mode, by, limits)
        taken = np.take_along_axis(group.registers[value].reshape(group.warps, 32), lanes, 1)
        group.put(targets[0], taken.ravel(), mask)
        if len(targets) > 1:
            group.put(targets[1], inside.ravel(), mask)

    return run


def redux(program, instruction):
    """A reduction over the lanes of a warp, which all get it."""
    name, kind = instruction.parts[2:]
    dtype, reduction = TYPES[kind], _REDUCTIONS[name]
    target = program.target(instruction.args[0])
    source, members = (program.source(one, "b32") for one in instruction.args[1:])

    def run(group, mask):
        group.whole(mask)
        if (group.get(members, mask) != 0xFFFFFFFF).any():
            raise Fault("a reduction over a part of a warp")
        values = group.get(source, mask).view(dtype).reshape(group.warps, 32)
        group.put(target, np.repeat(reduction.reduce(values, axis=1, dtype=dtype), 32), mask)

    return run


def vote(program, instruction):
    """A vote of the lanes of a warp; a ballot gives the bits of all."""
    name = instruction.parts[2]
    target = program.target(instruction.args[0])
    operand = instruction.args[1]
    inverted = isinstance(operand, Not)
    source = operand.register if inverted else program.source(operand, "pred")
    full_mask(instruction.args[2])

    def run(group, mask):
        group.whole(mask)
        votes = group.get(source, mask).reshape(group.warps, 32) ^ inverted
        if name == "ballot":
            result = (votes.astype(np.uint64) << _LANES.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"any": votes.any(1), "all": votes.all(1), "uni": votes.all(1) | ~votes.any(1)}[name]
        group.put(target, np.repeat(result, 32), mask)

    return run
