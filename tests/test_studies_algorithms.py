"""Algorithms: mazes against a search of another kind, contestants against the demonstration's and closed forms."""

import random
from collections import deque

import pytest
import torch

from tritondeq.bench.studies import algorithms
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies.algorithms import PARITY, TASKS, Contestant
from tritondeq.bench.studies.mazes import maze
from tritondeq.demo import parity


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
        cells = (size // 2) ** 2
        assert floor.sum() == 2 * cells - 1, "a tree has one edge fewer than nodes"
        start, goal = (tuple(at) for at in ends.nonzero().tolist())
        near, far = distances(floor, start), distances(floor, goal)
        assert len(near) == 2 * cells - 1, "all of the floor is reached"
        on_it = {at for at in near if near[at] + far[at] == near[goal]}
        assert {tuple(at) for at in way.nonzero().tolist()} == on_it


@pytest.mark.parametrize(
    "name, model", [(who.DEQ, parity.IMPLICIT), (who.STACK, parity.STACK), (who.LOOP, parity.TIED)]
)
def test_parity_is_that_of_the_demonstration(name, model):
    """Losses, gradients and answers are the same, with the same weights and draws."""
    settings = algorithms.STUDY.settings["tiny"][PARITY] | {"depth": parity.DEPTH, "max_steps": parity.MAX_STEPS}
    theirs, ours = parity.MODELS[model](), Contestant(name, TASKS[PARITY], settings)
    ours.net.load_state_dict(theirs.state_dict())
    x, y = TASKS[PARITY].samples(6, 12, 5)
    draws = [iter([4, 5, 6]), iter([4, 5, 6])]
    losses = [theirs.loss(x, y, lambda *_: next(draws[0])), ours.loss((x, y), lambda *_: next(draws[1]))]
    assert torch.equal(y, parity.prefix_parity(x)) and torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for a, b in zip(theirs.parameters(), ours.net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    with torch.no_grad():
        (logits, steps), (same, count, converged) = theirs.answer(x), ours.answer(x)
    assert torch.allclose(logits, same, atol=1e-5) and torch.equal(steps.float(), count)
    assert (converged is not None) == (name == who.DEQ)
