"""What ptxas makes of the fused solver steps, on chips that are not here."""

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline

SPILLS = {"sm80 picard:_step_kernel N8192 fp32 cell fp32 tanh of 1 memory5": 2}  # ptxas of Triton 3.6


def step_jobs():
    """By name; of each kernel what is launched, at memories from 1 to the most, and Broyden's default."""
    cases = [(64, 4, 4, 5), (8192, 4, 2, 8), (1 << 20, 4, 4, 5), (4096, 8, 8, 8), (999, 8, 8, 1), (2048, 4, 2, 8)]
    cases = [(90, *case) for case in [*cases, (2048, 4, 4, 1), (64, 4, 4, 10), (1000, 8, 8, 10)]]
    cases += [(chip, width, 4, 4, memory) for chip in (80, 100) for width, memory in ((8192, 5), (2048, 5), (2048, 10))]
    jobs = {}
    for kernel in launches.POINTERS:
        for chip, width, itemsize, cell, memory in cases:
            tail = launches.Tail("tanh") if cell == itemsize == 4 else launches.PLAIN
            add(jobs, kernel, chip, f"N{width}", width, itemsize, cell, memory, memory == 8, tail)
        for chip, itemsize, cell, tail in tails() if "finish" not in kernel else ():
            shape = f"rows of {tail.features}"
            add(jobs, kernel, chip, shape, 1024 * max(tail.features, 512), itemsize, cell, 8, False, tail)
            for memory in (5, 8):  # whole samples
                width = max(1, 2048 // max(tail.features, 512)) * max(tail.features, 512)
                add(jobs, kernel, chip, f"N{width} {shape}", width, itemsize, cell, memory, memory == 5, tail)
    return jobs


def add(jobs, kernel, chip, shape, width, itemsize, cell, memory, half, tail):
    op = kernel.partition(":")[0]
    config = launch.parameters("steps.picard", width=width, itemsize=itemsize, features=tail.features)
    if (op == "anderson" and memory > 8) or not launches.launched(kernel, config, itemsize, memory):
        return
    of = {"width": width, "itemsize": itemsize, "cell": cell, "memory": memory, "half": half, "tail": tail}
    floats = launches.FLOATS[itemsize], launches.FLOATS[cell]
    name = f"sm{chip} {kernel} {shape} {floats[0]} cell {floats[1]} {tail.act} of {tail.parts} memory{memory}"
    jobs[name] = launches.steps(kernel, chip, config, **of)


def tails():
    """(chip, itemsize, cell, tail) of the cells that have them, and of adjoints."""
    rms, gains = launches.Tail("rms", 2), (False, True, True)
    yield 90, 4, 4, launches.Tail("identity", 2)
    yield 90, 4, 4, launches.Tail("identity", 3, gains, features=512)
    for features in (16, 768, 4096):
        yield 90, 4, 2, rms._replace(features=features)
    yield 90, 8, 8, rms._replace(features=1024)
    for chip in (80, 90, 100):
        yield chip, 4, 4, launches.Tail("rms", 3, gains, True, 1024)


JOBS = step_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    """No spills, and room for a second program or for 16 warps, to hide the latency of memory behind."""
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["total"].get("LDL", 0) + seen["total"].get("STL", 0) <= SPILLS.get(name, 0)
    if job["types"]["z_ptr"] == "*fp32":
        programs = 1 if job["num_warps"] == 16 else 2
        assert seen["registers"] * job["num_warps"] * 32 <= 65536 // programs
    tile = job["constants"]["BLOCK_N"] * (8 if job["types"]["z_ptr"] == "*fp64" else 4)
    assert seen["shared"] <= max(4096, tile), "more than a tile on its way from one layout to another"
