"""A kernel made ready to run: what each instruction does, with constants in registers of their own."""

import numpy as np

from . import alu, forms, instructions
from .errors import Unknown
from .parse import TYPES, Address, Immediate, Instruction, Kernel, Not, Special
from .steps import BARRIER, BRANCH, COMPUTE, EFFECT, EXIT, Step

_CONTROL = {"bra": BRANCH, "ret": EXIT, "exit": EXIT, "bar": BARRIER}
_AXES = ("x", "y", "z")
SPECIALS = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in _AXES}
SPECIALS |= {"%laneid", "%warpid", "%smid", "%clock", "%clock64", "%globaltimer", "%cluster_ctarank"}


class Program:
    """A kernel bound to a number of threads that step together.

    Attributes:
        kernel: The kernel.
        width: How many threads step together.
        initial: What each register holds at first: an array [width]. Registers that an instruction sets hold a pattern
            that is a NaN as a float; constants hold their values.
        widths: Dtype of each register.
        unset: The registers that hold nothing yet.
        specials: The registers that hold special ones, by (name, dtype), which each group fills.
        steps: What is executed.
        joins: Of each branch, where the ways from it meet again.
    """

    def __init__(self, kernel: Kernel, width: int):
        self.kernel, self.width = kernel, width
        self.widths = list(kernel.widths)
        patterns = {dtype: _pattern(dtype, width) for dtype in set(self.widths)}
        self.initial = [patterns[dtype] for dtype in self.widths]
        self.unset = list(range(len(self.widths)))
        self._constants: dict[tuple[object, str], int] = {}
        self.specials: dict[tuple[str, str], int] = {}
        self.steps = [self._bind(instruction) for instruction in kernel.code]
        self.joins = _joins(self.steps)

    def source(self, operand, kind: str) -> int:
        """Returns the register of an operand that is read as this type.

        Raises:
            Unknown: The operand is nothing that can be read.
        """
        if isinstance(operand, int):
            return operand
        dtype = TYPES[kind]
        bits = np.dtype("?") if kind == "pred" else np.dtype(f"u{dtype.itemsize}")
        if isinstance(operand, Immediate):
            return self._constant(_bits(operand.value, bits), bits)
        if isinstance(operand, Special):
            if operand.name in self.kernel.shared:
                return self._constant(self.kernel.shared[operand.name], bits)
            if operand.name in SPECIALS:
                key = operand.name, bits.str
                if key not in self.specials:
                    self.specials[key] = self._add(None, bits)
                return self.specials[key]
            raise Unknown(f"no register {operand.name}")
        raise Unknown(f"operand {operand}")

    def address(self, operand, kind: str) -> Address:
        """Returns an address whose base is a register of type b32 (shared memory) or b64 (global memory)."""
        if not isinstance(operand, Address):
            raise Unknown(f"{operand} is no address")
        base = self.source(operand.base, kind)
        if self.widths[base] != TYPES[kind]:
            raise Unknown(f"an address in a register of {self.widths[base]}")
        return Address(base, operand.offset)

    def targets(self, operand) -> list[int | None]:
        """Returns the registers that an operand names as destinations; None is the sink."""
        found = operand if isinstance(operand, list) else [operand]
        if not all(one is None or isinstance(one, int) for one in found):
            raise Unknown(f"destination {operand}")
        return found

    def target(self, operand) -> int | None:
        """Returns the register that an operand names as the only destination; None is the sink."""
        targets = self.targets(operand)
        if len(targets) != 1:
            raise Unknown(f"{len(targets)} destinations")
        return targets[0]

    def _constant(self, value, dtype: np.dtype) -> int:
        key = value, dtype.str
        if key not in self._constants:
            self._constants[key] = self._add(np.full(self.width, value, dtype), dtype)
        return self._constants[key]

    def _add(self, values, dtype: np.dtype) -> int:
        self.initial.append(values)
        self.widths.append(dtype)
        return len(self.initial) - 1

    def _bind(self, one: Instruction) -> Step:
        forms.check(one)
        name = one.parts[0]
        step = Step(one, COMPUTE, one.predicate, one.negated, one.leader, one.target)
        try:
            handler = instructions.find(one)
            if handler:
                step.kind, step.run = EFFECT, handler(self, one)
            elif name in _CONTROL:
                step.kind = _CONTROL[name]
                if step.kind == BARRIER and one.args != [Immediate(0)]:
                    raise Unknown("a barrier other than 0")
            else:
                self._bind_arithmetic(step)
        except Unknown as error:
            raise Unknown(f"{one.text}: {error}") from error
        return step

    def _bind_arithmetic(self, step: Step) -> None:
        step.run, kinds = alu.build(step.instruction)
        destination, *sources = step.instruction.args
        step.destination = self.target(destination)
        for operand, kind in zip(sources, kinds, strict=True):
            register = self._negated(operand, step) if isinstance(operand, Not) else self.source(operand, kind)
            if not _fits(self.widths[register], kind, step.instruction.parts[0] == "cvt"):
                raise Unknown(f"{operand} is no operand of type {kind}")
            step.sources.append(register)

    def _negated(self, operand: Not, step: Step) -> int:
        """Makes a setp read the negation of its third source."""
        if step.instruction.parts[0] != "setp":
            raise Unknown("a negated operand")
        run = step.run
        step.run = lambda a, b, p: run(a, b, ~p)
        return operand.register


def _fits(width: np.dtype, kind: str, wider: bool) -> bool:
    """Returns whether a register can be read as a type; `wider` is whether its lower bits may be taken, as by cvt."""
    if kind == "pred" or width == np.bool_:
        return kind == "pred" and width == np.bool_
    size = TYPES[kind].itemsize
    return width.itemsize == size or (wider and width.itemsize > size)


def _pattern(dtype: np.dtype, width: int) -> np.ndarray:
    value = True if dtype == np.bool_ else 0x7FF7DEAD7FF7DEAD & (1 << 8 * dtype.itemsize) - 1
    return np.full(width, value, dtype)


def _bits(value, dtype: np.dtype):
    """Returns an immediate's bits as a number of this dtype: bool or unsigned."""
    if isinstance(value, np.floating):
        value = int(value.view(f"u{value.dtype.itemsize}"))
    return bool(value) if dtype == np.bool_ else value & (1 << 8 * dtype.itemsize) - 1


def _joins(steps: list[Step]) -> dict[int, int]:
    """Returns, for each branch, the first instruction to which all ways from it lead; -1 where that is the end."""
    starts = sorted({0} | {i for i, step in enumerate(steps) if step.leader})
    number = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(steps)]
    after = []
    for end in ends:
        last = steps[end - 1]
        blocks = [number[last.target]] if last.kind == BRANCH else []
        if not (last.kind in (BRANCH, EXIT) and last.predicate is None) and end < len(steps):
            blocks.append(number[end])
        after.append(blocks)
    everything = (1 << len(starts)) - 1
    behind = [everything] * len(starts)  # as bits, the blocks that stand on all ways from this one to the end
    changed = True
    while changed:
        changed = False
        for block in reversed(range(len(starts))):
            common = everything if after[block] else 0
            for other in after[block]:
                common &= behind[other]
            changed |= common | 1 << block != behind[block]
            behind[block] = common | 1 << block
    found = {}
    for block, end in enumerate(ends):
        if steps[end - 1].kind == BRANCH:
            rest = behind[block] & ~(1 << block)
            near = [other for other in range(len(starts)) if rest >> other & 1 and behind[other] == rest]
            found[end - 1] = starts[near[0]] if near else -1
    return found
