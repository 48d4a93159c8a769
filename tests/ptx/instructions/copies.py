"""Asynchronous copies from global to shared memory.

What a copy reads at once is there for certain only after it was waited for. Until then the memory counts as never
written; what stands in it is the copy or, always so without a seed, all ones.
"""

import numpy as np

from .. import access
from ..errors import Fault, Unknown
from ..parse import Immediate


def cp_async(program, instruction):
    """A copy, the end of a group of copies, or what waits for groups."""
    if instruction.parts[2] == "commit_group":
        return _commit
    if instruction.parts[2] == "wait_all":
        return _wait(0, everything=True)
    if instruction.parts[2] == "wait_group":
        return _wait(_number(instruction.args[0]))
    return _copy(program, instruction)


def _number(operand) -> int:
    if not isinstance(operand, Immediate):
        raise Unknown("an operand that has to be a number")
    return int(operand.value)


def _commit(group, mask):
    _all_threads(group, mask)
    group.copy_groups.append(group.copies)
    group.copies = []


def _all_threads(group, mask):
    if mask is not None and not (mask if group.live is None else mask | ~group.live).all():
        raise Fault("only some of the threads commit copies or wait for them, which the emulator can't tell apart")


def _wait(left: int, everything: bool = False):
    def run(group, mask):
        _all_threads(group, mask)
        if everything:
            group.copy_groups.append(group.copies)
            group.copies = []
        while len(group.copy_groups) > left:
            for addresses, values, threads in group.copy_groups.pop(0):
                access.store(group, True, addresses, values, threads, copy=True)

    return run


def _copy(program, instruction):
    to, source, size, *used = instruction.args
    to, source, size = program.address(to, "b32"), program.address(source, "b64"), _number(size)
    if size not in ((16,) if "cg" in instruction.parts else (4, 8, 16)):
        raise Unknown(f"a copy of {size} bytes")
    used = program.source(used[0], "b32") if used else None

    def run(group, mask):
        targets, sources, threads = group.address(to, mask), group.address(source, mask), group.active(mask)
        access.aligned(sources, size)
        which = np.arange(len(targets))
        if used is not None:  # how many bytes are read; the others are zeros
            read = group.get(used, mask) if mask is None else group.get(used, mask)[mask]
            if not np.isin(read, (0, size)).all():
                raise Fault(f"a copy of {size} bytes of which some are read: the emulator takes none or all")
            which = np.flatnonzero(read)
        values = np.zeros((len(targets), size // 4), np.uint32)
        if len(which):
            values[which] = access.load(group, False, sources[which], 4, size // 4, threads[which])
        machine, space = group.machine, group.cta.shared
        access.store(group, True, targets, values, threads, copy=True)
        if machine.options.seed is None or machine.random.random() < 0.5:
            access.store(group, True, targets, np.full_like(values, 0xFFFFFFFF), threads, copy=True)
        space.written[space.granules(targets, size)] = False
        group.copies.append((targets, values, threads))

    return run
