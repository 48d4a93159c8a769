"""Warps of one program that step together: their registers, and how they execute.

A register is an array of one element a thread. Threads that part in a branch run one side after the other, each under a
mask, and meet again where all their ways do.
"""

import numpy as np

from .errors import Fault
from .parse import Address
from .program import Program
from .steps import BARRIER, BRANCH, COMPUTE, EXIT, WAIT, YIELD


class Group:
    """Warps that step together.

    Attributes:
        cta: Their program.
        machine: The launch.
        program: What they execute.
        size: How many threads there are.
        warps: How many warps there are.
        threads: The threads' numbers in the program, [size].
        registers: What each register holds, [size] each.
        unset: Where registers hold nothing: a mask [size], or None for all threads. Absent where they are set.
        live: The threads that have not ended: a mask, or None for all.
        step: Number of the instruction with an effect that runs.
        copies: Copies of cp.async that were started and belong to no group yet.
        copy_groups: Groups of copies that were not waited for.
        products: Groups of wgmma (instructions/wgmma.py).
    """

    def __init__(self, cta, program: Program, first: int):
        self.cta, self.machine, self.program = cta, cta.machine, program
        self.size, self.warps = program.width, program.width // 32
        self.threads = np.arange(first, first + self.size, dtype=np.int32)
        self.registers = program.initial.copy()
        self.unset = dict.fromkeys(program.unset)
        values = self._specials()
        for (name, dtype), register in program.specials.items():
            self.registers[register] = np.broadcast_to(np.asarray(values[name]), self.size).astype(dtype)
        self.live = None
        self.step = 0
        self.copies, self.copy_groups, self.products = [], [], None
        self._counted = None, 0

    def _specials(self) -> dict[str, object]:
        machine = self.machine
        values = {"%laneid": self.threads & 31, "%warpid": self.threads >> 5, "%smid": self.cta.number}
        values |= dict.fromkeys(("%clock", "%clock64", "%globaltimer", "%cluster_ctarank"), 0)
        for i, axis in enumerate("xyz"):
            values[f"%tid.{axis}"], values[f"%ntid.{axis}"] = (self.threads, machine.threads) if i == 0 else (0, 1)
            values[f"%ctaid.{axis}"], values[f"%nctaid.{axis}"] = self.cta.at[i], machine.grid[i]
        return values

    # Registers. A mask [size] marks the threads that take part, None stands for all.

    def put(self, register: int | None, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Sets a register where the mask is true; `values` has its bits, or is converted as integers are."""
        if register is None:
            return
        width = self.program.widths[register]
        if values.dtype != width:
            same = values.dtype.itemsize == width.itemsize and width != np.bool_ and values.dtype != np.bool_
            values = values.view(width) if same else values.astype(width)
        if mask is None:
            self.registers[register] = values
            if register in self.unset:
                del self.unset[register]
            return
        if register in self.unset:
            where = self.unset[register]
            left = ~mask if where is None else where & ~mask
            if left.any():
                self.unset[register] = left
            else:
                del self.unset[register]
        self.registers[register] = np.where(mask, values, self.registers[register])

    def get(self, register: int, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns what a register holds.

        What only computes reads `registers` itself: LLVM leaves registers unset whose values are not wanted, such as
        the other half of a pair.

        Raises:
            Fault: It holds nothing in a thread of the mask.
        """
        if register in self.unset:
            where = self.unset[register]
            if where is None or mask is None or (where & mask).any():
                raise Fault("reads a register that was never set")
        return self.registers[register]

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """Returns the numbers of the threads of the mask."""
        return self.threads if mask is None else self.threads[mask]

    def address(self, operand: Address, mask: np.ndarray | None) -> np.ndarray:
        """Returns the addresses of the threads of the mask."""
        base = self.get(operand.base, mask)
        if mask is not None:
            base = base[mask]
        kind = base.dtype.type
        return base + kind(operand.offset & (1 << 8 * base.dtype.itemsize) - 1) if operand.offset else base

    def whole(self, mask: np.ndarray | None) -> np.ndarray:
        """Returns which warps are in the mask, [warps].

        Raises:
            Fault: A warp is in it only in part; threads that have ended don't count.
        """
        if mask is None:
            return np.ones(self.warps, bool)
        some = mask.reshape(self.warps, 32).any(1)
        full = (mask if self.live is None else mask | ~self.live).reshape(self.warps, 32).all(1)
        if (some & ~full).any():
            raise Fault("a part of a warp comes here, and all of it has to: threads part in a branch before")
        return some

    # Execution

    def run(self):
        """Executes until the end; yields WAIT at a barrier, and YIELD where another group may run in between."""
        steps, registers, joins = self.program.steps, self.registers, self.program.joins
        stack = [[0, None, -1]]  # (next instruction, mask, where it joins the entry below)
        while stack:
            at, mask, join = stack[-1]
            if at == join or (mask is not None and not mask.any()):
                stack.pop()
                continue
            step = None
            try:
                while True:
                    step = steps[at]
                    if step.leader and at == join:
                        stack.pop()
                        break
                    active = mask
                    if step.predicate is not None:
                        active = self._guarded(step, mask)
                        if step.kind != BRANCH and active is not mask and not active.any():
                            at += 1
                            continue
                    step.count += self.warps if active is None else self._warps_in(active)
                    if step.kind == COMPUTE:
                        self.put(step.destination, step.run(*[registers[s] for s in step.sources]), active)
                        at += 1
                    elif step.kind == BRANCH:
                        goes = self._branch(stack, at, step, mask, active, joins)
                        if goes is None:
                            break
                        at = goes
                    elif step.kind == EXIT:
                        self._exit(stack, at, active)
                        break
                    elif step.kind == BARRIER:
                        self._arrive(at, step, active)
                        yield WAIT
                        at += 1
                    else:
                        self.step = at
                        if step.run(self, active) is YIELD:
                            yield YIELD
                        at += 1
            except Fault as error:
                one = step.instruction
                where = f"{one.place}, CTA {self.cta.number}, warps from {int(self.threads[0]) // 32}"
                raise Fault(f"{error}\n    {one.text}\n    at {where}") from error

    def _guarded(self, step, mask):
        """Returns the mask of the threads whose predicate holds; None where all threads run and it holds in all."""
        holds = self.get(step.predicate, mask)
        if step.negated:
            holds = ~holds
        if mask is not None:
            return holds & mask
        return None if holds.all() else holds

    def _warps_in(self, mask) -> int:
        if self._counted[0] is not mask:
            self._counted = mask, int(mask.reshape(-1, 32).any(1).sum())
        return self._counted[1]

    def _branch(self, stack, at, step, mask, active, joins) -> int | None:
        """Returns where all threads go, or None where they part."""
        if active is None or active is mask:
            return step.target
        stay = ~active if mask is None else mask & ~active
        if not stay.any():
            return step.target
        if not active.any():
            return at + 1
        meet = joins[at]
        if meet == stack[-1][2]:
            stack.pop()
        else:
            stack[-1][0] = meet
        stack.append([at + 1, stay, meet])
        stack.append([step.target, active, meet])
        return None

    def _exit(self, stack, at, active) -> None:
        stay = np.zeros(self.size, bool) if active is None else ~active
        self.live = stay if self.live is None else self.live & stay
        stack[-1][0] = at + 1
        for entry in stack:
            entry[1] = stay if entry[1] is None else entry[1] & stay

    def _arrive(self, at, step, active) -> None:
        if active is not None:
            missing = ~active if self.live is None else self.live & ~active
            if missing.any():
                raise Fault(f"{int(missing.sum())} threads of these warps do not come to this barrier")
        self.cta.barriers.add((at, step.instruction.place))
