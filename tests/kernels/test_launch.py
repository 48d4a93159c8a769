import itertools

import pytest

from tritondeq.kernels import costs, launch


@pytest.mark.parametrize("shared", [launch.SHARED, 101376, 232448])
def test_affine_is_total_and_tiles_are_powers_of_two(shared):
    for features, terms, memory, batch in itertools.product(range(1, 257), (1, 2, 3), (0, 4), (1, 1 << 20)):
        shape = dict(batch=batch, shapes=[(features, features)], terms=terms, memory=memory, shared=shared)
        config = launch.parameters("rows.affine", **shape)
        if config is None:
            assert features > 128 and shared < launch.SHARED
            continue
        assert features <= config["BLOCK_D"] < 2 * max(features, 8 + 1)
        assert config["BLOCK_B"] in (16, 32, 64) and config["BLOCK_D"] % config["BLOCK_K"] == 0
        resident = 1 if config["STREAM"] else terms
        assert 2 * resident * config["BLOCK_D"] ** 2 < shared


def test_only_what_does_not_fit_is_streamed():
    def stream(features, terms):
        return launch.parameters("rows.affine", batch=1, shapes=[(features, features)], terms=terms, memory=0)["STREAM"]

    assert [stream(256, terms) for terms in (1, 2, 3)] == [False, True, True]
    assert not any(stream(128, terms) for terms in (1, 2, 3))


def test_small_batches_get_small_tiles():
    for features in (16, 64, 128, 256):
        shape = {"shapes": [(features, features)], "terms": 1, "memory": 0}
        assert launch.parameters("rows.affine", batch=64, **shape)["BLOCK_B"] == 16
        assert launch.parameters("rows.affine", batch=1 << 20, **shape)["BLOCK_B"] > 16


@pytest.mark.parametrize("shared", [launch.SHARED, 101376, 232448])
def test_affine_steps_fit_and_keep_a_gpu_busy(shared):
    """Tiles of which there are enough and that fit; a first step, whose rows are float32, has smaller ones."""
    sizes = itertools.product((257, 1000, 4096), (1, 2, 3), (1, 64, 2048, 1 << 20), (False, True))
    for features, terms, batch, start in sizes:
        config = launch.parameters(
            "affine_steps", batch=batch, features=features, terms=terms, start=start, shared=shared
        )
        m, n, k, stages = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages"))
        assert (m, n, k, stages) in launch.TILES[terms] and not (start and m > 64)
        assert stages * k * ((4 if start else 2) * m + 2 * terms * n) + m * n <= shared
        assert m == 16 or -(-batch // m) * -(-features // n) >= launch.ENOUGH


def test_affine_steps_of_many_rows_take_the_largest_tile_that_fits():
    def tiles(shared, start=False):
        shape = {"batch": 1 << 20, "features": 512, "start": start, "shared": shared}
        configs = [launch.parameters("steps.affine", terms=terms, **shape) for terms in (1, 2, 3)]
        return [(config["BLOCK_M"], config["BLOCK_N"], config["SUB"]) for config in configs]

    assert tiles(232448) == [(128, 256, 8), (256, 128, 8), (128, 128, 4)]
    assert tiles(launch.SHARED) == [(128, 128, 4)] * 3
    assert tiles(101376) == [(64, 64, 2)] * 3
    assert tiles(232448, start=True) == [(64, 64, 2)] * 3


def test_the_widest_tiles_are_for_the_chip_with_wgmma():
    shape = {"batch": 1 << 20, "shapes": [(64, 64)], "terms": 2, "memory": 0}
    assert [launch.parameters("rows.affine", **shape, chip=chip)["BLOCK_B"] for chip in (80, 90, 100)] == [32, 64, 32]


@pytest.mark.parametrize("shared, processors", [(launch.SHARED, 108), (101376, 84), (232448, 132)])
def test_affine_grid_runs_all_programs_at_once(shared, processors):
    """The least slice of which there is one for a multiprocessor, and only where it fits."""
    taken = set()
    for features, terms, batch in itertools.product((257, 512, 1000, 1024, 2048), (1, 2, 3), (1, 16, 17, 64)):
        shape = {"batch": batch, "features": features, "terms": terms, "shared": shared, "processors": processors}
        config = launch.parameters("affine_grid", **shape)
        wide = -(-features // 512) * 512

        def programs(block_n, features=features, batch=batch):
            return -(-batch // 16) * -(-features // block_n)

        (least, *_) = [n for n in (16, 32, 64) if programs(n) <= processors] or (64,)
        fits = least < 64 and 2 * wide * (terms * least + 16) <= shared
        assert (config is not None) == fits
        if config is None:
            continue
        taken.add((features, batch, terms))
        assert config["BLOCK_N"] == least and config["BLOCK_M"] == 16 and config["GROUPS"] == config["num_warps"]
        assert config["CHUNKS"] * config["GROUPS"] * config["BLOCK_K"] == wide
    assert (512, 64, 1) in taken or shared < launch.SHARED
    assert ((2048, 16, 2) in taken) == ((1024, 64, 3) in taken) == (shared > launch.SHARED)


def test_affine_grid_seconds():
    """Three rounds, what is read from L2, and once in twenty steps the launch and W; beside a launch a step."""
    shape = {"batch": 16, "features": 1024, "terms": 2, "cell": "fp32"}
    here, apart = costs.grid_seconds(**shape)
    told = 64 * 16 * (2 * 1024 + 8 * 64)
    assert here == pytest.approx(3 * 0.6e-6 + 0.5e-6 + told / 5.5e12 + (2e-6 + 4 * 1024**2 / 4.3e12) / 20)
    assert apart == costs.HOST
    assert costs.grid_seconds(**shape, host=0)[1] == pytest.approx(2e-6 + 2 * 1024 * (16 + 2 * 32) / 1.1e11)
    most = costs.grid_seconds(batch=64, features=1024, terms=2, cell="fp32")[0]
    assert here < most and 20 * most < 150e-6  # the target for 64 rows, in this reckoning


def test_multiprocessors_of_a_gpu_that_is_not_here():
    device = pytest.importorskip("torch").device("cuda")
    if not pytest.importorskip("torch").cuda.is_available():
        assert launch.multiprocessors(device) == launch.multiprocessors(None) == launch.PROCESSORS
