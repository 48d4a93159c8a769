"""The cases of `solves.py` under pytest-benchmark, one contestant a benchmark: `pytest bench --benchmark-only`.

Each is checked against tritondeq's own result before its clock starts; a wrong one fails and has no time.
"""

import functools

import pytest
import torch

from tritondeq.bench import measure, solves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = solves.cases("quick", DEVICE.type == "cuda")
CONTESTANTS = (
    "tritondeq",
    "tritondeq Anderson",
    "eager loop",
    "eager Anderson",
    "torchdeq Picard",
    "torchdeq Anderson",
    "tied loop",
    "untied stack",
)


@functools.cache
def setup(case: solves.Case) -> tuple[solves.Setup, dict]:
    made = solves.Setup(case, DEVICE)
    return made, made.contestants(compiled=False)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_solve(benchmark, case, contestant):
    made, calls = setup(case)
    if contestant not in calls:
        pytest.skip("not in this case, or torchdeq is not installed")
    benchmark.group = str(case)
    benchmark.extra_info |= {"device": measure.machine(DEVICE)["device"], "steps": made.steps}

    def call():
        outcome = calls[contestant]()
        measure.synchronize(DEVICE)
        return outcome

    assert made.wrong(contestant, call()) is None
    benchmark(call)
