import itertools

import pytest

from tritondeq.kernels import launch


@pytest.mark.parametrize("shared", [launch.SHARED, 101376, 232448])
def test_affine_is_total_and_tiles_are_powers_of_two(shared):
    for features, terms, memory, batch in itertools.product(range(1, 257), (1, 2, 3), (0, 4), (1, 1 << 20)):
        shape = dict(batch=batch, shapes=[(features, features)], terms=terms, memory=memory, shared=shared)
        config = launch.parameters("affine", **shape)
        if config is None:
            assert features > 128 and shared < launch.SHARED
            continue
        assert features <= config["BLOCK_D"] < 2 * max(features, 8 + 1)
        assert config["BLOCK_B"] in (16, 32, 64) and config["BLOCK_D"] % config["BLOCK_K"] == 0
        resident = 1 if config["STREAM"] else terms
        assert 2 * resident * config["BLOCK_D"] ** 2 < shared


def test_only_what_does_not_fit_is_streamed():
    def stream(features, terms):
        return launch.parameters("affine", batch=1, shapes=[(features, features)], terms=terms, memory=0)["STREAM"]

    assert [stream(256, terms) for terms in (1, 2, 3)] == [False, True, True]
    assert not any(stream(128, terms) for terms in (1, 2, 3))


def test_small_batches_get_small_tiles():
    for features in (16, 64, 128, 256):
        shape = {"shapes": [(features, features)], "terms": 1, "memory": 0}
        assert launch.parameters("affine", batch=64, **shape)["BLOCK_B"] == 16
        assert launch.parameters("affine", batch=1 << 20, **shape)["BLOCK_B"] > 16


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
        configs = [launch.parameters("affine_steps", terms=terms, **shape) for terms in (1, 2, 3)]
        return [(config["BLOCK_M"], config["BLOCK_N"], config["SUB"]) for config in configs]

    assert tiles(232448) == [(128, 256, 8), (256, 128, 8), (128, 128, 4)]
    assert tiles(launch.SHARED) == [(128, 128, 4)] * 3
    assert tiles(101376) == [(64, 64, 2)] * 3
    assert tiles(232448, start=True) == [(64, 64, 2)] * 3


def test_the_widest_tiles_are_for_the_chip_with_wgmma():
    shape = {"batch": 1 << 20, "shapes": [(64, 64)], "terms": 2, "memory": 0}
    assert [launch.parameters("affine", **shape, chip=chip)["BLOCK_B"] for chip in (80, 90, 100)] == [32, 64, 32]
