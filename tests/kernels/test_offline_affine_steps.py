"""What ptxas makes of the affine cell's steps, at every tile that we ship, on chips that are not here."""

import itertools

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline

# Local loads and stores of the epilogue, by tile, that we live with, of 1,000 to 9,000 instructions: at most 14 with
# Triton 3.9, 42 with 3.6. The loop over the depth has none.
SPILLS = {"large": 48, "wide": 6, "middle": 10, "small": 2}
ROWS = {"large": 1 << 16, "wide": 3200, "middle": 2048, "small": 16}


def step_jobs():
    forward, backward, start = (False, False), (True, False), (False, True)
    chips = (80, 90, 100)
    cases = [
        *itertools.product((90,), (1, 2, 3), ROWS, ("tanh",), (forward, backward), (512,)),
        *itertools.product((80, 100), (2,), ("large", "middle", "small"), ("tanh",), (forward, backward), (512,)),
        *itertools.product((80, 100), (1, 3), ("large", "small"), ("tanh",), (forward,), (512,)),
        *itertools.product(chips, (1, 2, 3), ("middle", "small"), ("tanh",), (start,), (512,)),
        (90, 2, "middle", "tanh", (True, True), 512),
        *itertools.product((90,), (2,), ("large",), ("gelu", "sin"), (forward, backward), (512,)),
        *itertools.product((90,), (2,), ("large", "small"), ("tanh",), (forward,), (4096, 300)),
    ]
    jobs = {}
    for chip, terms, rows, act, (adj, first), features in cases:
        shape = {"batch": ROWS[rows], "features": features, "terms": terms, "shared": offline.SHARED[chip]}
        config = launch.parameters("steps.affine", start=first, **shape)
        kind = ("adjoint" if adj else "solve") + (" start" if first else "")
        of = {"features": features, "terms": terms, "act": act, "adj": adj, "start": first}
        jobs[f"sm{chip} D{features} terms{terms} {act} {kind} {rows}"] = launches.affine_steps(chip, config, **of)
    return jobs


JOBS = step_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["shared"] <= offline.SHARED[job["chip"]]
    gemm, total = seen["gemm"], seen["total"]
    if job["constants"]["START"] and job["constants"]["ADJ"]:
        assert gemm is None  # v starts at zero
        return
    assert gemm is not None and gemm.get("LDL", 0) + gemm.get("STL", 0) == 0
    assert total.get("LDL", 0) + total.get("STL", 0) <= SPILLS[name.split()[-1]]
    assert gemm.get("LDGSTS", 0), "tiles are not on their way while others are multiplied"


def test_every_tile_that_we_ship_is_compiled():
    tiles = {(job["constants"]["TERMS"], job["constants"]["BLOCK_M"]) for job in JOBS.values()}
    assert tiles == {(terms, tile[0]) for terms, shipped in launch.TILES.items() for tile in shipped}
