"""What this machine will run, and why: the text of `python -m tritondeq doctor`."""

import itertools
import os
import platform
from collections.abc import Iterator
from functools import cache, partial
from importlib import metadata, util

import torch

from .cells import MLP, Affine, Gated
from .kernels import dispatch, launch, tables
from .loop import plan_steps
from .solvers import Anderson, Broyden, Picard

EXTRAS = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "tqdm": "tqdm", "torchdeq": "torchdeq"}
WIDTHS = (64, 128, 256, 512)
TOL = 1e-3
CELLS = {
    "Affine, float32": Affine,
    "Affine, bf16 operands": partial(Affine, operands="bf16"),
    "Affine, float64": partial(Affine, dtype=torch.float64),
    "MLP, float32": MLP,
    "MLP, bf16 operands": partial(MLP, operands="bf16"),
    "Gated, float32": Gated,
    "Gated, bf16 operands": partial(Gated, operands="bf16"),
}
SOLVERS = (Picard(), Anderson(memory=4), Anderson())
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-windows")


def report() -> str:
    """A section each: versions, GPUs, the backend in force, the path of typical solves, tables of launch parameters,
    optional packages."""
    sections = {
        f"tritondeq {_version('tritondeq')}": _versions(),
        "GPUs": _gpus(),
        "Backend": [_backend()],
        "Solves": _solves(),
        "Launch parameters": _tables(),
        "Optional packages": _extras(),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _versions() -> list[str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    triton = (
        _version(*TRITON_PACKAGES)
        if dispatch.has_triton()
        else "not installed: every solve runs in torch. On Linux, pip install triton"
    )
    return [
        f"machine  {platform.platform()}, {platform.machine()}, {os.cpu_count()} CPU cores",
        f"python   {platform.python_version()}",
        f"torch    {torch.__version__}, {build}",
        f"triton   {triton}",
        f"numpy    {_version('numpy') if util.find_spec('numpy') else 'not installed: pip install numpy'}",
    ]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        why = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        return [f"none: {why}. Solves run on the CPU, in torch"]
    return [_gpu(i) for i in range(torch.cuda.device_count())]


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    shared = getattr(gpu, "shared_memory_per_block_optin", None)  # torch 2.6 does not tell
    return (
        f"cuda:{index}  {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB, "
        f"{gpu.multi_processor_count} multiprocessors"
        + (f", {shared / 2**10:.0f} KiB shared memory per block" if shared else "")
    )


def _backend() -> str:
    says = {
        "auto": "Triton for CUDA tensors where it can, else torch",
        "triton": "Triton, or an error where it can't run",
        "torch": "torch for everything",
    }
    interpreted = "; TRITON_INTERPRET is set: kernels are interpreted, slowly" if dispatch.interpreting() else ""
    return f"{dispatch.chosen()}: {says[dispatch.chosen()]}{interpreted}"


def _solves() -> Iterator[str]:
    devices = {"cpu": torch.device("cpu")}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.device("cuda", i)
    if len(devices) == 1:
        devices["a CUDA device, if there were one"] = torch.device("cuda")
    for label, device in devices.items():
        answers = _answers(device)
        if len(answers) == 1:
            yield f"{label}: {next(iter(answers))}, for every problem asked"
        else:
            yield label
            for answer, problems in answers.items():
                yield f"  {answer}"
                yield from (f"    {problem} by {', '.join(solvers)}" for problem, solvers in problems.items())
        yield f"  a step of the loop, any cell: {', '.join(_steps(device))}"


def _steps(device: torch.device) -> Iterator[str]:
    for solver in (Picard(), Anderson(), Broyden()):
        try:
            op, how = plan_steps(solver, device, width=WIDTHS[0], dtype=torch.float32)
        except (ImportError, RuntimeError) as error:
            op, how = None, f"an error: {error}"
        yield f"{type(solver).__name__} {how if op else 'in torch'}"


def _answers(device: torch.device) -> dict[str, dict[str, list[str]]]:
    """For each answer of the dispatcher, the problems that get it, and for each problem the solvers."""
    answers: dict[str, dict[str, list[str]]] = {}
    wholes = _wholes()
    for solver, kind in itertools.product(SOLVERS, CELLS):
        widths: dict[str, list[str]] = {}
        for width in WIDTHS:
            widths.setdefault(_answer(wholes[kind, width], solver, device), []).append(str(width))
        for answer, those in widths.items():
            problem = f"{kind}, {'/'.join(those)} features,"
            answers.setdefault(answer, {}).setdefault(problem, []).append(_name(solver))
    return answers


@cache
def _wholes() -> dict[tuple[str, int], dispatch.WholeSolve]:
    """What real cells ask for, by kind and width."""
    with torch.random.fork_rng([]):  # making a cell draws its weights
        cells = {(kind, width): make(width) for kind, make in CELLS.items() for width in WIDTHS}
    return {key: cell.whole_solve(cell.inject(cell.input.weight.new_zeros(1, key[1]))) for key, cell in cells.items()}


def _answer(whole: dispatch.WholeSolve, solver: Picard | Anderson, device: torch.device) -> str:
    fused = solver.fused()
    if fused is None:
        return f"the loop: no whole-solve kernel does {_name(solver)}"
    try:
        op, why = whole.pick(device, fused["memory"], TOL)
    except (ImportError, RuntimeError) as error:
        return f"an error: {error}"
    return why if op else f"the loop: {why}"


def _name(solver: Picard | Anderson) -> str:
    return f"Anderson({solver.memory})" if isinstance(solver, Anderson) else "Picard"


def _tables() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "pure functions of the shape; `python -m tritondeq tune` measures them where there is a GPU"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}  {tables.summary(launch.gpu(torch.device('cuda', i)))}"


def _extras() -> Iterator[str]:
    for package, module in EXTRAS.items():
        found = _version(package) if util.find_spec(module) else f"not installed: pip install {package}"
        yield f"{package:<14}{found}"
