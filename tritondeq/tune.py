"""Measures launch parameters on the GPU at hand: `python -m tritondeq tune`.

It runs layers as users do, forward and backward, and learns from `launch.recorded` which ops they launch at which
shapes. For each of these it tries the candidates of launch.py, leaves out what fails or is wrong, and writes the
fastest to the table of the GPU (kernels/tables.py).
"""

import copy
import datetime
import itertools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import cells
from .deq import DEQ
from .kernels import devices, dispatch, launch, tables
from .solvers import Anderson, Broyden, Picard, Solver
from .toolbox import writable

FACTOR, FLOOR = 2.0, 1e-5  # a candidate's error may be this much above that of the pure function's parameters
SANE = 0.1  # relative error above which these themselves are wrong
LEAST = 1.02  # gain from which a candidate is more than noise
TOL = 1e-4  # of solves whose state is float32 or float64; narrower ones take the layer's default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
ROWS = {"affine": cells.Affine, "monotone": cells.Monotone, "mlp": cells.MLP, "gated": cells.Gated}
CELLS = (*ROWS, "transformer", "conv", "any")
SOLVERS = (Picard(), Anderson(), Broyden())  # of cells outside of ROWS; the others have the cell's default


class _Any(nn.Module):
    """A cell without kernels, which costs next to nothing beside the steps of its solver."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(z)


@dataclass(frozen=True)
class Workload:
    """A layer and its input.

    `cell` is one of CELLS, `features` the width of a row, or channels, and `rows` the rows, tokens or pixels of all
    samples together, as far as whole samples allow. `dtype` is a key of DTYPES; bf16 are the operands of a cell of
    ROWS, and all of another. Without a solver it is the cell's default.
    """

    cell: str
    features: int
    rows: int
    dtype: str
    solver: Solver | None = None

    def __str__(self) -> str:
        solver = f" {type(self.solver).__name__}" if self.solver else ""
        return f"{self.cell} {self.rows}x{self.features} {self.dtype}{solver}"

    def prepare(self, device: torch.device) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        """Returns a call that solves and differentiates, and what it should give, by torch in float64."""
        features, dtype = self.features, DTYPES[self.dtype]
        shape: tuple[int, ...] = self.rows, features
        cell: nn.Module
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            if self.cell in ROWS:
                narrow = {"operands": "bf16"} if self.dtype == "bf16" else {"dtype": dtype}
                cell = ROWS[self.cell](features, **narrow)
                dtype = torch.promote_types(dtype, torch.float32)
            elif self.cell == "transformer":
                cell = cells.Transformer(features, heads=math.gcd(8, features), dtype=dtype)
                tokens = max(1, min(self.rows, launch.WIDE // features))
                shape = max(1, self.rows // tokens), tokens, features
            elif self.cell == "conv":
                cell = cells.Conv(features, dtype=dtype)
                side = next((side for side in (32, 8) if side * side <= self.rows), 2)
                shape = max(1, self.rows // side**2), features, side, side
            else:
                cell = _Any()
            tol = None if dtype == torch.bfloat16 else TOL
            layer = DEQ(cell, solver=self.solver, tol=tol, max_steps=100).to(device)
            x, cotangent = torch.randn(2, *shape).to(device, dtype)
        exact = copy.deepcopy(layer).double()
        exact.tol, exact.max_steps = 1e-10, 1000
        with dispatch.backend("torch"):
            reference = _solved(exact, x.double(), cotangent.double())
        return partial(_solved, layer, x, cotangent), reference


def _solved(layer: DEQ, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Returns the fixed point, the gradient of x, and those of all parameters as one vector."""
    x, parameters = x.detach().requires_grad_(), list(layer.parameters())
    z = layer(x)
    dx, *rest = torch.autograd.grad(z, [x, *parameters], cotangent, materialize_grads=True)
    return [z.detach(), dx, torch.cat([one.flatten() for one in [*rest, dx.new_zeros(1)]])]


@dataclass
class Job:
    """A choice to make: an op at a shape and its key in launch.py, and the workloads that launch it."""

    op: str
    shape: dict[str, Any]
    key: dict[str, Any]
    workloads: list[Workload]

    def __str__(self) -> str:
        return f"{self.op} of {', '.join(map(str, self.workloads))}"


def seconds(call: Callable[[], Any]) -> float:
    """Returns the median time of a call on the GPU, by triton.testing.do_bench."""
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=10, rep=50, return_mode="median")


def workloads(cells: list[str], features: list[int], rows: list[int], dtypes: list[str]) -> list[Workload]:
    """Returns every combination of these, each once."""
    every = dict.fromkeys(itertools.product(cells, features, rows, dtypes))
    return [Workload(*one, solver) for one in every for solver in ((None,) if one[0] in ROWS else SOLVERS)]


