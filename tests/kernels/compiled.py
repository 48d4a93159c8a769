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
from uneven import uneven_sums

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
        uneven: What `uneven.uneven_sums` finds in the PTX.
    """

    name: str
    constants: dict[str, Any]
    registers: int
    shared: int
    total: dict[str, int]
    hot: dict[str, int] | None
    gemm: dict[str, int] | None
    order: list[str]
    uneven: list[str]

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.constants["num_warps"]


def local(counts: dict[str, int]) -> int:
    """Returns the number of loads and stores of spilled registers."""
    return counts.get("LDL", 0) + counts.get("STL", 0)


def compile_launches(calls: dict[str, tuple[int, str, dict]], until: str = "cubin") -> dict[str, list[Kernel]]:
    """Compiles everything that each call launches.

    Args:
        calls: By name, (chip, name of a function of this module, its keyword arguments); the chip is 80, 90 or 100. A
            `choice` among the arguments is the number of a candidate of `tune`, counted from the first one again where
            there are fewer.
        until: "cubin", or "ptx" for half the time: without registers, shared memory and machine code.

    Returns:
        By name, the kernels that the call launched, in order; none where the op refuses such a problem.

    Raises:
        RuntimeError: A kernel does not compile.
    """
    names, processes = list(calls), min(2, os.cpu_count() or 1)
    shares = [names[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        parts = pool.map(lambda share: _in_process([calls[name] for name in share], until), shares)
    compiled = {}
    for share, part in zip(shares, parts, strict=True):
        compiled |= {name: [Kernel(**kernel) for kernel in kernels] for name, kernels in zip(share, part, strict=True)}
    return {name: compiled[name] for name in names}


def _in_process(calls: list, until: str) -> list[list[dict]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, until]
    with tempfile.TemporaryDirectory() as folder:
        if until == "ptx":  # what Triton would find there is no code of a GPU
            env["TRITON_CACHE_DIR"] = folder
        done = subprocess.run(command, input=json.dumps(calls), env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


# The calls. Each makes tensors without memory and lets an op launch what it launches for them.


def empty(*size: int, dtype: str = "float32") -> torch.Tensor:
    return torch.empty(size, dtype=getattr(torch, dtype), device="meta")


def fits(op: str, shapes, *, terms: int = 2, memory: int = 0, **options) -> bool:
    """Returns whether a whole solve takes weights of these shapes."""
    from tritondeq.kernels.rows import skeleton

    return skeleton.refuses(op, tuple(shapes), torch.float32, terms, memory, torch.device("meta")) is None


def affine_rows(
    *, features: int, batch: int = 1, adjoint: bool = False, warm: bool = False, **options
) -> None:  # fmt: skip
    """Launches a whole solve of the affine cell, from a given start if `warm`, or its adjoint."""
    from tritondeq.kernels.rows import affine

    w, u = empty(features, features), empty(batch, features)
    settings = {"activation": "tanh", "tol": 1e-3, "max_steps": 50} | options
    if not fits("rows.affine", [w.shape], **settings):
        return
    if adjoint:
        affine.affine_adjoint(w, u, u, **settings)
    else:
        affine.affine_solve(w, u, u if warm else None, **settings)


def mlp_rows(
    *, features: int, hidden: int, form: str, gate: bool, batch: int = 1, adjoint: bool = False, warm: bool = False,
    **options,
) -> None:  # fmt: skip
    """Launches a whole solve of the MLP cell, from a given start if `warm`, or its adjoint."""
    from tritondeq.kernels.rows import mlp

    weights = [empty(hidden, features), empty(features, hidden), *([empty(hidden, features)] if gate else [])]
    biases, scale, u = [empty(len(w)) for w in weights], empty(features), empty(batch, features)
    settings = {"form": form, "activation": "silu", "tol": 1e-3, "max_steps": 50} | options
    if not fits("rows.mlp", [w.shape for w in weights], **settings):
        return
    if adjoint:
        saved = u, *(empty(batch, hidden) for _ in range(1 + gate))
        mlp.mlp_adjoint(weights, scale, saved, u, **settings)
    else:
        mlp.mlp_solve(weights, biases, scale, u, u if warm else None, **settings)


def gated_rows(*, features: int, batch: int = 1, adjoint: bool = False, warm: bool = False, **options) -> None:
    """Launches a whole solve of the gated cell, from a given start if `warm`, or its adjoint."""
    from tritondeq.kernels.rows import gated

    weights, u, settings = [empty(features, features)] * 3, empty(batch, features), {"tol": 1e-3, "max_steps": 50}
    if not fits("rows.gated", [w.shape for w in weights], **options):
        return
    if adjoint:
        gated.gated_adjoint(weights, [u] * 5, u, **settings, **options)
    else:
        inputs = empty(batch, 3 * features).chunk(3, 1)
        gated.gated_solve(weights, inputs, u if warm else None, **settings, **options)


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


def fused_steps(
    *, op: str, width: int, dtype: str, cell: str, tail: dict, batch: int = 2, parts: int = 1, masked: bool = True,
    **options,
) -> None:  # fmt: skip
    """Launches a step of a solver, and what ends a solve; `tail` has the arguments of a Tail, vectors as lengths."""
    from tritondeq.kernels import dispatch
    from tritondeq.kernels.tails import Tail

    vectors = {"weight": tail.get("weight"), "gains": tail.get("gains", ())}
    weight = vectors["weight"] and empty(vectors["weight"], dtype=dtype)
    gains = tuple(gain and empty(gain, dtype=dtype) for gain in vectors["gains"])
    tail = Tail(**tail | {"weight": weight, "gains": gains})
    z = empty(batch, width, dtype=dtype)
    if not tail.fits(op, z):
        return
    mask = empty(batch, width, dtype="bool") if masked else None
    steps = dispatch.load(op).start(z, mask, 1e-3, 50, tail, **options)
    steps.take(*(empty(batch, width, dtype=cell) for _ in range(parts)))
    steps.onward()
    steps.finish()


def residual_rms(
    *, features: int, a: str, b: str, batch: int = 64, gamma: bool = True, weight: bool = True, keep_sum: bool = True
) -> None:
    """Launches a sum and its norm."""
    from tritondeq.kernels.norms.residual_rms import residual_rms

    vector = empty(features, dtype=a)
    gamma, weight = (vector if given else None for given in (gamma, weight))
    residual_rms(empty(batch, features, dtype=a), empty(batch, features, dtype=b), gamma, weight, 1e-6, keep_sum)


def unit(*, features: int, masked: bool, batch: int = 64) -> None:
    """Launches what scales samples to norm 1."""
    from tritondeq.kernels.norms.unit import unit

    unit(empty(batch, features), empty(batch, features, dtype="bool") if masked else None)


def residual(*, features: int, masked: bool, batch: int = 64, based: bool = True) -> None:
    """Launches what compares residuals."""
    from tritondeq.kernels.norms.residual import far

    z, vector = empty(batch, features), empty(batch)
    mask = empty(batch, features, dtype="bool") if masked else None
    far(z, z, vector if based else None, z, mask, vector, scale=0.0, factor=1.1, least=1e-3)


def group_norm(
    *, pixels: int, width: int, dtype: str, relu: str | None, batch: int = 2, groups: int = 2, sum: bool = True
) -> None:
    """Launches GroupNorm, of a sum or of one image."""
    from tritondeq.kernels.norms.group_norm import group_norm, refuses

    image = empty(batch, pixels, groups * width, dtype=dtype).movedim(-1, 1)
    other, vector = image if sum else None, empty(groups * width)
    if refuses(a=image, b=other, groups=groups) is None:
        group_norm(image, other, vector, vector, groups, 1e-5, relu)


# The process that compiles.


def _compile(calls: list, until: str) -> list[list[dict]]:
    """Makes the calls, each for its chip; returns the fields of the kernels that each launched."""
    from unittest.mock import patch

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    from tritondeq.kernels import devices, launch

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
    parameters, choice, failed = launch.parameters, 0, []
    if until == "ptx":
        CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()

    def chosen(op, device=None, **shape):
        choices = launch.candidates(op, **shape)
        if device is None or not choices:
            return parameters(op, device, **shape)
        with launch.override(op, choices[choice % len(choices)]):
            return parameters(op, device, **shape)

    def compile_only(self, *args, warmup, **kwargs) -> None:
        kernel = run(self, *args, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, bool | int | float | str)}
        launched.append((self.__name__, constants, kernel))  # and nothing is returned that could be launched

    results = []
    with patch.object(JITFunction, "run", compile_only), patch.object(launch, "parameters", chosen):
        for chip, name, options in calls:
            options = dict(options)
            choice = options.pop("choice", 0)
            triton.runtime.driver.set_active(Driver(chip))
            launched.clear()
            devices.emulated = chip
            try:
                globals()[name](**options)
            except Exception as error:
                failed.append(f"{name} for sm_{chip}, choice {choice}, {options}: {error!r}, of {error.__cause__!r}")
            read = _read if until == "cubin" else _read_ptx
            results.append([{"name": of, "constants": known} | read(kernel, chip) for of, known, kernel in launched])
    if failed:
        raise RuntimeError("\n".join(failed))
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
        **_read_text(kernel.asm["ptx"]),
    }


def _read_ptx(kernel, chip: int) -> dict[str, Any]:
    """Returns what `_read` does as far as the PTX shows it."""
    unknown = dict.fromkeys(("registers", "shared", "total", "hot", "gemm"))
    return unknown | _read_text(kernel.asm["ptx"])


def _read_text(ptx: str) -> dict[str, Any]:
    return {"order": _ORDER.findall(ptx), "uneven": uneven_sums(ptx)}


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
    json.dump(_compile(json.load(sys.stdin), sys.argv[1]), sys.stdout)
