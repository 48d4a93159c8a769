"""What ptxas makes of the row ops, on chips that are not here."""

import offline
import pytest

from tritondeq.kernels import launch
from tritondeq.kernels.residual_rms import MOST

FLOATS = {2: "bf16", 4: "fp32"}
CASES = [(90, features, 4, 4) for features in (1, 100, 512, 1024, MOST)] + [(90, 1024, 4, 2), (90, MOST, 2, 2)]
CASES += [(chip, features, 4, 2) for chip in (80, 100) for features in (64, 1024, MOST)]


def row_jobs():
    jobs = {}
    for chip, features, wide, narrow in CASES:
        config = launch.parameters("residual_rms", features=features)
        types = {f"{name}_ptr": f"*{FLOATS[wide]}" for name in ("a", "gamma", "weight", "s", "n")}
        types |= {"b_ptr": f"*{FLOATS[narrow]}", "R": "i32", "D": "i32", "eps": "fp32"}
        jobs[f"sm{chip} D{features} {FLOATS[wide]} + {FLOATS[narrow]}"] = {
            "kernel": "tritondeq.kernels.residual_rms:_rms_kernel",
            "chip": chip,
            "types": types,
            "constants": {
                **{name: True for name in ("HAS_GAMMA", "HAS_WEIGHT", "KEEP_SUM")},
                **{"BLOCK_R": config["BLOCK_R"], "BLOCK_D": config["BLOCK_D"], "INTERP": False},
            },
            "multiples": [] if features % 16 else ["D"],
            "num_warps": config["num_warps"],
        }
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
