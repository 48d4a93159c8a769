"""Runs PTX that tests write by hand, with no Triton."""

import numpy as np

from .machine import Machine
from .memory import Global
from .options import Options, Report
from .parse import TYPES, parse
from .program import Program

_REGISTERS = ".reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %r<300>; .reg .b64 %d<64>;"
_PREFIX = {1: "h", 2: "h", 4: "r", 8: "d"}  # of the registers of a type, by its bytes; bytes live in 16 bits


def entry(body: str, pointers: list[str], *, threads: int = 32, shared: int = 0, scalars: dict | None = None) -> str:
    """Returns a module with one entry.

    The body has registers %p, %h (16 bits), %r (32), %d (64), each numbered from 0. In it, [name] of a pointer or
    scalar is its parameter, and smem is the shared memory.

    Args:
        body: Instructions.
        pointers: Names of the parameters that are addresses of global memory.
        threads: Threads of a program.
        shared: Bytes of shared memory.
        scalars: Types of other parameters, by name.
    """
    params = [f".param .u64 .ptr .global .align 1 {name}" for name in pointers]
    params += [f".param .{kind} {name}" for name, kind in (scalars or {}).items()]
    memory = f".shared .align 16 .b8 smem[{shared}];\n" if shared else ""
    return (
        f".version 8.4\n.target sm_90a\n.address_size 64\n{memory}.visible .entry test({', '.join(params)})\n"
        f".reqntid {threads}\n{{\n{_REGISTERS}\n{body}\nret;\n}}\n"
    )


def run(
    ptx: str, tensors: dict[str, np.ndarray], options: Options | None = None, grid=(1, 1, 1),
    scalars: dict | None = None, cooperative: bool = False,
) -> Report:  # fmt: skip
    """Runs an entry on arrays, by the names of its parameters, and returns the report."""
    options = options or Options()
    kernel = parse(ptx)
    program = Program(kernel, kernel.threads if options.lockstep else 32)
    memory = Global([(x.ctypes.data, x.nbytes, x.itemsize, name) for name, x in tensors.items()])
    params = {name: x.ctypes.data for name, x in tensors.items()} | (scalars or {})
    return Machine(program, grid, 0, memory, params, options, cooperative).run()


def register(kind: str, number: int) -> str:
    """Returns the name of a register that holds this type; numbers that differ by 16 or more don't collide."""
    return f"%p{number}" if kind == "pred" else f"%{_PREFIX[TYPES[kind].itemsize]}{number}"


def compute(opcode: str, kinds: list[str], to: str, inputs: list, negate: bool = False) -> np.ndarray:
    """Runs one instruction on many threads, and checks that it ran.

    Args:
        opcode: The instruction.
        kinds: Types of its operands.
        to: Type of its result.
        inputs: Of each operand, the bits of each thread (unsigned, or bool of pred), or a number or other text that
            stands in the instruction.
        negate: Whether the last operand is negated by an exclamation mark.

    Returns:
        The bits of the results, an array.
    """
    n = max(len(x) for x in inputs if isinstance(x, np.ndarray))
    threads = -(-n // 32) * 32
    body, tensors, operands = ["mov.u32 %r40, %tid.x;"], {}, []
    for i, (kind, x) in enumerate(zip(kinds, inputs, strict=True)):
        if not isinstance(x, np.ndarray):
            operands.append(str(x))
            continue
        size = 1 if kind == "pred" else TYPES[kind].itemsize
        tensors[f"in{i}"] = np.resize(x, threads).view(f"u{size}")
        narrow = register("b16" if kind == "pred" else kind, i + 1)
        body.append(f"ld.param.u64 %d20, [in{i}]; mad.wide.u32 %d20, %r40, {size}, %d20;")
        body.append(f"ld.global.b{8 * size} {narrow}, [%d20];")
        if kind == "pred":
            body.append(f"setp.ne.b16 %p{i + 1}, {narrow}, 0;")
        operands.append(register(kind, i + 1))
    size = 4 if to == "pred" else TYPES[to].itemsize
    out = tensors["out"] = np.zeros(threads, f"u{size}")
    operands[-1] = "!" * negate + operands[-1]
    body.append(f"{opcode} {register(to, 0)}, {', '.join(operands)};")
    if to == "pred":
        body.append("selp.b32 %r0, 1, 0, %p0;")
    body.append(f"ld.param.u64 %d20, [out]; mad.wide.u32 %d20, %r40, {size}, %d20;")
    body.append(f"st.global.b{8 * size} [%d20], {register('b32' if to == 'pred' else to, 0)};")
    report = run(entry("\n".join(body), list(tensors), threads=threads), tensors, Options(lockstep=True, races="off"))
    assert report.classes[opcode], f"{opcode} did not run"
    return out[:n].astype(bool) if to == "pred" else out[:n]
