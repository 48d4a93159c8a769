"""What ptxas makes of the fused solver steps, on chips that are not here."""

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline

SPILLS = {"sm90 broyden:_measure_kernel N1048576 fp32 cell fp32 memory5": 2}  # with Triton 3.4 and 3.5, none since


def step_jobs():
    cases = [
        (90, *case) for case in [(64, 4, 4, 5), (8192, 4, 2, 8), (1 << 20, 4, 4, 5), (4096, 8, 8, 8), (999, 8, 8, 1)]
    ]
    cases += [(chip, 8192, 4, 4, 5) for chip in (80, 100)]
    jobs = {}
    for kernel in launches.POINTERS:
        for chip, width, itemsize, cell, memory in cases:
            config = launch.parameters("picard", width=width, itemsize=itemsize)
            tail = "tanh" if cell == itemsize == 4 else "identity"
            of = {"itemsize": itemsize, "cell": cell, "memory": memory, "half": memory == 8, "tail": tail}
            floats = launches.FLOATS[itemsize], launches.FLOATS[cell]
            name = f"sm{chip} {kernel} N{width} {floats[0]} cell {floats[1]} memory{memory}"
            jobs[name] = launches.steps(kernel, chip, config, **of)
    return jobs


JOBS = step_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    """No spills, and room for a second program on a multiprocessor, to hide the latency of memory behind."""
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["total"].get("LDL", 0) + seen["total"].get("STL", 0) <= SPILLS.get(name, 0)
    if job["types"]["z_ptr"] == "*fp32":
        assert seen["registers"] * job["num_warps"] * 32 <= 65536 // 2
    assert seen["shared"] <= 4096
