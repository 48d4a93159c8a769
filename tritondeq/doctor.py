"""What this machine will run: the text of `python -m tritondeq doctor`."""

import os
import platform
from contextlib import suppress
from importlib import metadata, util
from typing import Any

import torch

from .cells import MLP, Affine, Gated
from .kernels import devices, dispatch, tables
from .loop import plan_steps
from .solvers import Anderson, Broyden, Picard
from .toolbox import table

EXTRAS = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "tqdm": "tqdm", "torchdeq": "torchdeq"}
WIDTHS = (64, 128, 256, 512)
TOL = 1e-3
CELLS: tuple[Any, ...] = (Affine, MLP, Gated)
BACKENDS = {
    "auto": "Triton for CUDA tensors where it can, else torch",
    "triton": "Triton, or an error where it can't run",
    "torch": "torch for everything",
}
LEGEND = """whole: one Triton launch for the solve; gemm: one launch a step, with its product; steps: the loop with
fused kernels for its steps; torch: the loop in torch. `Solution.why` has the reason."""


def report() -> str:
    """Returns versions, GPUs, the backend, what runs in Triton on each kind of GPU, and missing packages."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    absent = "not installed: every solve runs in torch. On Linux, pip install triton"
    triton = _version("triton", "pytorch-triton", "triton-windows") if dispatch.has_triton() else absent
    lines = [
        f"tritondeq  {_version('tritondeq')}, {platform.platform()}, {os.cpu_count()} CPU cores",
        f"python     {platform.python_version()}",
        f"torch      {torch.__version__}, {build}",
        f"triton     {triton}",
        f"numpy      {_version('numpy')}",
    ]
    lines += [f"cuda:{i}     {_gpu(gpu)}" for i, gpu in enumerate(gpus)]
    unfit = [(i, devices.lacks(torch.device("cuda", i))) for i in range(len(gpus))]
    lines += [f"kernels    not on cuda:{i}: {why}" for i, why in unfit if why]
    lines += [] if gpus else ["GPU        no CUDA device: solves run in torch on the CPU"]
    lines.append(f"backend    {dispatch.chosen()}: {BACKENDS[dispatch.chosen()]}")
    if dispatch.interpreting():
        lines.append("kernels    TRITON_INTERPRET is set: they are interpreted, slowly")
    if missing := [package for package, module in EXTRAS.items() if not util.find_spec(module)]:
        lines.append(f"optional   not installed: pip install {' '.join(missing)}")
    kinds = {gpu.name: torch.device("cuda", i) for i, gpu in enumerate(gpus)}
    lines += [f"\n{name}\n{_solves(device)}" for name, device in kinds.items()]
    if gpus:
        lines.append("\nlaunch parameters")
        lines += [f"cuda:{i}  {tables.summary(torch.cuda.get_device_name(i))}" for i in range(len(gpus))]
    return "\n".join(lines)


def _version(*packages: str) -> str:
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "of unknown version"


def _gpu(gpu: Any) -> str:
    shared = getattr(gpu, "shared_memory_per_block_optin", None)  # torch 2.6 does not have it
    text = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB, "
    text += f"{gpu.multi_processor_count} multiprocessors"
    return text + (f", {shared / 2**10:.0f} KiB shared memory per block" if shared else "")


def _solves(device: torch.device) -> str:
    """Returns a table of how the library's cells are solved on a device, by number of features."""
    rows = []
    try:
        for cell in CELLS:
            for name, options in ((cell.__name__, {}), (f"{cell.__name__}, bf16 operands", {"operands": "bf16"})):
                wholes = [_whole(cell, width, options) for width in WIDTHS]
                for solver in (Picard(), Anderson(memory=4)):
                    rows.append([f"{name}, {type(solver).__name__}", *(_solve(w, solver, device) for w in wholes)])
        rows += [[f"any cell, {type(s).__name__}", *[_step(s, device)] * 4] for s in (Picard(), Anderson(), Broyden())]
    except (ImportError, RuntimeError) as error:
        return f"an error: {error}"
    return f"{table(['cell and solver', *map(str, WIDTHS)], rows)}\n{LEGEND}"


def _whole(cell: Any, width: int, options: dict[str, str]) -> dispatch.WholeSolve:
    with torch.device("meta"):  # only shapes count, and drawing weights takes seconds
        made = cell(width, **options)
    return made.to_empty(device="cpu").whole_solve(made.inject(torch.zeros(1, width, device="cpu")))


def _solve(whole: dispatch.WholeSolve, solver: Picard | Anderson, device: torch.device) -> str:
    op, _ = whole.pick(device, solver.fused()["memory"], TOL)
    return _step(solver, device) if op is None else "gemm" if isinstance(op, dispatch.CellOp) else "whole"


def _step(solver: Picard | Anderson | Broyden, device: torch.device) -> str:
    return "steps" if plan_steps(solver, device, width=WIDTHS[0], dtype=torch.float32)[0] else "torch"
