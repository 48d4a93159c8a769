"""The cases of the bench under pytest-benchmark, one contestant a benchmark: `pytest bench --benchmark-only`.

A solve is checked against tritondeq's result before its clock starts; a wrong one fails and has no time.
"""

import functools

import pytest
import torch

from tritondeq.bench import machine, rivals, solves, steps
from tritondeq.toolbox import one_thread, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = solves.cases("quick", DEVICE.type == "cuda")
SHAPES = steps.suite_shapes("quick", DEVICE.type == "cuda")
SOLVES = ("tritondeq", "tritondeq Anderson", *rivals.SOLVERS, "tied loop", "untied stack")
STEPS = ("bare cell", *steps.OURS, *(f"{name}, graph" for name in steps.OURS), *rivals.SOLVERS)


@functools.cache
def setup(case: solves.Case) -> tuple[solves.Setup, dict]:
    """Returns the case on the device, and its contestants."""
    made = solves.Setup(case, DEVICE)
    return made, made.contestants(compiled=False)


def call_of(benchmark, calls: dict, contestant: str):
    """Returns the call of one contestant, which waits for the device."""
    if contestant not in calls:
        pytest.skip("not in this case or on this device, or torchdeq is not installed")
    benchmark.extra_info["device"] = machine.describe(DEVICE)["device"]

    def call():
        outcome = calls[contestant]()
        synchronize(DEVICE)
        return outcome

    return call


@pytest.mark.parametrize("contestant", SOLVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_solve(benchmark, case, contestant):
    """A whole solve, or a training step."""
    made, calls = setup(case)
    call = call_of(benchmark, calls, contestant)
    benchmark.group = str(case)
    assert made.wrong(contestant, call()) is None
    benchmark(call)


@pytest.mark.parametrize("contestant", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.rows}x{s.features}")
def test_step(benchmark, shape, contestant):
    """A whole call of steps.EVALUATIONS evaluations, in one thread."""
    with one_thread():
        call = call_of(benchmark, steps.contestants(shape, DEVICE), contestant)
        benchmark.group = f"{steps.EVALUATIONS} evaluations at {shape.rows}x{shape.features}"
        benchmark(call)
