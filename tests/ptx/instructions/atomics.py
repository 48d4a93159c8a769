"""Atomics."""

import numpy as np

from .. import access
from ..errors import Unknown
from ..parse import TYPES
from ..steps import YIELD
from .moves import in_shared, order_of, spread

_OPERATIONS = {
    "add": lambda old, given: old + given,
    "max": max,
    "min": min,
    "and": lambda old, given: old & given,
    "or": lambda old, given: old | given,
    "xor": lambda old, given: old ^ given,
    "exch": lambda old, given: given,
    "cas": lambda old, expected, given: given if old == expected else old,
    "inc": lambda old, most: old * 0 if old >= most else old + type(old)(1),
    "dec": lambda old, most: most if old == 0 or old > most else old - type(old)(1),
}


def atom(program, instruction):
    """An atomic of one element, thread by thread: in their order, or in a random one if the seed is random."""
    name, kind = instruction.parts[-2:]
    dtype, operation, shared = TYPES[kind], _OPERATIONS[name], in_shared(instruction)
    semantics, scope = order_of(instruction)
    to, where, *sources = [None] * (instruction.parts[0] == "red") + instruction.args
    target = program.target(to)
    where = program.address(where, "b32" if shared else "b64")
    sources = [program.source(source, kind) for source in sources]
    if any(program.widths[source].itemsize != dtype.itemsize for source in sources):
        raise Unknown("operands of other widths")

    def run(group, mask):
        addresses, threads = group.address(where, mask), group.active(mask)
        given = [group.get(source, mask).view(dtype) for source in sources]
        given = given if mask is None else [one[mask] for one in given]
        places = _places(group, shared, addresses, dtype, threads)
        out = np.zeros(len(addresses), dtype)
        order = list(range(len(addresses)))
        if group.machine.options.seed is not None:
            group.machine.random.shuffle(order)
        for i in order:
            view, at = places[i]
            old = out[i] = view[at]
            view[at] = operation(old, *(one[i] for one in given))
            if not shared and scope != "cta":
                _order(group.cta, semantics, int(threads[i]), int(addresses[i]))
            group.machine.idle = 0 if view[at] != old else group.machine.idle + 1
        group.machine.report.bytes["atomics"] += dtype.itemsize * len(addresses)
        if target is not None:
            group.put(target, out if mask is None else spread(out, mask), mask)
        return YIELD

    return run


def _places(group, shared, addresses, dtype, threads):
    """Checks an atomic's accesses; returns (view of the memory, index) of each."""
    size = dtype.itemsize
    access.aligned(addresses, size)
    if shared:
        access.within(group.cta.shared, addresses, size)
        parts = [(group.cta.shared, slice(None))]
    else:
        parts = group.machine.memory.parts(addresses, size)
    places = {}
    for space, which in parts:
        own = addresses[which]
        access.watch(group, space, own, size, threads[which], write=True, strong=True)
        view, index = space.views[size].view(dtype), space.index(own, size, 1)[:, 0]
        numbers = np.arange(len(addresses))[which]
        places |= {int(number): (view, int(at)) for number, at in zip(numbers, index, strict=True)}
    group.machine.time += 1
    return places


def _order(cta, semantics: str, thread: int, address: int) -> None:
    if semantics in ("acq_rel", "acquire"):
        cta.acquire(thread, address)
    if semantics in ("acq_rel", "release"):
        cta.release(thread, address)
