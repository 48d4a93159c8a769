"""What ptxas makes of the row ops, on chips that are not here."""

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline
from tritondeq.kernels.norms.residual_rms import MOST

CASES = [(90, features, 4, 4) for features in (1, 100, 512, 1024, MOST)] + [(90, 1024, 4, 2), (90, MOST, 2, 2)]
CASES += [(chip, features, 4, 2) for chip in (80, 100) for features in (64, 1024, MOST)]


def row_jobs():
    jobs = {}
    for chip, features, wide, narrow in CASES:
        config = launch.parameters("norms.residual_rms", features=features)
        name = f"sm{chip} D{features} {launches.FLOATS[wide]} + {launches.FLOATS[narrow]}"
        jobs[name] = launches.residual_rms(chip, config, features=features, a=wide, b=narrow)
    return jobs


JOBS = row_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    """No spills, room for a second program on a multiprocessor, and 16 bytes a load where features allow it."""
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["total"].get("LDL", 0) + seen["total"].get("STL", 0) == 0
    assert seen["registers"] * job["num_warps"] * 32 <= 65536 // 2
    assert seen["shared"] <= 16384  # through which a bf16 b comes into the layout of an fp32 a
    if job["multiples"]:
        assert seen["total"]["LDG"] <= 4 * 16 * 4 // 16 and seen["total"]["STG"] <= 2 * 16 * 4 // 16
