"""Algorithms: mazes against a search of another kind, contestants against the demonstration's and closed forms."""

import random
from collections import deque

import pytest
import torch

from tritondeq.bench.studies import algorithms
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies.algorithms import MAZE, PARITY, TASKS, Contestant
from tritondeq.bench.studies.mazes import Block, maze
from tritondeq.demo import parity
from tritondeq.toolbox import one_thread

SETTINGS = algorithms.STUDY.settings["tiny"]


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def distances(floor: torch.Tensor, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Of every pixel of the floor that is reached, by breadth-first search."""
    found, queue = {start: 0}, deque([start])
    while queue:
        r, c = queue.popleft()
        for at in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if floor[at] and at not in found:
                found[at] = found[r, c] + 1
                queue.append(at)
    return found


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


def test_mazes_differ_and_depend_on_their_seed():
    x, y = algorithms.mazes(4, 9, 3)
    again = algorithms.mazes(4, 9, 3)
    assert x.shape == (4, 9, 9, 3) and y.shape == (4, 9, 9) and torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x[0], x[1]) and not torch.equal(x, algorithms.mazes(4, 9, 4)[0])


def net(name: str, case: str = PARITY, **settings) -> Contestant:
    return Contestant(name, TASKS[case], SETTINGS[case] | settings)


@pytest.mark.parametrize(
    "name, model", [(who.DEQ, parity.IMPLICIT), (who.STACK, parity.STACK), (who.LOOP, parity.TIED)]
)
def test_parity_is_that_of_the_demonstration(name, model):
    """Nets, losses and answers are the same, with the same weights and draws."""
    theirs, ours = parity.MODELS[model](), net(name, depth=parity.DEPTH, max_steps=parity.MAX_STEPS)
    ours.net.load_state_dict(theirs.state_dict())
    x, y = TASKS[PARITY].samples(6, 12, 5)
    assert torch.equal(y, parity.prefix_parity(x))
    draws = [iter([4, 5, 6]), iter([4, 5, 6])]
    losses = [own.loss(*given) for own, given in ((theirs, (x, y, lambda *_: next(draws[0]))),)]
    losses.append(ours.loss((x, y), lambda *_: next(draws[1])))
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for a, b in zip(theirs.parameters(), ours.net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    with torch.no_grad():
        logits, steps = theirs.answer(x)
        own, count, converged = ours.answer(x)
    assert torch.allclose(logits, own, atol=1e-5) and torch.equal(steps.float(), count)
    assert (converged is not None) == (name == who.DEQ)


@pytest.mark.parametrize("case", [PARITY, MAZE])
def test_a_hybrid_solves_for_what_its_prelude_says(case):
    own = net(who.HYBRID, case, tol=1e-6, max_steps=2000)
    prelude, core, coda = own.net.blocks
    x, y = TASKS[case].samples(3, 9, 1)
    z, u = own.net.start(x)
    given = prelude(z, u)
    thrice = core(core(core(z, given), given), given)
    assert torch.allclose(own.repeated(x, 3), own.net.read(coda(thrice, u)), atol=1e-6)
    with torch.no_grad():
        logits, steps, converged = own.answer(x)
        rest = z
        for _ in range(300):
            rest = core(rest, given)
        assert converged.all() and torch.allclose(logits, own.net.read(coda(rest, u)), atol=1e-3)
    assert (steps > 4).all()
    own.loss((x, y), lambda low, high: high).backward()
    assert all(block.last.weight.grad.any() for block in own.net.blocks)


def test_steps_without_gradient_have_none():
    """With one step kept, the gradient is that of this step alone."""
    own = net(who.DEQ, MAZE)
    x, y = TASKS[MAZE].samples(2, 5, 1)
    draws = iter([7, 1])
    own.loss((x, y), lambda *_: next(draws)).backward()
    block = own.net.blocks[0]
    found = [p.grad.clone() for p in block.parameters()]
    own.zero_grad()
    z, u = own.net.start(x)
    for _ in range(7):
        z = block(z, u).detach()
    after = block(z, u)
    residual = ((after - z).flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1)).mean()
    (parity.cross_entropy(own.net.read(after), y) + parity.SETTLE * residual).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(found, block.parameters(), strict=True))


def test_size_does_not_matter_to_a_block():
    """Far from the border, a maze in a larger one is read the same."""
    block = Block(8)
    z, u = torch.randn(2, 11, 11, 8), torch.randn(2, 11, 11, 8)
    inner = block(z[:, 1:-1, 1:-1], u[:, 1:-1, 1:-1])
    assert torch.allclose(inner[:, 2:-2, 2:-2], block(z, u)[:, 3:-3, 3:-3], atol=1e-5)
    assert not torch.allclose(inner[:, 0, 0], block(z, u)[:, 1, 1], atol=1e-3)


def test_a_block_of_one_row_is_that_of_a_string():
    block, line = Block(parity.CHANNELS), parity.Block()
    with torch.no_grad():
        for conv, linear in ((block.first, line.first), (block.last, line.last)):
            conv.weight[:, :, 1] = linear.weight.unflatten(1, (3, -1)).transpose(1, 2)
            conv.bias.copy_(linear.bias)
    z, u = torch.randn(2, 7, parity.CHANNELS), torch.randn(2, 7, parity.CHANNELS)
    assert torch.allclose(block(z[:, None], u[:, None])[:, 0], line(z, u), atol=1e-5)


def test_the_loop_is_told_its_steps_and_the_stack_has_its_own():
    x, _ = TASKS[MAZE].samples(2, 9, 1)
    for name, steps in ((who.LOOP, 81 // 4), (who.STACK, 2), (who.BLOCK, 1)):
        own = net(name, MAZE)
        _, count, _ = own.answer(x)
        assert count.tolist() == [steps, steps]
        assert len(own.net.blocks) == (2 if name == who.STACK else 1)
    with pytest.raises(ValueError, match="contestant must be one of DEQ.*got 'wide DEQ'"):
        net(who.WIDE)


def test_what_is_right():
    logits = torch.tensor([[[1.0, -2.0], [3.0, -4.0]], [[1.0, 2.0], [-3.0, -4.0]]])
    y = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert algorithms.right(logits, y) == (50.0, 87.5)


def test_a_solve_that_is_cut_short_is_told():
    own = net(who.DEQ, tol=1e-9, max_steps=3)
    found = algorithms.score(own, *TASKS[PARITY].samples(3, 8, 1))
    assert found["converged"] == 0 and found["steps"] == found["most_steps"] == 3
    _, steps, converged = net(who.HYBRID, tol=1e-9, max_steps=3).answer(TASKS[PARITY].samples(3, 8, 1)[0])
    assert steps.tolist() == [5, 5, 5] and not converged.any()
    assert "converged" not in algorithms.score(net(who.STACK), *TASKS[PARITY].samples(3, 8, 1))


def test_what_is_said_is_what_was_measured():
    runs = []
    for seed in (0, 1):
        common = {"case": MAZE, "seed": seed, "probe": 9, "by_size": [[5, 100.0], [9, 90.0]]}
        steps = {"steps_by_size": [[5, 10.0], [9, 20.0 + 2 * seed]], "by_steps": [[2, 10.0], [4, 80.0], [8, 60.0]]}
        runs += [common | {"contestant": who.DEQ, "largest": 80.0 + 20 * seed, "converged": 75.0} | steps]
        runs += [common | {"contestant": who.STACK, "largest": 5.0, "by_steps": [[2, 5.0]]}]
    largest, taken, allowed = algorithms.says(runs)
    assert largest == "mazes, wholly right at size 9, trained on 5: DEQ 90 %, stack 5 %."
    assert taken == "mazes, DEQ: 10 steps at size 5, 21 at 9, where 75 % of its solves converge."
    assert allowed == "mazes of size 9, DEQ by steps taken: 10 % at 2, at best 80 % at 4, 60 % at 8."
