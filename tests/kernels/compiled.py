"""Compiles what the library launches for GPUs that are not here, and reads the machine code.

`compile_launches` runs calls of the library in fresh processes without Triton's interpreter. There a driver stands in
for the GPU, the tensors are on torch's meta device, and every launch ends once its kernel is compiled: what is compiled
is what a GPU would get, with no list of signatures beside the launchers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory a block can have
TENSOR_CORES = {80: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)
_ORDER = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:atom|red|bar|st\.global|ld\.global)\.\S+)", re.M)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: Name of the jitted function.
        constants: Keyword arguments of the launch that are numbers, flags or strings.
        registers: Registers of a thread.
        shared: Shared memory of a program, in bytes.
        total: How often each SASS instruction stands in the kernel, by its name up to the first dot.
        hot: The same of the innermost loop with tensor-core instructions and a square root, which is a solver's step
            with its norms, or None.
        gemm: The same of the innermost loop with tensor-core instructions, or None.
        order: What touches or orders global memory, in the order of the PTX.
    """

    name: str
    constants: dict[str, Any]
    registers: int
    shared: int
    total: dict[str, int]
    hot: dict[str, int] | None
    gemm: dict[str, int] | None
    order: list[str]

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.constants["num_warps"]


def local(counts: dict[str, int]) -> int:
    """Returns the number of loads and stores of spilled registers."""
    return counts.get("LDL", 0) + counts.get("STL", 0)


