"""Counts of the bench that hold on any machine: operations, launches, evaluations, bytes."""

import pytest
import torch

import tritondeq as tdeq
from tritondeq import guards
from tritondeq.bench import measure, memory, rivals, shapes, steps
from tritondeq.toolbox import PeakMemory

CPU = torch.device("cpu")
SOLVERS = list(steps.OURS.items())
MOST_OPS = {"Picard": 7, "Anderson(5)": 17}  # torch operations of a step beside the cell


def counted(solver, evaluations, gain, tol):
    f, z0 = steps.problem(16, 16, gain, CPU)
    with torch.no_grad(), tdeq.backend("torch"), measure.AtenOps() as ops:
        tdeq.fixed_point(f, z0, solver=solver, tol=tol, max_steps=evaluations)
    return ops


@pytest.mark.parametrize("name, solver", SOLVERS)
@pytest.mark.parametrize("gain, tol", [(0.9, 1e-12), (0.9, 1e-3), (1.3, 1e-12)])
def test_no_step_has_more_operations_than_promised(monkeypatch, name, solver, gain, tol):
    """All rows active, rows that stop one by one, residuals that rise; only window ends cost more.

    What is compared once, at the end of a solve, is left out: it takes more where the last evaluation is not the best.
    """
    monkeypatch.setattr(guards, "compare_last", lambda *_: None)
    all_ops = [counted(solver, n, gain, tol) for n in range(2, 25)]
    seen = []
    for k, (before, after) in enumerate(zip(all_ops, all_ops[1:], strict=False), 2):
        if k + 1 not in (12, 24) and after.total > before.total:
            seen.append((after.total - before.total - 2, after.reads - before.reads))  # the cell is addmm, tanh
    assert len(seen) > 8
    assert max(ops for ops, _ in seen) <= MOST_OPS[name] and not any(reads for _, reads in seen)


def test_a_call_is_timed_as_a_user_makes_it(monkeypatch):
    """With gradients enabled and the number of steps read: what attaches the gradient is a part of the call."""
    calls = steps.contestants(shapes.Shape("affine", 16, 8), CPU)
    enabled = []
    solve = tdeq.fixed_point
    monkeypatch.setattr(tdeq, "fixed_point", lambda *a, **k: enabled.append(torch.is_grad_enabled()) or solve(*a, **k))
    assert {calls[name]() for name in ("bare cell", *steps.OURS)} == {steps.EVALUATIONS} and enabled == [True, True]
    assert {"eager loop", "eager Anderson"} <= calls.keys()


def test_fewer_evaluations_than_were_asked_for_are_a_fault(monkeypatch):
    monkeypatch.setattr(steps, "problem", lambda *a, make=steps.problem: make(*a[:2], 0.1, CPU))
    records = list(steps.run(CPU, [shapes.Shape("affine", 16, 8)], 0.0, pytest.fail))
    assert "evaluations, not 40" in next(r["wrong"] for r in records if r["contestant"] == "Picard")
    assert not any("seconds" in r for r in records)


def test_the_counters_count():
    """Operations that launch something and values that are read; bytes that are alive at once."""
    with measure.AtenOps() as ops:
        x = torch.ones(3)  # one fill
        (x.view(3, 1).t() + 1).sum().item()
    assert dict(ops.counts) == {"ones": 1, "add": 1, "sum": 1} and ops.total == 3 and ops.reads == 1
    with PeakMemory(CPU) as memory:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        b.add_(1)  # nothing new
        assert memory.bytes == 8000
        assert (b + c.view(-1)).sum() > 0
        del b, c
        d = torch.ones(10)
        assert memory.bytes == d.nbytes == 40
    assert memory.peak == 12004 + 1  # three vectors, their sum, and whether it is positive


@pytest.mark.parametrize("name", sorted(rivals.solvers()))
def test_rivals_reach_the_same_fixed_point(name):
    f, z0 = steps.problem(8, 16, 0.7, CPU)
    truth = tdeq.fixed_point(f, z0, tol=1e-7, max_steps=200).value
    z, evaluations = rivals.solvers()[name](f, z0, 1e-5, 200)
    assert (z - truth).norm() <= 1e-3 * truth.norm() and 3 < evaluations < 60


@pytest.mark.slow
def test_memory_is_flat_in_steps_and_that_of_explicit_nets_is_not():
    records = list(memory.run(CPU, "tiny"))
    assert not any(r["wrong"] for r in records)
    for net in {r["net"] for r in records}:
        sizes = {}
        for r in records:
            if r["net"] == net:
                sizes.setdefault(r["contestant"], []).append(r["bytes"])
        for name, (few, many) in sizes.items():
            assert many <= 1.1 * few if name in memory.FLAT else many > 1.4 * few, (net, name)


@pytest.mark.filterwarnings("ignore:a backward solve")
def test_a_training_step_keeps_one_block_and_three_states_whatever_its_steps():
    """Three: the solution, the one with a gradient, and the image there. What each sample has is beside them."""
    few, many = ([memory.held(loss) for loss in memory.training(steps).values()] for steps in (4, 16))
    (block, *_), (kept, peak, allocations) = few
    batch, tokens, features, _ = memory.blocks.SIZES["cpu"]
    state = 4 * batch * tokens * features
    assert kept <= block + 3 * state + 4096
    assert abs(many[1][0] - kept) < 4096 and abs(many[1][1] - peak) < 4096 and many[1][2] > allocations


def test_a_memory_that_grows_is_a_fault(monkeypatch):
    sizes = iter(range(10**6, 10**8, 10**5))
    monkeypatch.setattr(memory, "of_net", lambda net, x: next(sizes))
    wrong = {r["contestant"]: r["wrong"] for r in memory.run(CPU, "tiny")}
    assert "not flat" in wrong["tritondeq"] and wrong["tied loop"] is None


def test_states_beside_the_cell():
    """In torch: the start, where it is and was, the best and the residual; and for Anderson(m) 2 m differences."""
    picard, anderson = (r["states"] for r in memory.states(CPU, "quick"))
    differences = 2 * memory.ANDERSON.memory
    assert 4.9 < picard < 5.3 and differences + picard <= anderson < differences + picard + 2.2


@pytest.mark.slow
@pytest.mark.parametrize("cell", shapes.CELLS)
def test_the_memory_a_shape_is_reckoned_to_take_is_what_explicit_nets_take(cell):
    shape = shapes.Shape(cell, 32, 256)
    taken = memory.of_net(rivals.Tied(shape.make(CPU), shapes.BLOCKS), torch.randn(shape.dims))
    states = taken / (shapes.BLOCKS * 4 * 256 * 32)
    assert taken <= shape.bytes and 0.6 * shapes.CELLS[cell][1] <= states <= shapes.CELLS[cell][1]
