"""What the studies share: the verdict, contestants, training and what is counted of it."""

from itertools import islice
from math import sqrt

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import train, verdict
from tritondeq.toolbox import parameters


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


def test_the_chance_of_test_samples_counts():
    """90 and 92 % of 100 images, three seeds without spread: the error is sqrt((9 + 7.36) / 3)."""
    ours, theirs = [92.0] * 3, [90.0] * 3
    assert verdict.compare(ours, theirs, "more").word == "win"
    judged = verdict.compare(ours, theirs, "more", samples=100)
    assert judged.word == "tie" and judged.allowed == pytest.approx(2.776445 * sqrt((9 + 7.36) / 3))


def make():
    return tdeq.cells.MLP(8, hidden=8)


def test_contestants():
    x = torch.randn(5, 8)
    nets = {name: who.body(name, make, 3, tol=1e-5) for name in who.ALL}
    blocks = {name: parameters(net) // parameters(make()) for name, net in nets.items()}
    assert blocks == dict.fromkeys((who.DEQ, who.WIDE, who.LOOP, who.BLOCK), 1) | {who.STACK: 3, who.HYBRID: 3}
    block, stack, loop, hybrid = (nets[name] for name in (who.BLOCK, who.STACK, who.LOOP, who.HYBRID))
    cell = loop.cell
    for other in (*stack.blocks, block.blocks[0]):
        other.load_state_dict(cell.state_dict())
    u = cell.inject(x)
    once = cell(torch.zeros_like(x), u)
    twice = cell(once, u)
    thrice = cell(twice, u)
    assert torch.allclose(block(x), once) and torch.allclose(stack(x), thrice) and torch.allclose(loop(x), thrice)
    assert torch.allclose(block(x, z0=once), twice)
    assert torch.allclose(who.effort(stack), (thrice - twice).norm(dim=1) / thrice.norm(dim=1))
    z = nets[who.DEQ](x)
    assert torch.allclose(nets[who.DEQ].cell(z, nets[who.DEQ].cell.inject(x)), z, atol=1e-4)
    assert torch.allclose(hybrid(x), hybrid.coda(x, hybrid.core(hybrid.prelude(x))))
    assert (who.steps(block), who.steps(stack), who.steps(loop)) == (1, 3, 3)
    assert torch.equal(who.steps(hybrid), hybrid.core.last.steps + 2.0)


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
    assert 0 < spent["curve"][0][1] < spent["curve"][-1][1] == spent["seconds"]
    with pytest.raises(ValueError, match="200 batches, got 3"):
        train.train(nets[0], lambda b: nets[0].at.sum(), islice(iter("abcdef"), 3), updates=200, lr=0.1)


def test_work_is_counted_where_torch_has_formulas():
    """One row: 2 D D a product; the injection and two products an evaluation, of which the tolerance decides."""
    x, product = torch.randn(1, 8), 2 * 8 * 8
    for name, blocks in ((who.BLOCK, 1), (who.STACK, 3), (who.LOOP, 3), (who.DEQ, None)):
        net = who.body(name, make, 3, tol=1e-5)
        work = train.work(net, lambda net=net: net(x).sum(), lambda net=net: net(torch.cat([x] * 5)), 5)
        injections, evaluations = (3 if name == who.STACK else 1), blocks or net.last.steps.max().item()
        assert work["sample_flops"] == product * (injections + 2 * evaluations)
        if blocks:  # backward: by all weights, and by all states and injections
            assert work["step_flops"] == work["sample_flops"] + product * (injections + 2 * 2 * evaluations)


def test_equal_time():
    quick = [[[1, 1.0, 10.0], [2, 2.0, 20.0]], [[1, 1.5, 12.0], [2, 3.0, 24.0]]]
    slow = [[[1, 2.0, 30.0], [2, 4.0, 40.0]], [[1, 3.0, 34.0], [2, 6.0, 50.0]]]
    assert train.at_equal_time({"quick": quick, "slow": slow}) == (2.5, {"quick": 16.0, "slow": 32.0})
