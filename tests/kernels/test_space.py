"""The spaces of launch parameters: small, around the pure functions, and nothing in them that can't be launched."""

import itertools

import pytest

from tritondeq.kernels import launch, space

CHIPS = [(80, 166912), (86, 101376), (90, 232448), (100, 232448)]
PROCESSORS = {80: 108, 86: 84, 90: 132, 100: 148}


def shapes():
    """(op, shape) of every op that can be tuned, on every chip where limits matter."""
    for chip, shared in CHIPS:
        of = {"chip": chip, "shared": shared}
        sizes = [((d, d),) for d in (1, 16, 37, 64, 128, 256)] + [((64, 32), (32, 64)), ((128, 128),) * 3]
        for size, terms, memory, batch in itertools.product(sizes, (1, 2, 3), (0, 4), (1, 4096, 4097)):
            yield "affine", {"batch": batch, "shapes": size, "terms": terms, "memory": memory} | of
        for features, terms, batch, start in itertools.product((257, 4096), (1, 2, 3), (1, 1 << 16), (False, True)):
            yield (
                "affine_steps",
                {"batch": batch, "features": features, "terms": terms, "start": start, "shared": shared},
            )
        for features, terms, batch in itertools.product((257, 512, 1024, 2048), (1, 2, 3), (1, 17, 64)):
            grid = {"batch": batch, "features": features, "terms": terms}
            yield "affine_grid", grid | {"shared": shared, "processors": PROCESSORS[chip]}
    for width, itemsize in itertools.product((1, 127, 129, 4096, 1 << 20), (4, 8)):
        yield "picard", {"width": width, "itemsize": itemsize}
    for tokens, features, itemsize in itertools.product((1, 37, 5000), (1, 7, 129, 1024), (4, 8)):
        if features < 1024 or itemsize == 4:
            yield "picard", {"width": tokens * features, "itemsize": itemsize, "features": features}
    for features in (1, 3, 64, 1000, 8192):
        yield "residual_rms", {"features": features}
    for pixels, width in itertools.product((1, 49, 65536), (1, 15, 8192)):
        yield "group_norm", {"pixels": pixels, "width": width}


ALL = list(shapes())
LIMITS = ("chip", "shared", "processors")


def test_the_pure_function_comes_first_and_is_not_alone():
    for op, shape in ALL:
        base, found = launch.SHAPES[op](**shape), launch.candidates(op, **shape)
        assert found[:1] == [base] if base else not found
        assert len(found) <= 24
        assert all(found.count(config) == 1 and set(config) == set(base) for config in found)
    assert {len(launch.candidates(op, **shape)) > 4 for op, shape in ALL} == {True, False}


def test_what_is_chosen_tells_candidates_apart():
    """A table holds `names` only, so that two candidates may not differ in anything else."""
    for op, shape in ALL:
        names = launch.spaces()[op].names
        found = [tuple(config[name] for name in names) for config in launch.candidates(op, **shape)]
        assert len(set(found)) == len(found)


def test_a_key_is_a_shape():
    for op, shape in ALL:
        among = launch.spaces()[op]
        key = among.key(**shape)
        assert tuple(key) == among.keys and set(among.near) <= set(among.keys)
        assert among.key(**key) == key or "shared" in shape  # limits belong to the GPU, not to the key
        assert launch.SHAPES[op](**key | {name: shape[name] for name in LIMITS if name in shape}) or (
            launch.SHAPES[op](**shape) is None
        )


def test_tiles_are_powers_of_two_and_warps_are_few():
    for op, shape in ALL:
        for config in launch.candidates(op, **shape):
            tiles = [size for name, size in config.items() if name.startswith("BLOCK_") or name == "num_warps"]
            assert all(size & (size - 1) == 0 and size > 0 for size in tiles)
            assert config["num_warps"] <= 16
            elements = {"affine": 0, "affine_steps": 0, "affine_grid": 0}.get(op, 1)
            for name in config:
                if elements and name.startswith("BLOCK_"):
                    elements *= config[name]
            assert elements <= 32768