def compile_launches(calls: dict[str, tuple[int, str, dict]]) -> dict[str, list[Kernel]]:
    """Compiles everything that each call launches.

    Args:
        calls: By name, (chip, name of a function of this module, its keyword arguments); the chip is 80, 90 or 100.

    Returns:
        By name, the kernels that the call launched, in order.

    Raises:
        RuntimeError: A kernel does not compile.
    """
    names, processes = list(calls), min(2, os.cpu_count() or 1)
    shares = [names[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        parts = pool.map(lambda share: _in_process([calls[name] for name in share]), shares)
    compiled = {}
    for share, part in zip(shares, parts, strict=True):
        compiled |= {name: [Kernel(**kernel) for kernel in kernels] for name, kernels in zip(share, part, strict=True)}
    return {name: compiled[name] for name in names}


def _in_process(calls: list) -> list[list[dict]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(calls), env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


# The calls. Each makes tensors without memory and lets an op launch what it launches for them.


def empty(*size: int, dtype: str = "float32") -> torch.Tensor:
    return torch.empty(size, dtype=getattr(torch, dtype), device="meta")


def affine_rows(*, features: int, batch: int = 1, adjoint: bool = False, **options) -> None:
    """Launches a whole solve of the affine cell, or its adjoint."""
    from tritondeq.kernels.rows import affine

    w, u = empty(features, features), empty(batch, features)
    settings = {"activation": "tanh", "tol": 1e-3, "max_steps": 50} | options
    affine.affine_adjoint(w, u, u, **settings) if adjoint else affine.affine_solve(w, u, **settings)


def mlp_rows(*, features: int, hidden: int, form: str, gate: bool, adjoint: bool = False, **options) -> None:
    """Launches a whole solve of the MLP cell, or its adjoint."""
    from tritondeq.kernels.rows import mlp

    weights = [empty(hidden, features), empty(features, hidden), *([empty(hidden, features)] if gate else [])]
    biases, scale, u = [empty(len(w)) for w in weights], empty(features), empty(1, features)
    settings = {"form": form, "activation": "silu", "tol": 1e-3, "max_steps": 50} | options
    if adjoint:
        saved = u, *(empty(1, hidden) for _ in range(1 + gate))
        mlp.mlp_adjoint(weights, scale, saved, u, **settings)
    else:
        mlp.mlp_solve(weights, biases, scale, u, **settings)


def gated_rows(*, features: int, adjoint: bool = False, **options) -> None:
    """Launches a whole solve of the gated cell, or its adjoint."""
    from tritondeq.kernels.rows import gated

    weights, settings = [empty(features, features)] * 3, {"tol": 1e-3, "max_steps": 50} | options
    if adjoint:
        gated.gated_adjoint(weights, [empty(1, features)] * 5, empty(1, features), **settings)
    else:
        gated.gated_solve(weights, empty(1, 3 * features).chunk(3, 1), **settings)


def affine_steps(*, features: int, batch: int, adjoint: bool = False, start: bool = False, **options) -> None:
    """Launches a step of the affine cell with its product: the first one if `start`, else a later one."""
    from tritondeq.kernels.steps import affine

    w, u = empty(features, features), empty(batch, features)
    settings = {"activation": "tanh", "tol": 1e-3, "max_steps": 50} | options
    if adjoint:
        steps = affine.affine_steps_adjoint(w, u, u, **settings)
    else:
        steps = affine.affine_steps_solve(w, u, u, **settings)
    steps.start = start
    steps.take()


def fused_steps(*, op: str, width: int, dtype: str, cell: str, parts: int = 1, tail: dict, **options) -> None:
    """Launches a step of a solver, and what ends a solve; `tail` has the arguments of a Tail, vectors as lengths."""
    from tritondeq.kernels import dispatch
    from tritondeq.kernels.tails import Tail

    vectors = {"weight": tail.get("weight"), "gains": tail.get("gains", ())}
    weight = vectors["weight"] and empty(vectors["weight"], dtype=dtype)
    gains = tuple(gain and empty(gain, dtype=dtype) for gain in vectors["gains"])
    tail = Tail(**tail | {"weight": weight, "gains": gains})
    z = empty(2, width, dtype=dtype)
    mask = empty(2, width, dtype="bool")
    steps = dispatch.load(op).start(z, mask, 1e-3, 50, tail, **options)
    steps.take(*(empty(2, width, dtype=cell) for _ in range(parts)))
    steps.onward()
    steps.finish()


def residual_rms(*, features: int, a: str, b: str) -> None:
    """Launches a sum and its norm."""
    from tritondeq.kernels.norms.residual_rms import residual_rms

    gamma = empty(features, dtype=a)
    residual_rms(empty(64, features, dtype=a), empty(64, features, dtype=b), gamma, gamma, 1e-6)


def group_norm(*, pixels: int, width: int, dtype: str, relu: str) -> None:
    """Launches GroupNorm of a sum."""
    from tritondeq.kernels.norms.group_norm import group_norm

    image = empty(2, pixels, 2 * width, dtype=dtype).movedim(-1, 1)
    group_norm(image, image, empty(2 * width), empty(2 * width), 2, 1e-5, relu)


# The process that compiles.


def _compile(calls: list) -> list[list[dict]]:
    """Makes the calls, each for its chip; returns the fields of the kernels that each launched."""
    from unittest.mock import patch

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    from tritondeq.kernels import launch

    class Driver(DriverBase):
        """Answers what Triton asks of a GPU before it launches; each chip is another device."""

        def __init__(self, chip: int):
            self.chip, self.utils = chip, self

        def get_device_properties(self, device):
            return {"max_shared_mem": SHARED[self.chip]}

        def get_current_target(self):
            return GPUTarget("cuda", self.chip, 32)

        def get_current_device(self):
            return self.chip

        def get_current_stream(self, device):
            return 0

        def is_active(self):
            return True

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_active_torch_device(self):
            return torch.device("meta")

        def get_benchmarker(self):
            raise NotImplementedError("nothing runs here")

    run, launched = JITFunction.run, []

    def compile_only(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, bool | int | float | str)}
        launched.append((self.__name__, constants, kernel))
        return kernel

    results = []
    with patch.object(JITFunction, "run", compile_only):
        for chip, name, options in calls:
            triton.runtime.driver.set_active(Driver(chip))
            launched.clear()
            limits = {"shared": SHARED[chip], "chip": chip}
            with patch.multiple(launch, limits=lambda _: limits, shared_memory=lambda _: limits["shared"]):  # noqa: B023
                globals()[name](**options)
            results.append([{"name": of, "constants": known} | _read(kernel, chip) for of, known, kernel in launched])
    return results


def _read(kernel, chip: int) -> dict[str, Any]:
    """Returns what the code of a compiled kernel shows: the fields of Kernel that do not stem from its launch."""
    registers, code = _disassemble(kernel.asm["cubin"])
    hot, gemm = [], []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if not op.startswith("BRA") or not target or int(target[1], 16) >= at:
            continue
        body = [one for one in code if int(target[1], 16) <= one[0] <= at]
        counts = _count(body)
        if TENSOR_CORES[chip] & set(counts):
            gemm.append(counts)
            if any(op in ("MUFU.RSQ", "MUFU.SQRT") for _, op, _ in body):
                hot.append(counts)
    return {
        "registers": registers,
        "shared": kernel.metadata.shared,
        "total": _count(code),
        "hot": min(hot, key=Counter.total, default=None),
        "gemm": min(gemm, key=Counter.total, default=None),
        "order": _ORDER.findall(kernel.asm["ptx"]),
    }


@cache
def _disassemble(cubin: bytes) -> tuple[int, list[tuple[int, str, str]]]:
    """Returns the registers of a thread and the instructions: address, name with suffixes, operands."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    code = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(sass)]
    return int(re.search(r"REG:(\d+)", usage)[1]), code


def _count(code: list[tuple[int, str, str]]) -> Counter:
    return Counter(op.split(".")[0] for _, op, _ in code)


if __name__ == "__main__":
    json.dump(_compile(json.load(sys.stdin)), sys.stdout)
