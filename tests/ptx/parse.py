"""PTX text -> Kernel: a flat list of instructions whose registers are numbers."""

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import Unknown

TYPES = {f"{k}{n}": np.dtype(f"{'i' if k == 's' else 'u'}{n // 8}") for k in "bsu" for n in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")}
TYPES |= {"bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"), "tf32": np.dtype("u4")}

_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_DECIMAL = re.compile(r"-?\d+\.\d*([eE][+-]?\d+)?")
_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?(?:0[xX])?[0-9a-fA-F]+)\s*)?\]")
_INSTRUCTION = re.compile(r"(?:@(!?)(\S+)\s+)?([A-Za-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr\b.*?)?\s+([\w$]+)")
_SHARED = re.compile(r"^\s*(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\[(\d*)\]", re.M)


@dataclass(frozen=True)
class Immediate:
    """A number in the text: an int, or the float of 32 or 64 bits that it spells."""

    value: int | np.floating


@dataclass(frozen=True)
class Special:
    """A name that is no declared register: %tid.x and the like, a symbol of shared memory, or a parameter."""

    name: str


@dataclass(frozen=True)
class Not:
    """The negation of a predicate register."""

    register: int


@dataclass(frozen=True)
class Address:
    """A register, number or name in brackets, and the bytes that are added to it."""

    base: "int | Special | Immediate"
    offset: int


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        text: The instruction as it was written.
        opcode: Its opcode, with all modifiers.
        args: Operands: an int is a register, a list a vector, None the sink `_`; also Immediate, Special, Not, Address.
        place: File and line of the source.
        predicate: The register that guards it.
        negated: Whether it is guarded by that register's negation.
        leader: Whether a branch leads here, or stands before it.
        target: Where a branch leads: the number of an instruction.
    """

    text: str
    opcode: str
    args: list
    place: str = ""
    predicate: int | None = None
    negated: bool = False
    leader: bool = False
    target: int = -1

    @property
    def parts(self) -> list[str]:
        """The opcode's parts, which dots separate."""
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One entry.

    Attributes:
        name: Name of the entry.
        params: Name and dtype of each parameter.
        code: Its instructions; the last is a `ret`.
        widths: Dtype of each register: bool, or unsigned integers.
        shared: Offset of each symbol of shared memory.
        static: Bytes of shared memory that are declared with a size.
        threads: Threads of a program.
    """

    name: str
    params: list[tuple[str, np.dtype]]
    code: list[Instruction]
    widths: list[np.dtype]
    shared: dict[str, int] = field(default_factory=dict)
    static: int = 0
    threads: int = 0


class _Registers:
    """The registers that are declared, by name, in scopes that nest."""

    def __init__(self):
        self.scopes, self.widths = [{}], []

    def declare(self, kind: str, names: str) -> None:
        dtype = TYPES.get(kind)
        if dtype is None:
            raise Unknown(f"registers of type {kind}")
        dtype = dtype if kind == "pred" else np.dtype(f"u{dtype.itemsize}")
        for name in split(names):
            counted = re.fullmatch(r"(.*)<(\d+)>", name)
            for one in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
                self.scopes[-1][one] = len(self.widths)
                self.widths.append(dtype)

    def find(self, name: str) -> int | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def operand(self, text: str):
        """Returns what one operand stands for (see Instruction.args)."""
        if text == "_":
            return None
        if text.startswith("{"):
            return [self.operand(part) for part in split(text[1:-1])]
        if text.startswith("["):
            found = _ADDRESS.fullmatch(text)
            if not found:
                raise Unknown(f"address {text}")
            return Address(self.operand(found[1]), int(found[2] or "0", 0))
        if "|" in text:
            return [self.operand(part.strip()) for part in text.split("|")]
        register = self.find(text)
        if register is not None:
            return register
        if text.startswith("!") and self.find(text[1:]) is not None:
            return Not(self.find(text[1:]))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(np.array(int(text[2:], 16), np.uint32).view(np.float32)[()])
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(np.array(int(text[2:], 16), np.uint64).view(np.float64)[()])
        if _INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0))
        if _DECIMAL.fullmatch(text):
            return Immediate(np.float64(text))
        return Special(text)


def split(text: str) -> list[str]:
    """Returns the parts of a text between commas that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part for part in map(str.strip, parts) if part]