def run(
    workloads: list[Workload],
    finished: list[str],
    *,
    fresh: bool = False,
    device: torch.device | None = None,
    gpu: str | None = None,
    clock: Callable[[Callable], float] = seconds,
) -> int:
    """Makes the choices that these workloads ask for, and writes each at once to the table of this GPU.

    `finished` gets the jobs that are written, for the message after an interruption. With `fresh` it measures again
    what the table has. The other arguments are for tests.

    Returns:
        The exit status: 0, or 1 where nothing could be measured.

    Raises:
        OSError: The table can't be written, or there is no Triton to measure; the message is a sentence.
    """
    if device is None and not torch.cuda.is_available():
        print(
            "tune needs a GPU, and torch sees none here. It would run layers on it, time what they launch with all "
            "parameters that fit, and write the fastest to a table. Until then launches take those of pure functions."
        )
        return 1
    device = device or torch.device("cuda", torch.cuda.current_device())
    gpu = gpu or torch.cuda.get_device_name(device)
    path = _table(gpu, device)
    known, fault = tables.read(gpu)
    if fault:
        print(f"{fault}: it is begun anew", flush=True)
    done = {} if fresh else {(one.op, str(one.key)): one.measured for one in known}
    with dispatch.backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(str(path)))  # launches warn of that fault, too
        jobs = _jobs(workloads, device)
        left = [job for job in jobs if not set(map(str, job.workloads)) <= set(done.get((job.op, str(job.key)), ()))]
        print(f"{gpu}: {len(left)} choices to make, {len(jobs) - len(left)} known", flush=True)
        for i, job in enumerate(left, 1):
            try:
                entry = measure(job, device, clock)
            except Exception as error:  # of the memory, the compiler or a launch
                _left_out(job, error)
                continue
            tables.write(gpu, entry)
            launch.reread()
            finished.append(str(job))
            words = " ".join(f"{name} {value}" for name, value in entry.choice.items()) or "the pure function's"
            print(f"[{i}/{len(left)}] {job}: {entry.gain:.2f}x with {words}", flush=True)
    if finished:
        print(f"written: {path}")
    return int(not jobs or (bool(left) and not finished))


def _jobs(workloads: list[Workload], device: torch.device) -> list[Job]:
    """Runs each workload once, to see what it launches."""
    print(f"running {len(workloads)} layers once, to see what they launch", flush=True)
    jobs: dict[tuple, Job] = {}
    for workload in workloads:
        try:
            with launch.recorded() as asked:
                workload.prepare(device)[0]()
        except Exception as error:  # of the cell, the memory or the compiler
            _left_out(workload, error)
            continue
        for op, shape in asked:
            if len(launch.candidates(op, **shape)) > 1:
                key = launch.key(op, **shape)
                job = jobs.setdefault((op, str(key)), Job(op, shape, key, []))
                job.workloads += [] if workload in job.workloads else [workload]
    return list(jobs.values())


def measure(job: Job, device: torch.device, clock: Callable[[Callable], float] = seconds) -> tables.Entry:
    """Returns the choice that is right and has the least product of times over all workloads.

    Raises:
        RuntimeError: the pure function's parameters are wrong. Whatever they raise passes, too.
    """
    choices = launch.candidates(job.op, **job.shape)
    prepared = [workload.prepare(device) for workload in job.workloads]

    def errors(choice: dict) -> list[float]:
        with launch.override(job.op, choice, job.key):
            pairs = [pair for call, exact in prepared for pair in zip(call(), exact, strict=True)]
        return [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]

    def time(choice: dict) -> float:
        with launch.override(job.op, choice, job.key):
            return math.prod(clock(call) for call, _ in prepared) ** (1 / len(prepared))

    bounds = [FACTOR * error + FLOOR for error in errors({})]
    if not all(bound <= FACTOR * SANE for bound in bounds):
        raise RuntimeError("the pure function's parameters give wrong results; please report it")
    times = [(time({}), 0)]
    for i, choice in enumerate(choices[1:], 1):
        try:
            if all(error <= bound for error, bound in zip(errors(choice), bounds, strict=True)):
                times.append((time(choice), i))
        except Exception:  # of the compiler, or of a launch: this choice will not do
            continue
    best = choices[min(times)[1]]
    gain = time({}) / time(best) if best else 1.0  # anew, because the least of many times is low by chance
    if gain < LEAST:
        best, gain = {}, 1.0
    names, today = [str(workload) for workload in job.workloads], datetime.date.today().isoformat()
    return tables.Entry(job.op, job.key, best, round(gain, 3), names, today)


def _left_out(what: Job | Workload, error: Exception) -> None:
    print(f"left out: {what}: {type(error).__name__}: {error}".splitlines()[0][:300], flush=True)


def _table(gpu: str, device: torch.device) -> Path:
    """Returns the table's path; raises OSError where it can't be written, or where no kernel runs to be measured."""
    why = dispatch.too_old() if dispatch.has_triton() else "triton is not installed: on Linux, pip install triton"
    why = why or devices.lacks(device)
    if why:
        raise OSError(why)
    path = tables.path(gpu)
    try:
        with writable(path.parent):
            return path
    except OSError as error:
        raise OSError(f"{error}: set TRITONDEQ_CACHE to a folder that can be written to") from error
