"""What the studies share: the verdict, contestants, training and what is counted of it."""

from itertools import islice
from math import sqrt

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import train, verdict
from tritondeq.bench.studies.study import Measure
from tritondeq.toolbox import one_thread, parameters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def test_the_verdict_is_students_t():
    """Spread 1 of three seeds each: the standard error is sqrt(2 / 3), the quantile for 4 degrees of freedom 2.776."""
    edge = 2.776445 * sqrt(2 / 3)
    a = [9.0, 10.0, 11.0]
    for gap, word in ((0.0, "tie"), (0.999 * edge, "tie"), (1.001 * edge, "win")):
        b = [v + gap for v in a]
        assert verdict.compare(b, a, "more").word == word and verdict.compare(a, b, "less").word == word
        lost = {"tie": "tie", "win": "loss"}[word]
        assert verdict.compare(a, b, "more").word == lost and verdict.compare(b, a, "less").word == lost
    assert verdict.compare(a, a, "more").allowed == pytest.approx(edge)


def test_the_verdict_on_counts_without_spread():
    assert verdict.compare([3, 3], [4, 4], "less").word == "win"
    assert verdict.compare([4, 4], [4, 4], "less").word == "tie"


def test_one_seed_gives_no_verdict():
    assert verdict.compare([3.0], [4.0, 5.0], "less").word == ""


def test_the_chance_of_test_samples_counts():
    """90 and 92 % of 100 images, three seeds without spread: the error is sqrt((9 + 7.36) / 3)."""
    ours, theirs = [92.0] * 3, [90.0] * 3
    assert verdict.compare(ours, theirs, "more").word == "win"
    told = verdict.compare(ours, theirs, "more", samples=100)
    assert told.word == "tie" and told.allowed == pytest.approx(2.776445 * sqrt((9 + 7.36) / 3))
    assert verdict.compare(ours, theirs, "more", samples=100_000).word == "win"


def test_a_measure_that_a_contestant_lacks_is_not_judged():
    runs = [{"contestant": "DEQ", "a": 1.0}, {"contestant": "stack", "a": None}]
    assert verdict.judge(runs, Measure("a", "a", "less"), "DEQ", "stack") is None
    assert verdict.judge(runs * 2, Measure("a", "a"), "DEQ", "DEQ") is None


def make():
    return tdeq.cells.MLP(8, hidden=8)


def test_the_contestants_are_what_they_are_said_to_be():
    x = torch.randn(5, 8)
    size = parameters(make())
    nets = {name: who.body(name, make, 3, tol=1e-5) for name in who.ALL}
    assert {name: parameters(net) // size for name, net in nets.items()} == {
        **{who.DEQ: 1, who.WIDE: 1, who.LOOP: 1, who.BLOCK: 1},
        **{who.STACK: 3, who.HYBRID: 3},
    }
    block, stack, loop = (nets[name] for name in (who.BLOCK, who.STACK, who.LOOP))
    for cell in (*stack.blocks, block.blocks[0]):
        cell.load_state_dict(loop.cell.state_dict())
    cell = loop.cell
    u = cell.inject(x)
    once = cell(torch.zeros_like(x), u)
    thrice = cell(cell(once, u), u)
    assert torch.allclose(block(x), once) and torch.allclose(stack(x), thrice) and torch.allclose(loop(x), thrice)
    assert torch.allclose(block(x, z0=once), cell(once, u))
    change = (thrice - cell(once, u)).norm(dim=1) / thrice.norm(dim=1)
    assert torch.allclose(who.effort(stack), change)
    z = nets[who.DEQ](x)
    assert torch.allclose(nets[who.DEQ].cell(z, nets[who.DEQ].cell.inject(x)), z, atol=1e-4)
    hybrid = nets[who.HYBRID]
    z = hybrid.core(hybrid.prelude(x))
    assert torch.allclose(hybrid(x), hybrid.coda(x, z))
    assert (who.steps(block), who.steps(stack), who.steps(loop)) == (1, 3, 3)
    assert torch.equal(who.steps(hybrid), hybrid.core.last.steps + 2.0)
    nets[who.WIDE](x)
    assert [who.solution(nets[name]) is None for name in who.ALL] == [False, False, False, True, True, True]
    assert torch.equal(who.effort(nets[who.DEQ]), nets[who.DEQ].last.residual)


