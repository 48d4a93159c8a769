"""What ptxas makes of every kernel at every launch that we ship, on chips that are not here."""

import itertools

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline

# Local loads and stores in the hot loop that we live with, of some 700 to 2,200 instructions there.
SPILLS = {  # the most of Triton 3.6 and 3.9
    # what the rules know of 64 rows: by wgmma they take less time a row than 32 by mma all the same (bench/CYCLES.md)
    "sm90 D128 terms1 memory0 tanh solve tile64": 44,
    "sm90 D128 terms1 memory0 tanh adjoint tile64": 50,
    "sm90 D128 terms2 memory0 tanh solve tile64": 47,
    "sm90 D128 terms2 memory0 tanh adjoint tile64": 50,
    "sm90 D128 terms1 memory0 gelu solve tile64": 44,
    "sm90 D128 terms1 memory0 sin solve tile64": 44,
    "sm90 D128 terms1 memory0 fast_tanh solve tile64": 44,
    "sm90 D256 terms1 memory0 tanh solve tile64": 52,
    "sm90 D256 terms1 memory0 tanh adjoint tile64": 80,
    "sm90 D256 terms1 memory0 fast_tanh solve tile64": 51,
    "sm80 D256 terms2 memory0 tanh solve tile16": 2,
    # four pairs of history fill the registers of a multiprocessor, and 16 rows are the least that a tile can have
    "sm80 D256 terms2 memory4 tanh adjoint tile16": 210,
    "sm90 D256 terms1 memory4 tanh adjoint tile16": 190,
    "sm90 D256 terms2 memory2 tanh adjoint tile16": 10,
    "sm90 D256 terms2 memory4 tanh adjoint tile16": 390,
    "sm100 D256 terms2 memory4 tanh adjoint tile16": 351,
}


def affine_jobs():
    small, large = 1, 1 << 20
    both = (False, True)
    wide = [
        *itertools.product((32, 64, 128, 256), (1, 2), (0,), (small, large), ("tanh",), both),
        *itertools.product((128, 256), (3,), (0,), (small,), ("tanh",), (True,)),
        *itertools.product((64, 128), (2,), (4,), (small,), ("tanh",), (True,)),
        *itertools.product((256,), (1, 2), (2, 4), (small,), ("tanh",), (True,)),
        *itertools.product((128,), (1,), (0,), (large,), ("gelu", "sin"), (False,)),
        *itertools.product((64, 128, 256), (1,), (0,), (small, large), ("fast_tanh",), (False,)),
    ]
    narrow = [
        *itertools.product((64, 128, 256), (2,), (0,), (small, large), ("tanh",), both),
        *itertools.product((256,), (1,), (0,), (large,), ("tanh",), both),
        *itertools.product((256,), (2,), (4,), (small,), ("tanh",), (True,)),
    ]
    cases = [(90, *case) for case in wide] + [(chip, *case) for chip in (80, 100) for case in narrow]
    jobs = {}
    for chip, features, terms, memory, batch, act, adj in cases:
        shape = {"batch": batch, "shapes": [(features, features)], "terms": terms, "memory": memory}
        config = launch.parameters("rows.affine", **shape, **offline.limits(chip))
        name = f"D{features} terms{terms} memory{memory} {act} {'adjoint' if adj else 'solve'} tile{config['BLOCK_B']}"
        of = {"shapes": shape["shapes"], "terms": terms, "memory": memory, "act": act, "adj": adj}
        jobs[f"sm{chip} {name}"] = launches.rows("affine", chip, config, **of)
    return jobs


def cell_jobs():
    """The MLP and the gated cell, at the sizes that fill a multiprocessor and at small ones."""
    jobs = {}
    sizes = [(32, 64, 2), (64, 128, 2), (128, 256, 1)]
    for chip, (d, h, terms), form, gate, adj in itertools.product(
        (80, 90, 100), sizes, ("post", "pre"), (False, True), (False, True)
    ):
        shapes = [(h, d), (d, h), *([(h, d)] if gate else [])]
        config = launch.parameters(
            "mlp", batch=1 << 20, shapes=shapes, terms=terms, memory=0, shared=offline.SHARED[chip]
        )
        if config is None or (chip != 90 and (d, gate) == (32, False)):
            continue
        name = f"sm{chip} mlp {form}{' gate' if gate else ''} D{d} H{h} terms{terms} {'adjoint' if adj else 'solve'}"
        of = {"shapes": shapes, "terms": terms, "memory": 0, "act": "silu", "adj": adj, "form": form}
        jobs[name] = launches.rows("mlp", chip, config, **of)
    for chip, (d, terms), memory, adj in itertools.product((80, 90, 100), ((64, 2), (128, 1)), (0, 2), (False, True)):
        shapes = [(d, d)] * 3
        config = launch.parameters("rows.gated", batch=1, shapes=shapes, terms=terms, memory=memory)
        name = f"sm{chip} gated D{d} terms{terms} memory{memory} {'adjoint' if adj else 'solve'}"
        of = {
            "shapes": shapes,
            "terms": terms,
            "memory": memory,
            "act": "fast_tanh" if terms == 1 else "tanh",
            "adj": adj,
        }
        jobs[name] = launches.rows("gated", chip, config, **of)
    return jobs


JOBS = affine_jobs() | cell_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["shared"] <= offline.SHARED[job["chip"]]
    hot = seen["hot"]
    assert hot is not None, "no loop with both tensor-core and special-function instructions"
    assert hot.get("LDL", 0) + hot.get("STL", 0) <= SPILLS.get(name, 0)
    if not job["constants"]["STREAM"]:
        assert not any(hot.get(op) for op in ("LDG", "LDGSTS", "UTMALDG")), "W is loaded again in the hot loop"


@pytest.mark.parametrize("features", [64, 128, 256])
def test_the_hardwares_tanh_is_one_instruction(found, features):
    """Of each element; the other takes eight more, with two special functions in them."""
    name = f"sm90 D{features} terms1 memory0 {{}} solve tile64"
    fast, exact = (found[name.format(act)]["hot"] for act in ("fast_tanh", "tanh"))
    elements = 64 * features // (32 * JOBS[name.format("tanh")]["num_warps"])
    assert exact["MUFU"] - fast["MUFU"] == elements
    assert sum(exact.values()) - sum(fast.values()) >= 8 * elements
