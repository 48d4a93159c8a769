"""Matrices that a warp loads, stores and multiplies."""

import numpy as np

from .. import access, tensor
from ..errors import Unknown

_LANES = np.arange(32)
_ROWS = _LANES[:, None] // 4 + np.zeros((1, 2), int)  # of the two elements that each lane has of an 8 x 8 matrix
_COLUMNS = _LANES[:, None] % 4 * 2 + np.arange(2)


def read(group, registers, mask) -> np.ndarray:
    """Returns the bits of registers, [warps, 32, registers]."""
    return np.stack([group.get(one, mask) for one in registers], 1).reshape(group.warps, 32, len(registers))


def _operands(program, instruction, registers, address):
    count = int(instruction.parts[4][1])
    places = (_COLUMNS, _ROWS) if "trans" in instruction.parts else (_ROWS, _COLUMNS)
    registers = registers if isinstance(registers, list) else [registers]
    if len(registers) != count:
        raise Unknown(f"{len(registers)} registers for {count} matrices")
    return count, places, registers, program.address(address, "b32")


def _row_threads(group, count, mask):
    """Returns which threads give the addresses of rows: the first 8 lanes of each matrix."""
    first = group.threads % 32 < 8 * count
    return first if mask is None else first & mask


def ldmatrix(program, instruction):
    """A load of 8 x 8 matrices of 16-bit elements; each lane gets two neighbours of a row, or of a column."""
    to, address = instruction.args
    count, places, targets, address = _operands(program, instruction, to, address)
    targets = program.targets(targets)

    def run(group, mask):
        warps, used = np.flatnonzero(group.whole(mask)), _row_threads(group, count, mask)
        words = access.load(group, True, group.address(address, used), 4, 4, group.threads[used])
        matrices = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        parts = np.ascontiguousarray(matrices[:, :, places[0], places[1]]).view(np.uint32)[..., 0]
        for i, target in enumerate(targets):
            values = np.zeros((group.warps, 32), np.uint32)
            values[warps] = parts[:, i]
            group.put(target, values.ravel(), mask)

    return run


def stmatrix(program, instruction):
    """A store of what ldmatrix loads."""
    address, source = instruction.args
    count, places, sources, address = _operands(program, instruction, source, address)
    sources = [program.source(one, "b32") for one in sources]

    def run(group, mask):
        warps, used = np.flatnonzero(group.whole(mask)), _row_threads(group, count, mask)
        parts = np.ascontiguousarray(read(group, sources, mask)[warps].transpose(0, 2, 1)).view(np.uint16)
        matrices = np.empty((len(warps), count, 8, 8), np.uint16)
        matrices[:, :, places[0], places[1]] = parts.reshape(len(warps), count, 32, 2)
        access.store(
            group, True, group.address(address, used), matrices.reshape(-1, 8).view(np.uint32), group.threads[used]
        )

    return run


def mma(program, instruction):
    """A product of a warp: A [16, k] @ B [k, 8] + C, in float32."""
    depth, kind = int(instruction.parts[3].split("k")[1]), instruction.parts[7]
    width = tensor.WIDTHS[kind]
    to, left, right, added = (one if isinstance(one, list) else [one] for one in instruction.args)
    targets = program.targets(to)
    left, right, added = ([program.source(one, "b32") for one in part] for part in (left, right, added))
    a_places, b_places, c_places = tensor.a_places(depth, width), tensor.b_places(depth, width), tensor.c_places(8)
    expected = [4, a_places[0].shape[1], b_places[0].shape[1], 4]
    if [len(targets), len(left), len(right), len(added)] != expected:
        raise Unknown(f"matrices in {expected} registers expected")

    def run(group, mask):
        group.whole(mask)
        a = tensor.matrix(read(group, left, mask), a_places, (16, depth), kind)
        b = tensor.matrix(read(group, right, mask), b_places, (depth, 8), kind)
        c = np.zeros((group.warps, 16, 8), np.float32)
        c[:, c_places[0], c_places[1]] = read(group, added, mask).view(np.float32)
        total = tensor.accumulate(a, b, c, group.machine.options.truncates)
        out = total[:, c_places[0], c_places[1]].view(np.uint32)
        for i, target in enumerate(targets):
            group.put(target, np.ascontiguousarray(out[:, :, i]).ravel(), mask)

    return run
