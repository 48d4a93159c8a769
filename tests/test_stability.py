"""The Jacobian penalty stabilises what plain training loses, as bench/stability.py measures it."""

from statistics import mean

import pytest

from tritondeq.bench import stability


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a backward solve")  # some are cut short, on purpose
def test_the_penalty_stabilises_training():
    plain = [stability.train(seed) for seed in range(4)]
    stable = [stability.train(seed, weight=lambda step: 3.0) for seed in range(4)]
    assert max(o.radius for o in stable) < 0.9 and 1 < max(o.radius for o in plain)
    assert 5 * mean(o.failed for o in stable) < mean(o.failed for o in plain)
    assert 2 * mean(o.steps for o in stable) < mean(o.steps for o in plain)
    assert min(o.accuracy for o in stable) > mean(o.accuracy for o in plain)


def test_the_table(capsys):
    stability.main(["--seeds", "2", "--steps", "2"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| recipe ")
    assert [line.split("|")[1].strip() for line in lines] == list(stability.RECIPES)
