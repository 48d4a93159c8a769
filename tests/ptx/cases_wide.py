"""Cases of states whose rings have more than 2^31 elements, of which memory is reserved and only the start is used."""

import math
import mmap
from contextlib import contextmanager
from dataclasses import asdict

import torch
import triton

from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.tails import Tail

from .cases import Outcome, case
from .cases_steps import SOLVERS

COLUMNS = 256  # that one program takes
NO_RESERVE = 0x4000  # Linux; Python has no name for it


@contextmanager
def unwatched():
    """Has no races looked for, which takes memory for each element."""
    options = triton.runtime.driver.active.options
    races, options.races = options.races, "off"
    try:
        yield
    finally:
        options.races = races


def reserved(*size: int) -> torch.Tensor:
    """Returns zeros that take memory where they are touched alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(size), flags=flags), dtype=torch.float32).view(size)


@case(
    most=1,
    anderson={"solver": SOLVERS["anderson3"]},
    half={"solver": SOLVERS["half"]},
    broyden={"solver": SOLVERS["broyden3"]},
)
def steps_wide_rings(solver, width=2**30 + 2**12, evaluations=6):
    """The program of a sample's first columns does there what it does where there are no others."""
    images, start = torch.randn(evaluations, 1, COLUMNS), torch.randn(1, COLUMNS)
    with unwatched(), launch.override(solver.fused_steps, {"BLOCK_N": COLUMNS, "SPLITS": 1}):
        narrow, wide = (
            dispatch.load(solver.fused_steps).start(start, None, 1e-12, evaluations, Tail(), **asdict(solver))
            for _ in range(2)
        )
        for name, value in vars(narrow).items():
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (COLUMNS,) and value.is_floating_point():
                large = reserved(*value.shape[:-1], width * value.element_size() // 4).view(value.dtype)
                large[..., :COLUMNS] = value
                setattr(wide, name, large)
        wide.known |= {"N": width, "WIDE": True}
        wide.mask = wide.z
        if solver is SOLVERS["anderson3"]:
            wide.g = wide.dg
        for image in images:
            for steps in (narrow, wide):
                steps.take(image)
                steps.onward()
        iterates = narrow.z, wide.z[:, :COLUMNS].clone()
    outcome = Outcome(iterates)
    outcome.expect((iterates[0] == iterates[1]).all(1), "the iterate", iterates[1], iterates[0])
    return outcome
