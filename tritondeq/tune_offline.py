"""What the compiler makes of the candidates of `tune`, for a chip that need not be here: counts, and no times."""

from collections.abc import Iterator

import torch

from .kernels import dispatch, offline
from .tune import Job, Options, chosen, jobs_of


def report(options: Options, chip: int) -> Iterator[str]:
    """Markdown, line by line: for each shape a table of its candidates, that of the pure function first. Registers,
    spills (loads and stores of them, wherever in the kernel) and bytes of shared memory are the most of its kernels.

    Raises:
        OSError: there is no Triton to compile with; the message is a sentence.
    """
    if not dispatch.has_triton():
        raise OSError("triton is not installed: on Linux, pip install triton")
    found, unfit = jobs_of(options, torch.device("cpu"), offline.limits(chip))
    launches = {}
    for job in found:
        launches[str(job)] = [_launches(job, chip, config) for config in job.candidates]
    made = iter(offline.run([one for configs in launches.values() for several in configs for one in several]))
    for job in found:
        yield from _table(job, chip, [[next(made) for _ in several] for several in launches[str(job)]])
    yield from (f"Left out: {why}." for why in unfit)


def _launches(job: Job, chip: int, config: dict) -> list[dict]:
    """Those of all its works, each once."""
    every = [launch for work in job.works for launch in work.launches(chip, config)]
    return [launch for i, launch in enumerate(every) if launch not in every[:i]]


def _table(job: Job, chip: int, seen: list[list[dict]]) -> Iterator[str]:
    yield f"### {job}, sm_{chip}"
    yield ""
    yield "| candidate | registers | spills | shared memory | |"
    yield "|---|---:|---:|---:|---|"
    base = _spills(seen[0])
    for i, (config, kernels) in enumerate(zip(job.candidates, seen, strict=True)):
        *counts, why = _counts(kernels, chip, base)
        if i == 0:
            why = "the pure function's" + (f": {why}" if why else "")
        yield f"| {chosen(job.op, config)} | {' | '.join(counts)} | {why} |"
    yield ""


def _spills(kernels: list[dict]) -> int:
    totals = [kernel.get("total", {}) for kernel in kernels]
    return max(total.get("LDL", 0) + total.get("STL", 0) for total in totals)


def _counts(kernels: list[dict], chip: int, base: int) -> tuple[str, str, str, str]:
    """(registers, spills, shared memory, why it would be left out); `base` are the pure function's spills."""
    errors = [kernel["error"] for kernel in kernels if "error" in kernel]
    if errors:
        return "", "", "", f"does not compile: {errors[0]}".replace("|", "/")
    shared, spills = max(kernel["shared"] for kernel in kernels), _spills(kernels)
    why = "does not fit" if shared > offline.SHARED[chip] else "spills" if spills > base else ""
    return str(max(kernel["registers"] for kernel in kernels)), str(spills), str(shared), why
