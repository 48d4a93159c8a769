"""Measures launch parameters on the GPU at hand: `python -m tritondeq tune`."""

import datetime
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import dispatch, launch, offline, tables, trials
from .toolbox import table, writable
from .works import Problem, Work, works

FACTOR, FLOOR = 2.0, 1e-5  # a candidate's error may be this much above that of the pure function's parameters
SANE = 1e-2  # relative error above which these themselves are wrong
LEAST = 1.02  # gain from which a candidate is more than noise
OLDEST = (8, 0)


@dataclass(frozen=True)
class Options:
    """What to measure: every combination of these; with `fresh` also what has been, with `all` also what is rare."""

    cells: list[str]
    features: list[int]
    rows: list[int]
    dtypes: list[str]
    fresh: bool = False
    all: bool = False


@dataclass
class Job:
    """Problems that one choice is made for.

    Attributes:
        key: What the choice depends on, as the op's space has it.
    """

    op: str
    key: dict[str, Any]
    works: list[Work] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(map(str, self.works))

    @property
    def candidates(self) -> list[dict]:
        return launch.candidates(self.op, **self.works[0].shape)


@dataclass(frozen=True)
class Outcome:
    """The best candidate, the time of the pure function's over its own for each work, and the others that were left out
    by why."""

    config: dict
    gains: list[float]
    left_out: Counter

    @property
    def gain(self) -> float:
        return math.exp(sum(map(math.log, self.gains)) / len(self.gains))


class Unfit(Exception):
    """A job that can't be measured; the message says why, and what to do."""


def run(
    options: Options, finished: list[str], device: torch.device | None = None, clock: Callable | None = None
) -> int:
    """The command; exit status 0, or 1 where nothing could be measured.

    Args:
        finished: Gets what has been, in case of an interruption.
        device: Default is the current GPU.
        clock: call -> seconds of one call.

    Raises:
        OSError: the table can't be written, or nothing can be measured here; the message is a sentence.
    """
    if device is None and not torch.cuda.is_available():
        print(_explain(options))
        return 1
    device = device or torch.device("cuda", torch.cuda.current_device())
    gpu, path = _ready(device)
    done = _done(path, gpu)
    jobs, unfit = jobs_of(options, device)
    left = [job for job in jobs if options.fresh or not _covers(done, job)]
    print(f"{gpu.name}, triton {tables.version()}: {len(left)} choices to measure, {len(jobs) - len(left)} known")
    failed = _measure_all(left, gpu, clock or trials.seconds, finished, unfit)
    if len(left) > failed:
        print(f"written: {path}")
    return int(not jobs or (failed == len(left) > 0))


def _measure_all(jobs: list[Job], gpu: tables.Gpu, clock: Callable, finished: list[str], unfit: list[str]) -> int:
    """Writes each choice as soon as it is made; how many could not be."""
    failed = 0
    with _Bar(sum(len(job.candidates) * len(job.works) for job in jobs)) as bar:
        for why in unfit:
            bar.say(f"left out: {why}")
        for job in jobs:
            try:
                outcome = measure(job, clock, bar.tick)
            except Unfit as error:
                failed += 1
                bar.say(f"left out: {error}")
                continue
            tables.write(gpu, entry(job, outcome), launch.spaces())
            launch.reread()
            finished.append(str(job))
            bar.say(describe(job, outcome))
    return failed


def jobs_of(
    options: Options, device: torch.device, limits: dict[str, int] | None = None
) -> tuple[list[Job], list[str]]:
    """(what to measure, what is rare last; why some of it can't be); `limits` of another GPU than the device."""
    jobs: dict[tuple, Job] = {}
    unfit = []
    for rare, cell, features, dtype, rows in itertools.product(
        (False, True) if options.all else (False,),
        options.cells,
        options.features,
        options.dtypes,
        sorted(set(options.rows)),
    ):
        try:
            found = list(works(cell, features, rows, dtype, device, limits, rare))
        except ValueError as error:
            unfit += [str(error)] if str(error) not in unfit else []
            continue
        for work in found:
            key = launch.spaces()[work.op].key(**work.shape)
            job = jobs.setdefault((work.op, *key.items()), Job(work.op, key))
            job.works += [work] if str(work) not in map(str, job.works) else []
    return list(jobs.values()), unfit


def measure(job: Job, clock: Callable, tick: Callable = lambda: None) -> Outcome:
    """Times every candidate that is right and spills no more registers than the pure function's does.

    Raises:
        Unfit: the shape does not fit in memory, or the pure function's parameters themselves fail.
    """
    configs = job.candidates
    times: dict[int, list[float]] = {i: [] for i in range(len(configs))}
    left_out: Counter = Counter()
    for work in job.works:
        try:
            torch.manual_seed(0)
            problem, base = work.prepare(), None
            for i in list(times):
                tick()
                trial = _trial(work, problem, configs[i], clock, base)
                if trial.why and i == 0:
                    raise Unfit(f"{work}: what the pure function gives {trial.why}; please report it")
                if trial.why:
                    left_out[trial.why.partition(":")[0]] += 1
                    del times[i]
                else:
                    base = base or trial
                    times[i].append(trial.seconds)
        except torch.OutOfMemoryError as error:
            raise Unfit(f"{work} does not fit in the memory of this GPU: take fewer --rows or --features") from error
    best = min(times, key=lambda i: math.prod(times[i]))
    outcome = Outcome(configs[best], [a / b for a, b in zip(times[0], times[best], strict=True)], left_out)
    return outcome if outcome.gain >= LEAST else Outcome(configs[0], [1.0] * len(job.works), left_out)


