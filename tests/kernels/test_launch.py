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