def test_a_stack_takes_any_module_as_block():
    class Halve(nn.Module):
        def forward(self, z, x):
            return (z + x) / 2

    x = torch.ones(2, 3)
    assert torch.equal(who.body(who.STACK, Halve, 2)(x), 0.75 * x)
    with pytest.raises(ValueError, match="contestant must be one of DEQ.*got 'Stack'"):
        who.body("Stack", Halve, 2)


def test_matched_is_the_nearest_width():
    assert who.matched(lambda width: width**2, 110, range(1, 50)) == 10
    assert who.matched(lambda width: width**2, 111, range(1, 50)) == 11


def test_batches_are_epochs_of_the_seed():
    order = [batch.tolist() for batch in train.batches(3, 10, 4, 5)]
    assert all(len(batch) == 4 for batch in order) and not set(order[0]) & set(order[1])
    assert order == [batch.tolist() for batch in train.batches(3, 10, 4, 5)]
    assert order != [batch.tolist() for batch in train.batches(4, 10, 4, 5)]
    assert set(sum((batch.tolist() for batch in train.batches(3, 10, 4, 40)), [])) == set(range(10))


def test_training_is_matched_and_counted():
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor([5.0]))

    nets, seen = [Point(), Point()], []
    for net in nets:
        spent = train.train(
            net,
            lambda target, net=net: (net.at - target).square().sum(),
            (seen.append(net) or torch.tensor([1.0]) for _ in range(1000)),
            updates=200,
            lr=0.2,
            weight_decay=0.0,
            check=lambda net=net: net.at.item(),
        )
    assert len(seen) == 400 and nets[0].at == nets[1].at and abs(nets[0].at.item() - 1) < 0.05
    assert [point[0] for point in spent["curve"]] == [25 * i for i in range(1, 9)]
    assert spent["curve"][-1][2] == nets[0].at.item() and spent["final_loss"] < 0.01
    assert 0 < spent["curve"][0][1] < spent["curve"][-1][1] == spent["seconds"] <= spent["wall_seconds"] + 0.1
    with pytest.raises(ValueError, match="200 batches, got 3"):
        train.train(nets[0], lambda b: nets[0].at.sum(), islice(iter("abcdef"), 3), updates=200, lr=0.1)


def test_work_is_counted_where_torch_has_formulas():
    """One row: 2 D D a product; the injection and two products an evaluation, of which the tolerance decides."""
    x, product = torch.randn(1, 8), 2 * 8 * 8
    for name, blocks in ((who.BLOCK, 1), (who.STACK, 3), (who.LOOP, 3), (who.DEQ, None)):
        net = who.body(name, make, 3, tol=1e-5)
        told = train.work(net, lambda net=net: net(x).sum(), lambda net=net: net(torch.cat([x] * 5)), 5)
        injections, evaluations = (3 if name == who.STACK else 1), blocks or net.last.steps.max().item()
        assert told["sample_flops"] == product * (injections + 2 * evaluations)
        if blocks:  # backward: by all weights, and by all states and injections
            backward = product * (injections + 2 * 2 * evaluations)
            assert told["step_flops"] == told["sample_flops"] + backward
        assert all(p.grad is None for p in net.parameters())


def test_what_became_of_a_solve():
    net = tdeq.DEQ(make(), tol=1e-4)
    net(torch.randn(6, 8))
    told = train.solved(net)
    assert told["converged"] == 100 == told["status"]["converged"] and told["most_steps"] == net.last.steps.max()
    assert told["steps"] == pytest.approx(net.last.steps.float().mean().item()) and told["residual"] < 1e-4
    stuck = tdeq.DEQ(make(), tol=1e-12, max_steps=2)
    stuck(torch.randn(6, 8))
    assert train.solved(stuck)["status"] == {"max_steps": 100.0} and train.solved(stuck)["converged"] == 0
    assert train.solved(who.body(who.STACK, make, 4)) == {"steps": 4, "most_steps": 4}


def test_equal_time():
    quick = [[[1, 1.0, 10.0], [2, 2.0, 20.0]], [[1, 1.5, 12.0], [2, 3.0, 24.0]]]
    slow = [[[1, 2.0, 30.0], [2, 4.0, 40.0]], [[1, 3.0, 34.0], [2, 6.0, 50.0]]]
    assert train.at_equal_time({"quick": quick, "slow": slow}) == (2.5, {"quick": 16.0, "slow": 32.0})
