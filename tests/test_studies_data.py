"""What the studies learn from and are judged by: their data, the split between training and test, the verdict."""

import hashlib
import random
import sysconfig
from collections import deque
from math import sqrt

import numpy as np
import pytest
import torch

from tritondeq.bench.studies import algorithms, contestants, images, series, text, verdict
from tritondeq.bench.studies.mazes import maze
from tritondeq.bench.studies.study import Job
from tritondeq.demo import parity

CPU = torch.device("cpu")


def distances(floor: torch.Tensor, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """The distance of every pixel of the floor that is reached, by breadth-first search."""
    steps, queue = {start: 0}, deque([start])
    while queue:
        r, c = queue.popleft()
        for at in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if floor[at] and at not in steps:
                steps[at] = steps[r, c] + 1
                queue.append(at)
    return steps


@pytest.mark.parametrize("size", [5, 9, 15])
def test_a_maze_is_perfect_and_its_way_is_the_shortest(size):
    for seed in range(5):
        picture, way = maze(size, random.Random(seed))
        wall, floor, ends = picture.unbind(-1)
        assert torch.equal(wall + floor, torch.ones(size, size)) and set(way.unique().tolist()) == {0, 1}
        assert wall[[0, -1]].all() and wall[:, [0, -1]].all() and floor[1::2, 1::2].all()
        start, goal = (tuple(at) for at in ends.nonzero().tolist())
        near, far = distances(floor, start), distances(floor, goal)
        assert floor.sum() == len(near) == 2 * (size // 2) ** 2 - 1, "a tree, all of which is reached"
        on_it = {at for at in near if near[at] + far[at] == near[goal]}
        assert {tuple(at) for at in way.nonzero().tolist()} == on_it


def test_strings_are_labelled_with_their_parity():
    x, y = algorithms.TASKS[algorithms.PARITY].samples(6, 12, 5)
    assert x.shape == (6, 12) and torch.equal(y, parity.prefix_parity(x))


def test_a_cluttered_image_has_the_digit_it_is_labelled_with(monkeypatch):
    monkeypatch.setattr(images, "GRAIN", 0.0)
    digits = images.Data.split(0, CPU)
    x, y = images.clutter(digits.x[:50], digits.y[:50], 12, torch.Generator().manual_seed(0))
    assert x.shape == (12, 1, images.SIDE, images.SIDE)
    windows = x[:, 0].unfold(1, 8, 1).unfold(2, 8, 1).reshape(12, -1, 64)
    for each, label in zip(windows, y, strict=True):
        apart = torch.cdist(each, digits.x[:50].flatten(1)).amin(0)
        assert apart.min() == 0 and label in digits.y[:50][apart == 0]


def test_no_forecast_learns_from_what_is_tested():
    t = torch.arange(60, dtype=torch.float64)
    values = torch.tensor([0.0, 2.0, 1.0, -1.0], dtype=torch.float64)[t.long() % 4] + 0.5 * t
    waves = series.Series(values, t.tolist(), season=4, context=8, horizon=3, split=45)
    train, test = waves.windows(False), waves.windows(True)
    assert torch.equal(train[-1], values[34:45]) and torch.equal(test[0], values[37:48])
    assert torch.equal(test[:, 8], values[45:58])
    rules = series.references(waves)
    assert torch.allclose(rules["linear"], test[:, 8:]), "a season with a trend is linear"
    other = series.references(series.Series(values.where(t < 45, 99.0), t.tolist(), 4, 8, 3, 45))
    assert all(torch.equal(forecast[0], other[rule][0]) for rule, forecast in rules.items())


def test_the_corpus_is_files_in_order_split_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    held = {i: text.held_out(f"m{i:03}.py") for i in range(1000)}
    assert 60 < sum(held.values()) < 140, "a tenth of the files"
    (first, second, *_), (unseen, *_) = ([f"m{i:03}.py" for i in held if held[i] == kind] for kind in (False, True))
    skipped = ["test/t.py", "site-packages/p.py", "encodings/e.py", "config-3/c.py", "_sysconfigdata_x.py", "n.txt"]
    for name, written in ((second, "bb"), (first, "a"), (unseen, "c"), *((name, "zzz") for name in skipped)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(written)
    corpus = text.corpus.__wrapped__()
    assert torch.equal(corpus.train, text.symbols("abb")) and torch.equal(corpus.test, text.symbols("c"))
    assert corpus.digest == hashlib.sha256(b"abb\0c").hexdigest()


@pytest.mark.parametrize("contestant", text.STUDY.contestants)
def test_no_net_sees_the_symbol_that_it_predicts(contestant):
    settings = text.STUDY.settings["tiny"] | {"tol": 1e-6, "max_steps": 60}
    model = text.build(Job("", contestant, 0, settings, CPU))
    x = torch.randint(0, 97, (1, 12))
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % 97
    apart = (model(x) - model(changed)).abs().amax((0, 2))
    assert apart[:7].max() < 1e-3 * apart[7] and apart[7:].min() > 0


@pytest.mark.parametrize("case", ["CartPole-v1", "Pendulum-v1"])
def test_episodes_are_those_of_gymnasium(case):
    gymnasium = pytest.importorskip("gymnasium")
    from tritondeq.bench.studies import control

    settings = control.STUDY.settings["tiny"] | {"limit": {case: 40}}
    job = Job(case, contestants.DEQ, 0, settings, CPU)
    policy, returns = control.build(job), []
    for i in range(settings["episodes"]):
        env, over = gymnasium.make(case), [False]
        observation, _ = env.reset(seed=control.TESTED + i)
        returns.append(0.0)
        for _ in range(40):
            with torch.no_grad():
                out, _ = policy.onward(torch.tensor(observation, dtype=torch.float32)[None], None)
            action = 2 * out[0].numpy() if case == "Pendulum-v1" else int(out.argmax())
            observation, reward, *over, _ = env.step(action)
            returns[-1] += reward
            if any(over):
                break
    assert control.play(policy, job, warm=False)["return"] == pytest.approx(np.mean(returns), rel=1e-3)


def test_the_verdict_is_students_t():
    """Spread 1 of three seeds each: the standard error is sqrt(2 / 3), the quantile for 4 degrees of freedom 2.776."""
    edge = 2.776445 * sqrt(2 / 3)
    a = [9.0, 10.0, 11.0]
    for gap, word, lost in ((0.0, "tie", "tie"), (0.999 * edge, "tie", "tie"), (1.001 * edge, "win", "loss")):
        b = [v + gap for v in a]
        assert verdict.compare(b, a, "more").word == word and verdict.compare(a, b, "less").word == word
        assert verdict.compare(a, b, "more").word == lost and verdict.compare(b, a, "less").word == lost
    assert verdict.compare([3, 3], [4, 4], "less").word == "win" and verdict.compare([3.0], [4, 5], "less").word == ""
    known = verdict.against(a, 10 - 4.302653 / sqrt(3) * 1.001, "more")  # the quantile for 2 degrees of freedom
    assert known.word == "win" and known.allowed == pytest.approx(4.302653 / sqrt(3))
    ours, theirs = [92.0] * 3, [90.0] * 3  # % of 100 images, without spread: the error is sqrt((9 + 7.36) / 3)
    assert verdict.compare(ours, theirs, "more").word == "win"
    judged = verdict.compare(ours, theirs, "more", samples=100)
    assert judged.word == "tie" and judged.allowed == pytest.approx(2.776445 * sqrt((9 + 7.36) / 3))
