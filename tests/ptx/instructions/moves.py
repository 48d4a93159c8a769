"""Moves, loads and stores."""

import numpy as np

from .. import access
from ..errors import Unknown
from ..parse import TYPES, Address, Special
from ..steps import YIELD


def mov(program, instruction):
    """A move; with a vector on one side, registers are taken apart or joined, the first in the lowest bits."""
    kind = instruction.parts[-1]
    size = TYPES[kind].itemsize
    to, source = instruction.args
    targets = program.targets(to)
    if isinstance(to, list):
        part = _part(size, to)
        register = program.source(source, kind)

        def run(group, mask):
            parts = group.registers[register].view(part).reshape(group.size, len(targets))
            for i, target in enumerate(targets):
                group.put(target, np.ascontiguousarray(parts[:, i]), mask)

    elif isinstance(source, list):
        part = _part(size, source)
        registers = [program.source(one, f"b{8 * part.itemsize}") for one in source]
        if any(program.widths[register] != part for register in registers):
            raise Unknown("parts of other widths")

        def run(group, mask):
            parts = np.stack([group.registers[register] for register in registers], 1)
            group.put(targets[0], parts.view(f"u{size}").ravel(), mask)

    else:
        register = program.source(source, kind)
        run = lambda group, mask: group.put(targets[0], group.registers[register], mask)  # noqa: E731
    return run


def _part(size: int, vector: list) -> np.dtype:
    if size % len(vector) or size // len(vector) not in (1, 2, 4):
        raise Unknown(f"{len(vector)} parts of {size} bytes")
    return np.dtype(f"u{size // len(vector)}")


def order_of(instruction) -> tuple[str | None, str | None]:
    """Returns how an access orders others, and for whom: such as "acquire" and "gpu"; None where it doesn't."""
    semantics = next((p for p in instruction.parts if p in ("acq_rel", "acquire", "release", "relaxed")), None)
    scope = next((p for p in instruction.parts if p in ("cta", "gpu", "sys")), None)
    return semantics, scope


def in_shared(instruction) -> bool:
    """Returns whether an instruction accesses shared memory, and not global memory."""
    return any(part in ("shared", "shared::cta") for part in instruction.parts)


def ld(program, instruction):
    """A load of a parameter, or of one or more elements from memory; signed ones extend to wider registers."""
    kind = instruction.parts[-1]
    dtype, shared = TYPES[kind], in_shared(instruction)
    to, source = instruction.args
    targets = _vector(program.targets(to), instruction)
    if "param" in instruction.parts:
        return _parameter(program, targets, source, dtype)
    semantics, scope = order_of(instruction)
    source = program.address(source, "b32" if shared else "b64")
    kept = dtype if dtype.kind == "i" else np.dtype(f"u{dtype.itemsize}")

    def run(group, mask):
        addresses, threads = group.address(source, mask), group.active(mask)
        strong = semantics is not None
        out = access.load(group, shared, addresses, dtype.itemsize, len(targets), threads, strong)
        if semantics == "acquire" and scope != "cta":
            for address, thread in zip(addresses.tolist(), threads.tolist(), strict=True):
                group.cta.acquire(thread, address)
        for i, target in enumerate(targets):
            column = np.ascontiguousarray(out[:, i]).view(kept)
            group.put(target, column if mask is None else spread(column, mask), mask)
        if strong:
            group.machine.idle += 1
            return YIELD

    return run


def spread(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns an array of the mask's size with the values where it is true."""
    out = np.zeros(len(mask), values.dtype)
    out[mask] = values
    return out


def _parameter(program, targets, source, dtype):
    known = dict(program.kernel.params)
    if not isinstance(source, Address) or not isinstance(source.base, Special) or source.offset:
        raise Unknown(f"{source} is no parameter")
    name = source.base.name
    if name not in known or known[name].itemsize != dtype.itemsize:
        raise Unknown(f"no parameter {name} of {dtype.itemsize} bytes")

    def run(group, mask):
        group.put(targets[0], np.full(group.size, group.machine.params[name], f"u{dtype.itemsize}"), mask)

    return run


def _vector(operands: list, instruction) -> list:
    """Returns the elements of a vector, as many as its opcode has."""
    count = next((int(p[1]) for p in instruction.parts if p in ("v2", "v4")), 1)
    if len(operands) != count:
        raise Unknown(f"{len(operands)} elements where the opcode has {count}")
    return operands


def st(program, instruction):
    """A store of one or more elements to memory."""
    kind = instruction.parts[-1]
    to, source = instruction.args
    values = _vector(source if isinstance(source, list) else [source], instruction)
    registers = [program.source(one, kind) for one in values]
    bits, shared = np.dtype(f"u{TYPES[kind].itemsize}"), in_shared(instruction)
    semantics, scope = order_of(instruction)
    to = program.address(to, "b32" if shared else "b64")

    def run(group, mask):
        stored = np.stack([group.get(register, mask).astype(bits) for register in registers], 1)
        addresses, threads, strong = group.address(to, mask), group.active(mask), semantics is not None
        access.store(group, shared, addresses, stored if mask is None else stored[mask], threads, strong)
        if strong:
            for address, thread in zip(addresses.tolist(), threads.tolist(), strict=True):
                group.machine.released.pop(address, None)  # what was released here is overwritten
                if semantics == "release" and scope != "cta":
                    group.cta.release(thread, address)
            return YIELD

    return run
