"""Instructions that do more than compute: those that touch memory, other lanes or tensor cores.

A handler binds an instruction: it returns the function of (group, mask) that executes it.
"""

from collections.abc import Callable

from ..parse import Instruction
from . import atomics, control, copies, matrices, moves, warps, wgmma

_HANDLERS = {
    "mov": moves.mov, "ld": moves.ld, "st": moves.st, "atom": atomics.atom, "red": atomics.atom, "shfl": warps.shfl,
    "redux": warps.redux, "vote": warps.vote, "bar.warp": control.bar_warp, "fence": control.fence,
    "trap": control.trap, "cp.async": copies.cp_async, "ldmatrix": matrices.ldmatrix, "stmatrix": matrices.stmatrix,
    "mma": matrices.mma, "wgmma": wgmma.wgmma,
}  # fmt: skip


def find(instruction: Instruction) -> Callable | None:
    """Returns the handler of an instruction, or None of what computes or branches."""
    return _HANDLERS.get(".".join(instruction.parts[:2])) or _HANDLERS.get(instruction.parts[0])