class Trial(NamedTuple):
    """Why a candidate is left out, or None; and what was found of it."""

    why: str | None
    errors: tuple[float, ...] = ()
    spills: int = 0
    seconds: float = 0.0


def _trial(work: Work, problem: Problem, config: dict, clock: Callable, base: Trial | None) -> Trial:
    """Of a candidate; `base` is that of the pure function's parameters, None for these themselves."""
    try:
        with launch.trial(work.op, work.shape, config):
            with trials.launched() as kernels:
                made = problem.run()
            spills = trials.spills(kernels)
            if base and spills > base.spills:
                return Trial("spills")
            errors = tuple(_error(*pair) for pair in zip(made, problem.exact, strict=True))
            bounds = [FACTOR * error + FLOOR for error in base.errors] if base else [SANE] * len(errors)
            if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
                return Trial("is wrong")
            return Trial(None, errors, spills, clock(problem.timed()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, or of a launch: that candidate won't do
        return Trial(f"fails: {type(error).__name__}: {error}".splitlines()[0])


def _error(made: Tensor, exact: Tensor) -> float:
    return ((made.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def entry(job: Job, outcome: Outcome) -> tables.Entry:
    parameters = {name: outcome.config[name] for name in launch.spaces()[job.op].names}
    measured, today = tuple(map(str, job.works)), datetime.date.today().isoformat()
    made = {"measured": measured, "gain": round(outcome.gain, 3), "date": today}
    return tables.Entry(job.op, job.key, parameters, **made, triton=tables.version(), source=tables.source(job.op))


def describe(job: Job, outcome: Outcome) -> str:
    """One line: each shape with its gain over the pure function, what was chosen, and what was left out."""
    gains = ", ".join(f"{work} {gain:.2f}x" for work, gain in zip(job.works, outcome.gains, strict=True))
    left = "".join(f", {number} {why}" for why, number in sorted(outcome.left_out.items()))
    return f"{gains}: {chosen(job.op, outcome.config)} of {len(job.candidates)} candidates{left}"


def chosen(op: str, config: dict) -> str:
    """The parameters that were chosen, in words."""
    return " ".join(f"{name} {config[name]}" for name in launch.spaces()[op].names)


def _done(path: Path, gpu: tables.Gpu) -> list[tables.Entry]:
    known = tables.read(path, gpu, launch.spaces())
    if known is not None and known.fault:
        print(f"{path} is damaged ({known.fault}): what of it is no entry will be written over.")
    return [one for one in known.entries if not one.stale] if known else []


def _covers(done: list[tables.Entry], job: Job) -> bool:
    wanted = set(map(str, job.works))
    return any(one.op == job.op and one.shape == job.key and wanted <= set(one.measured) for one in done)


def _ready(device: torch.device) -> tuple[tables.Gpu, Path]:
    """Whose table to write, and where; OSError with a sentence if that can't be."""
    gpu = launch.gpu(device)
    if gpu.capability < OLDEST:
        major, minor = gpu.capability
        raise OSError(f"{gpu.name} has capability {major}.{minor}, and the kernels are tuned from 8.0 (A100) on")
    if not dispatch.has_triton():
        raise OSError("triton is not installed: on Linux, pip install triton")
    if dispatch.too_old():
        raise OSError(dispatch.too_old())
    path = tables.folder() / tables.paths(gpu)[0].name
    try:
        with writable(path.parent):
            return gpu, path
    except OSError as error:
        raise OSError(f"{error}: set TRITONDEQ_CACHE to a folder that can be written to") from error


def _explain(options: Options) -> str:
    """What a machine without a GPU is told."""
    jobs, unfit = jobs_of(options, torch.device("cpu"), offline.limits(90))
    rows = []
    for job in jobs:
        head = str(job.works[0]) + (f" and {len(job.works) - 1} more" if len(job.works) > 1 else "")
        rows.append([head, str(len(job.candidates)), chosen(job.op, job.candidates[0])])
    lines = [
        "This machine has no GPU that torch sees, so nothing is measured. On one, this would time the candidates",
        f"below that are right and spill no registers anew, write the fastest to {_where()}, and say what it gains.",
        "Until then launches take what the pure functions of the shape give, here for sm_90:",
        "",
        table(["shape", "candidates", "the pure function's"], rows),
    ]
    return "\n".join([*lines, *(f"left out: {why}" for why in unfit)])


def _where() -> str:
    try:
        return f"{tables.folder()}/<gpu>.json"
    except OSError:
        return "a cache folder, which this machine lacks: set TRITONDEQ_CACHE"


class _Bar:
    """A progress bar where tqdm and a terminal are there, and lines on stdout either way."""

    def __init__(self, total: int):
        self.bar = None
        if util.find_spec("tqdm") and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="launch", file=sys.stderr)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tick(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line, file=sys.stdout)