def parse(text: str) -> Kernel:
    """Reads the entry of a PTX module.

    Raises:
        Unknown: The module has no entry, or several; a parameter is an array; a label or the register of a predicate is
            missing; an operand can't be read.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    heads = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\s*\{", text, re.S))
    if len(heads) != 1:
        raise Unknown(f"a module with {len(heads)} entries")
    head = heads[0]
    threads = re.search(r"\.reqntid\s+(\d+)((?:\s*,\s*1)*)\s*(?!\s*,)", head[3])
    if not threads or int(threads[1]) % 32:
        raise Unknown(f"entry {head[1]}: its threads are no multiple of 32, or not given by .reqntid")
    kernel = Kernel(head[1], [_parameter(line) for line in split(re.sub(r"//.*", "", head[2]))], [], [])
    kernel.threads = int(threads[1])
    for align, bits, name, size in _SHARED.findall(text):
        kernel.shared[name] = -(-kernel.static // int(align)) * int(align)
        kernel.static = kernel.shared[name] + int(bits) // 8 * int(size or 0)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    _read_body(kernel, _body(text[head.end() :]), files)
    return kernel


def _parameter(line: str) -> tuple[str, np.dtype]:
    found = _PARAMETER.fullmatch(line)
    if not found or found[1] not in TYPES:
        raise Unknown(f"parameter {line}")
    return found[2], TYPES[found[1]]


def _body(text: str) -> list[str]:
    """Returns the lines, without comments, up to the brace that ends the entry whose first brace stands before them."""
    lines, depth = [], 1
    for line in text.splitlines():
        line = line.partition("//")[0].strip()
        depth += line.count("{") - line.count("}")
        if depth < 1:
            return lines
        lines.append(line)
    raise Unknown("an entry without an end")


def _statements(lines: list[str]):
    """Yields the statements: what a semicolon ends, and .loc lines, which nothing ends."""
    text = "".join(f"{line};" if line.startswith(".loc") else f"{line} " for line in lines)
    yield from map(str.strip, text.split(";"))


def _read_body(kernel: Kernel, lines: list[str], files: dict[str, str]) -> None:
    registers, labels, place = _Registers(), {}, ""
    for text in _statements(lines):
        while text:  # labels and braces stand before a statement, with no semicolon between
            label = _LABEL.match(text)
            if label:
                if label[1] in labels:
                    raise Unknown(f"label {label[1]} stands twice")
                labels[label[1]] = len(kernel.code)
                text = text[label.end() :]
            elif text[0] in "{}":
                registers.scopes.append({}) if text[0] == "{" else registers.scopes.pop()
                text = text[1:].lstrip()
            else:
                break
        if not text or text.startswith((".pragma", ".file")):
            continue
        if text.startswith(".loc"):
            place = _place(text, files)
        elif text.startswith(".reg"):
            declared = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
            registers.declare(declared[1], declared[2])
        else:
            kernel.code.append(_instruction(text, place, registers))
    kernel.code.append(Instruction("ret", "ret", []))
    kernel.widths = registers.widths
    for i, one in enumerate(kernel.code):
        if one.parts[0] == "bra":
            label = one.args[0].name if one.args and isinstance(one.args[0], Special) else ""
            if label not in labels:
                raise Unknown(f"{one.text}: no such label")
            one.target = labels[label]
            kernel.code[one.target].leader = kernel.code[i + 1].leader = True


def _place(text: str, files: dict[str, str]) -> str:
    found = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
    inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
    place = f"{files.get(found[1], '?')}:{found[2]}"
    return place + (f" (from {files.get(inlined[1], '?')}:{inlined[2]})" if inlined else "")


def _instruction(text: str, place: str, registers: _Registers) -> Instruction:
    found = _INSTRUCTION.fullmatch(text)
    if not found:
        raise Unknown(text)
    args = [registers.operand(part) for part in split(found[4])]
    read = Instruction(text, found[3], args, place)
    if found[2]:
        read.predicate, read.negated = registers.find(found[2]), found[1] == "!"
        if read.predicate is None:
            raise Unknown(f"{text}: no register {found[2]}")
    return read
