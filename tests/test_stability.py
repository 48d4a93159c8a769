"""The Jacobian penalty holds together what plain training loses: a shorter run of what bench/stability.py measures."""

from statistics import mean

from tritondeq.bench import stability


def test_the_penalty_holds_it():
    plain = [stability.train(seed, steps=150) for seed in (0, 1)]
    held = [stability.train(seed, steps=150, weight=lambda step: 3.0) for seed in (0, 1)]
    assert max(o.radius for o in held) < 1 < max(o.radius for o in plain)
    assert 5 * mean(o.failed for o in held) < mean(o.failed for o in plain)
    assert mean(o.accuracy for o in held) > mean(o.accuracy for o in plain) + 0.1
    assert mean(o.steps for o in held) < mean(o.steps for o in plain)


def test_the_table(capsys):
    stability.main(["--seeds", "2", "--steps", "2"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("recipe ") and len(lines) == len(stability.RECIPES)
    assert all(line.startswith(name) for line, name in zip(lines, stability.RECIPES, strict=True))
