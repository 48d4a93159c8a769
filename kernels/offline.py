"""Compiles kernels for chips that are not here and reads their machine code.

As a program it takes jobs (jobs.py makes them) as JSON on stdin and prints what `inspect` finds, as JSON: Triton
compiles only in a process that was started without TRITON_INTERPRET.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory a block can have
PROCESSORS = {80: 108, 90: 132, 100: 148}  # multiprocessors of an A100, an H100 and a B200
MMA = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTCHMMA")}

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)
_ORDER = re.compile(
    r"^\s*((?:@!?%p\d+\s+)?(?:(?:atom|red|bar|st\.global|ld\.global|ld\.volatile)\.\S+|ret|bra\S*\s+\$\w+)|\$L__BB\w+:)",
    re.M,
)


def limits(chip: int) -> dict[str, int]:
    """As launch.limits', of one of these chips."""
    return {"shared": SHARED[chip], "chip": chip}


def run(jobs: list[dict]) -> list[dict]:
    """Results of `inspect` for each job, made in fresh processes with their own Triton cache."""
    processes = min(2, os.cpu_count() or 1)
    chunks = [jobs[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(_in_process, chunks))
    return [parts[i % processes][i // processes] for i in range(len(jobs))]


def _in_process(jobs: list[dict]) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(jobs), env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def inspect(kernel: str, chip: int, types: dict, constants: dict, multiples: tuple[str, ...] = (), **options) -> dict:
    """What ptxas made of a kernel.

    Args:
        kernel: "module:function".
        chip: 80, 90 or 100.
        types: Triton type of each argument that is no constant, or a list of them; pointers are taken as aligned to 16
            bytes.
        constants: Value of each constexpr; "module:function" stands for the function.
        multiples: Integer arguments that are multiples of 16, as Triton finds out at a launch.
        options: num_warps, num_stages and the like.
    Returns:
        registers, shared (bytes), hot: instruction counts of the innermost loop that has tensor-core instructions and a
        square root, that is a solver's step with its norms; gemm: of the innermost with tensor-core instructions;
        total: counts of the whole kernel; order: what touches or orders global memory in the PTX, labels and branches;
        cooperative: whether all programs run at once. Or `error`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, constants = _named(kernel), {name: _named(value) for name, value in constants.items()}
    signature = {arg: "constexpr" if arg in constants else _tuples(types[arg]) for arg in fn.arg_names}
    aligned = {(fn.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in multiples}
    for i, kind in enumerate(signature.values()):
        for path, one in ((i,), kind), *(((i, j), one) for j, one in enumerate(kind)):
            if one[:1] == "*" and len(one) > 1:
                aligned[path] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options | {"enable_fp_fusion": True})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    code = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(sass)]
    loops, gemms = [], []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target[1], 16) < at:
            body = _count(code, int(target[1], 16), at)
            if any(body[m] for m in MMA[chip]):
                gemms.append((body.total(), body))
                if _has_root(code, int(target[1], 16), at):
                    loops.append((body.total(), body))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": made.metadata.shared,
        "hot": min(loops, key=lambda loop: loop[0])[1] if loops else None,
        "gemm": min(gemms, key=lambda loop: loop[0])[1] if gemms else None,
        "total": _count(code, 0, 1 << 30),
        "order": _ORDER.findall(made.asm["ptx"]),
        "cooperative": made.metadata.launch_cooperative_grid,
    }


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _named(value):
    """The function that "module:function" names; of a list, a tuple."""
    if not isinstance(value, str) or ":" not in value:
        return _tuples(value)
    module, name = value.split(":")
    return getattr(importlib.import_module(module), name)


def _has_root(code, start: int, end: int) -> bool:
    return any(op in ("MUFU.RSQ", "MUFU.SQRT") for at, op, _ in code if start <= at <= end)


def _count(code, start: int, end: int) -> Counter:
    return Counter(op.split(".")[0] for at, op, _ in code if start <= at <= end)


if __name__ == "__main__":
    json.dump([inspect(**job) for job in json.load(sys.stdin)], sys.stdout)
