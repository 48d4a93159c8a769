"""Loads and stores of a group's threads, with all that is checked of them."""

import numpy as np

from .errors import Fault
from .memory import Space
from .shadow import Shadow
from .tensor import conflicts


def load(group, shared: bool, addresses, width: int, count: int, threads, strong: bool = False) -> np.ndarray:
    """Returns what threads load: bits of `count` elements of `width` bytes each, [accesses, count].

    Args:
        group: The group of the threads.
        shared: Whether from shared memory, else from global memory.
        addresses: Where from, [accesses], uint32 of shared and uint64 of global memory.
        width: Bytes of an element.
        count: Elements of an access.
        threads: Which thread makes each access, [accesses].
        strong: Whether the load is relaxed or acquires, and so does not race with atomics.

    Raises:
        Fault: An access is misaligned or out of bounds, or reads shared memory that was not written.
    """
    size = width * count
    aligned(addresses, size)
    if shared:
        space = group.cta.shared
        within(space, addresses, size)
        watch(group, space, addresses, size, threads, strong=strong)
        return space.views[width][space.index(addresses, width, count)]
    out = np.empty((len(addresses), count), f"u{width}")
    for space, which in group.machine.memory.parts(addresses, size):
        own = addresses[which]
        out[which] = space.views[width][space.index(own, width, count)]
        watch(group, space, own, size, threads[which], strong=strong)
    _count(group, "global read", addresses, size)
    return out


def store(group, shared: bool, addresses, values, threads, strong: bool = False, copy: bool = False) -> None:
    """Stores bits, [accesses, count] of the unsigned dtype of an element's width; as `load` besides.

    Args:
        copy: Whether cp.async stores.
    """
    width, count = values.dtype.itemsize, values.shape[1]
    aligned(addresses, width * count)
    if shared:
        space = group.cta.shared
        within(space, addresses, width * count)
        _store(group, space, addresses, values, threads, strong)
        space.copied[space.granules(addresses, width * count)] = copy
        return
    _count(group, "global written", addresses, width * count)
    group.machine.idle = 0
    for space, which in group.machine.memory.parts(addresses, width * count):
        _store(group, space, addresses[which], values[which], threads[which], strong)


def _count(group, name: str, addresses, size: int) -> None:
    """Counts the bytes of one instruction; those that several threads access count once if Options.counts."""
    accesses = len(np.unique(addresses)) if group.machine.options.counts else len(addresses)
    group.machine.report.bytes[name] += size * accesses


def _store(group, space, addresses, values, threads, strong):
    view, at = space.views[values.dtype.itemsize], space.index(addresses, values.dtype.itemsize, values.shape[1])
    watched = group.machine.options.races != "off"
    same = (view[at] == values).all(1) if watched else None
    view[at] = values
    if watched:
        _check_lanes(group, space, view, at, addresses, values, threads)
    watch(
        group, space, addresses, values.dtype.itemsize * values.shape[1], threads, write=True, same=same, strong=strong
    )


def _check_lanes(group, space, view, at, addresses, values, threads):
    """Notes threads of one instruction that store different values to one place; if the seed is random, any wins."""
    kept = view[at]
    clash = kept != values
    if not clash.any():
        return
    if values.dtype.itemsize == 4:  # a GPU has one NaN
        kept, given = (np.ascontiguousarray(x).view(np.float32) for x in (kept, values))
        clash &= ~(np.isnan(kept) & np.isnan(given))
    clash = np.flatnonzero(clash.any(1))
    if not len(clash):
        return
    machine, lost = group.machine, clash[0]
    if machine.options.seed is not None:
        order = np.array(machine.random.sample(range(len(addresses)), len(addresses)))
        view[at[order]] = values[order]
    won = np.flatnonzero(addresses == addresses[lost])[-1]
    place = space.granules(addresses[lost : lost + 1], values.dtype.itemsize)[0, :1]
    cta, step = group.cta.number, group.step
    machine.race("write-write", space, place, cta, threads[lost], step, cta, threads[won], step, one_instruction=True)


def aligned(addresses, size: int) -> None:
    """Raises a Fault unless all addresses are multiples of `size`, a power of two."""
    if (addresses & addresses.dtype.type(size - 1)).any():
        raise Fault(f"misaligned: an address is no multiple of {size}")


def within(space: Space, addresses, size: int) -> None:
    """Raises a Fault unless all accesses of `size` bytes lie within this shared memory."""
    if len(addresses) and int(addresses.max()) + size > space.size:
        raise Fault(f"out of bounds: byte {int(addresses.max())} of {space.size} of shared memory")


def watch(group, space, addresses, size, threads, *, write=False, same=None, strong=False, banks=True) -> None:
    """Checks accesses that are aligned and within bounds: whether memory was written, races, conflicts of banks.

    Args:
        group: The group of the threads.
        space: What they access.
        addresses: Where, [accesses].
        size: Bytes of an access.
        threads: Which thread makes each, [accesses].
        write: Whether they write.
        same: Of writes, which of them change nothing, [accesses].
        strong: Whether they are atomics, or strong accesses.
        banks: Whether they go through the banks one by one.
    """
    options, shared = group.machine.options, space.written is not None
    races = options.races != "off"
    if not (races or shared) or not len(addresses):
        return
    at = space.granules(addresses, size)
    if shared:
        if write:
            space.written[at] = True
        elif options.uninit and not space.written[at].all():
            bad = at[~space.written[at]]
            raise Fault(f"reads shared memory that was never written: granule {int(bad[0])} of {space.granule} bytes")
        if banks and options.counts:
            group.machine.report.conflicts[size] += conflicts(addresses, size, threads)
    if not races:
        return
    machine, cta = group.machine, group.cta
    if space.shadow is None:
        space.shadow = Shadow(-(-space.size // space.granule) + 1, 1 if shared else machine.ctas)
    machine.time += 1
    each = at.shape[1]

    def report(kind, places, ctas, earlier, steps, own):
        machine.race(kind, space, places, ctas, earlier, steps, cta.number, own, group.step)

    space.shadow.check(
        at.ravel(), threads if each == 1 else np.repeat(threads, each), cta, machine.time, group.step, write, strong,
        same if same is None or each == 1 else np.repeat(same, each), report,
    )  # fmt: skip
