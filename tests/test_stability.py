"""The Jacobian penalty stabilises what plain training loses: a shorter run of what bench/stability.py measures."""

from statistics import mean

import pytest

from tritondeq.bench import stability


@pytest.mark.slow
def test_the_penalty_stabilises_training():
    plain = [stability.train(seed, steps=150) for seed in (0, 1)]
    stable = [stability.train(seed, steps=150, weight=lambda step: 3.0) for seed in (0, 1)]
    assert max(o.radius for o in stable) < 1 < max(o.radius for o in plain)
    assert 5 * mean(o.failed for o in stable) < mean(o.failed for o in plain)
    assert mean(o.accuracy for o in stable) > mean(o.accuracy for o in plain) + 0.1
    assert mean(o.steps for o in stable) < mean(o.steps for o in plain)


def test_the_table(capsys):
    stability.main(["--seeds", "2", "--steps", "2"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| recipe ")
    assert [line.split("|")[1].strip() for line in lines] == list(stability.RECIPES)
