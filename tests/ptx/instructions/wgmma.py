"""Products of a warp group on capability 9.0, which run on while the warps do.

What a product reads of shared memory is read at once, and checked again for races when it is waited for. Its results
come into their registers when it is waited for; until then these count as unset.
"""

import numpy as np

from .. import access, tensor
from ..errors import Fault, Unknown
from ..parse import Immediate
from .matrices import read


class Products:
    """The products of a group of warps that were not waited for.

    Attributes:
        open: What those read that belong to no committed group yet: (addresses, threads) each.
        targets: The registers that they write.
        committed: (reads, registers) of each committed group.
        results: What is to come into each register.
    """

    def __init__(self):
        self.open, self.targets, self.committed, self.results = [], set(), [], {}


def wgmma(program, instruction):
    """A product, the end of a group of products, what waits for groups, or a fence of registers."""
    name = instruction.parts[1]
    if name == "fence":
        return lambda group, mask: _whole(group, mask)
    if name == "commit_group":
        return _commit
    if name == "wait_group":
        if not isinstance(instruction.args[0], Immediate):
            raise Unknown("an operand that has to be a number")
        return _wait(int(instruction.args[0].value))
    return _product(program, instruction)


def _whole(group, mask) -> None:
    if mask is not None:
        raise Fault("wgmma by a part of a warp group")
    if group.products is None:
        group.products = Products()


def _commit(group, mask):
    _whole(group, mask)
    products = group.products
    products.committed.append((products.open, products.targets))
    products.open, products.targets = [], set()


def _wait(left: int):
    def run(group, mask):
        _whole(group, mask)
        products = group.products
        while len(products.committed) > left:
            reads, targets = products.committed.pop(0)
            for addresses, threads in reads:
                _check_read(group, addresses, threads)
            later = products.targets.union(*(registers for _, registers in products.committed))
            for register in targets - later:
                group.put(register, products.results.pop(register), None)

    return run


def _product(program, instruction):
    shape, kind = instruction.parts[4], instruction.parts[6]
    columns, depth = (int(part) for part in shape[4:].split("k"))
    width = tensor.WIDTHS[kind]
    to, left, right, scale, *flags = instruction.args
    if not all(isinstance(flag, Immediate) for flag in flags) or [flag.value for flag in flags[:2]] != [1, 1]:
        raise Unknown("factors other than 1")
    transposed = [bool(flag.value) for flag in flags[2:]]
    in_registers = isinstance(left, list)
    if len(transposed) != (0 if width == 4 else 1 if in_registers else 2):
        raise Unknown("another number of flags")
    transposed = [False] * (2 - len(transposed)) + transposed
    targets, scale = program.targets(to), program.source(scale, "pred")
    a_places, c_places = tensor.a_places(depth, width), tensor.c_places(columns)
    left = [program.source(one, "b32") for one in left] if in_registers else program.source(left, "b64")
    right = program.source(right, "b64")
    if len(targets) != columns // 2 or (in_registers and len(left) != a_places[0].shape[1]):
        raise Unknown("another number of registers")

    def run(group, mask):
        _whole(group, mask)
        products = group.products
        kept, rights, added = group.get(scale), {}, np.zeros((group.warps, 32, len(targets)), np.float32)
        if kept.any():  # else the sum begins here, in registers that may be unset
            held = [products.results[one] if one in products.results else group.get(one) for one in targets]
            added = np.stack(held, 1).reshape(added.shape).view(np.float32)
        out = np.empty_like(added)
        a = tensor.matrix(read(group, left, None), a_places, (16, depth), kind) if in_registers else None
        for warp in range(group.warps):
            thread, first = int(group.threads[32 * warp]), 32 * warp
            bits = int(group.get(right)[first])
            if bits not in rights:
                rights[bits] = _operand(
                    group, tensor.descriptor(bits, columns, depth, transposed[1], width), kind, thread
                )
            if in_registers:
                rows = a[warp]
            else:  # each of four warps has 16 of the 64 rows
                places = tensor.descriptor(int(group.get(left)[first]), 64, depth, transposed[0], width)
                row = 16 * (thread // 32 % 4)
                rows = _operand(group, places[row : row + 16], kind, thread)
            c = np.zeros((16, columns), np.float32)
            if kept[first]:
                c[c_places[0], c_places[1]] = added[warp]
            total = tensor.accumulate(rows, rights[bits].T, c, group.machine.options.truncates)
            out[warp] = total[c_places[0], c_places[1]]
        products.targets |= set(targets)
        for i, target in enumerate(targets):
            products.results[target] = np.ascontiguousarray(out[:, :, i]).view(np.uint32).ravel()
            group.unset[target] = None

    return run


def _operand(group, places: np.ndarray, kind: str, thread: int) -> np.ndarray:
    """Returns the elements that lie at these places of shared memory, in float64, read by a thread's warp."""
    space, width = group.cta.shared, tensor.WIDTHS[kind]
    if places.max() + width > space.size:
        raise Fault(f"a descriptor leads out of shared memory: {int(places.max())} of {space.size}")
    addresses = (np.unique(places >> 3) << 3).astype(np.uint32)
    threads = np.full(len(addresses), thread, np.int32)
    group.products.open.append((addresses, threads))
    _check_read(group, addresses, threads)
    return tensor.decode(space.views[width][places // width], kind)


def _check_read(group, addresses, threads) -> None:
    """Checks reads of 8 bytes by wgmma: between them and a store, a proxy fence has to stand as well as a barrier."""
    space, cta = group.cta.shared, group.cta
    access.watch(group, space, addresses, 8, threads, banks=False)
    if space.shadow is None:
        return
    at = space.granules(addresses, 8).ravel()
    by = space.shadow.thread[at]
    fenced = np.maximum(cta.fenced[np.maximum(by, 0)], cta.fenced[threads[0]])  # either thread's fence will do
    missing = at[(by >= 0) & (space.shadow.time[at] > fenced)]
    for place in missing[space.copied[missing]][:1]:
        # Triton 3.6 relies on it that what cp.async wrote needs no fence, and GPUs bear it out: a note, and no fault.
        before, now = (group.program.steps[s].instruction for s in (int(space.shadow.step[place]), group.step))
        first, second = f"copied by cp.async: {before.text} at {before.place}", f"{now.text} at {now.place}"
        group.machine.note("copy-unfenced read", space, int(place), first, second)
    missing = missing[~space.copied[missing]]
    if len(missing):
        thread, step = int(space.shadow.thread[missing[0]]), int(space.shadow.step[missing[0]])
        stored = group.program.steps[step].instruction.text
        raise Fault(f"wgmma reads what thread {thread} stored without fence.proxy.async: {stored}")