def test_candidates_fit_in_shared_memory():
    for op, shape in ALL:
        for config in launch.candidates(op, **shape):
            if op == "affine":
                resident = 1 if config["STREAM"] else shape["terms"]
                weights = sum(launch.block(n) * launch.block(m) for n, m in shape["shapes"])
                assert 2 * resident * weights + 4 * config["BLOCK_B"] * config["BLOCK_D"] <= shape["shared"]
                assert 0 < config["REFILL"] < config["BLOCK_B"]
                assert not config["STREAM"] or (len(shape["shapes"]) == 1 and shape["terms"] > 1)
                assert config["BLOCK_B"] < 64 or config["num_warps"] >= 4, "wgmma is of 4 warps"
            elif op == "affine_steps":
                m, n, k, stages = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages"))
                row = (4 if shape["start"] else 2) * m + 2 * shape["terms"] * n
                assert stages * k * row + m * n <= shape["shared"]
                assert config["SUB"] == max(1, m * n // (512 * config["num_warps"]))


def test_programs_of_a_grid_run_at_once_and_their_slices_fit():
    """Or its barrier would wait for a program that has no multiprocessor."""
    widths = set()
    for op, shape in ALL:
        for config in launch.candidates(op, **shape) if op == "affine_grid" else ():
            m, n, k, groups, chunks = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUPS", "CHUNKS"))
            assert -(-shape["batch"] // m) * -(-shape["features"] // n) <= shape["processors"]
            assert 2 * chunks * groups * k * (shape["terms"] * n + m) <= shape["shared"]
            assert (chunks - 1) * groups * k < shape["features"] <= chunks * groups * k
            assert config["num_warps"] in (groups, 2 * groups), "each group has a warp"
            widths.add(n)
    assert widths == {16, 32}


@pytest.mark.parametrize("processors", [1, 84, 108, 132, 148])
@pytest.mark.parametrize("features", [257, 512, 600, 1024, 2048])
def test_a_grid_knows_no_more_of_the_batch_than_the_pure_function(features, processors):
    """Batches with slices of one width have one key, and all of them the same candidates."""
    found = {}
    for batch in range(1, 65):
        shape = {"batch": batch, "features": features, "terms": 1, "shared": 232448, "processors": processors}
        base = launch.affine_grid(**shape)
        if base is not None:
            key = tuple(space.AFFINE_GRID.key(**shape).items())
            found.setdefault(base["BLOCK_N"], set()).add((key, str(launch.candidates("affine_grid", **shape))))
    assert all(len(of) == 1 for of in found.values())
    assert len({key for of in found.values() for key, _ in of}) == len(found)
    assert bool(found) == (processors > 1)


def test_anderson_of_odd_memory_takes_what_one_more_does():
    of = {"batch": 1, "shapes": ((64, 64),), "terms": 2}
    assert [space.ROWS.key(**of, memory=memory)["memory"] for memory in range(5)] == [0, 2, 2, 4, 4]


def test_parts_cover_a_sample():
    for op, shape in ALL:
        for config in launch.candidates(op, **shape):
            if "SPLITS" in config:
                size, part = ("width", "BLOCK_N") if op == "picard" else ("pixels", "BLOCK_P")
                size, part = shape[size], config[part]
                if shape.get("features"):  # whole rows
                    size, part = size // shape["features"], part // space.power_of_two(shape["features"])
                assert (config["SPLITS"] - 1) * part < size <= config["SPLITS"] * part


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_a_choice_knows_no_more_of_the_batch_than_the_pure_function(terms):
    """Batches that the pure function gives one tile have one key, so that a row's bits don't depend on its batch."""
    sizes = [((d, d),) for d in (16, 64, 128, 256)] + [((64, 32), (32, 64))]
    for (chip, shared), size, memory in itertools.product(CHIPS, sizes, (0, 2)):
        of = {"shapes": size, "terms": terms, "memory": memory, "shared": shared}
        configs = [launch.rows(batch=batch, chip=chip, **of) for batch in (1, 4096, 4097, 1 << 20)]
        keys = [space.ROWS.key(batch=batch, **of, chip=chip)["batch"] for batch in (1, 4096, 4097, 1 << 20)]
        assert keys[0] == keys[1] and keys[2] == keys[3]
        if None not in configs and configs[0] != configs[2]:
            assert keys[0] != keys[2]
        if memory or len(size) > 1:
            assert keys[0] == keys[2]
    for op in ("picard", "anderson", "broyden", "residual_rms", "group_norm"):
        assert "batch" not in launch.spaces()[op].keys


def test_rows_that_stream_have_one_key():
    of = {"shapes": ((256, 256),), "terms": 2, "memory": 0, "shared": 232448}
    assert launch.rows(batch=1, **of)["STREAM"]
    assert space.ROWS.key(batch=1, **of) == space.ROWS.key(batch=1 << 20, **of)


def test_no_candidate_where_nothing_fits():
    assert launch.candidates("rows.affine", batch=1, shapes=((512, 512),), terms=1, memory=0) == []


def test_an_op_without_a_space_has_its_pure_function(monkeypatch):
    monkeypatch.setitem(launch.SHAPES, "mine", lambda width: {"BLOCK": width} if width else None)
    assert launch.candidates("mine", width=3) == [{"BLOCK": 3}] and launch.candidates("mine", width=0) == []
    assert "mine" not in launch.spaces()
