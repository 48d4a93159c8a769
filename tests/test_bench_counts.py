"""Counts of the bench that hold on any machine: operations, launches, evaluations, bytes."""

from collections import Counter

import pytest
import torch

import tritondeq as tdeq
from tritondeq.bench import choices, launches, measure, memory, rivals, shapes, steps, targets
from tritondeq.kernels import launch, rules

CPU = torch.device("cpu")
MOST = [("Picard", tdeq.Picard()), ("Anderson(5)", tdeq.Anderson(memory=5))]


def counted(solver, evaluations, gain, tol, batch=16):
    f, z0 = steps.problem(batch, 16, gain, CPU)
    with torch.no_grad(), tdeq.backend("torch"), measure.AtenOps() as ops:
        solution = tdeq.fixed_point(f, z0, solver=solver, tol=tol, max_steps=evaluations)
    return ops, solution


@pytest.mark.parametrize("name, solver", MOST)
@pytest.mark.parametrize("gain, tol", [(0.9, 1e-12), (0.9, 1e-3), (1.3, 1e-12)])
def test_no_step_has_more_operations_than_promised(name, solver, gain, tol):
    """All rows active, rows that stop one by one, residuals that rise; only window ends cost more."""
    seen = []
    for k in range(2, 24):
        before, after = (counted(solver, n, gain, tol)[0] for n in (k, k + 1))
        if k + 1 not in (12, 24) and after.total > before.total:
            seen.append((after.total - before.total - 2, after.reads - before.reads))  # the cell is addmm, tanh
    assert len(seen) > 8
    assert max(ops for ops, _ in seen) <= targets.OPS[name]
    assert max(reads for _, reads in seen) <= 2


@torch.no_grad()
def test_captured_steps_are_the_steps():
    """On a CPU through the loop: that the contestant of the GPU round does the same work."""
    f, z0 = steps.problem(8, 16, 1.2, CPU)
    for solver in steps.OURS.values():
        loop = tdeq.fixed_point(f, z0, solver=solver, tol=1e-12, max_steps=steps.EVALUATIONS)
        assert torch.equal(steps.captured(f, z0, solver)(), loop.value)


def test_the_counter_counts():
    with measure.AtenOps() as ops:
        x = torch.ones(3)  # one fill
        (x.view(3, 1).t() + 1).sum().item()
    assert dict(ops.counts) == {"ones": 1, "add": 1, "sum": 1} and ops.total == 3 and ops.reads == 1


@pytest.mark.skipif(not rivals.has_torchdeq(), reason="needs torchdeq")
def test_torchdeq_makes_the_operations_that_are_said_of_it():
    f, z0 = steps.problem(16, 16, 0.9, CPU)
    for solver, ours in ((rivals.torchdeq_picard, "Picard"), (rivals.torchdeq_anderson, "Anderson(5)")):
        totals = []
        for n in (8, 11):
            with torch.no_grad(), measure.AtenOps() as ops:
                solver(f, z0, 0.0, n)
            totals.append(ops.total)
        per_step = (totals[1] - totals[0]) / 3 - 2
        assert per_step > 1.5 * targets.OPS[ours]


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.2])
def test_anderson_needs_no_more_evaluations_than_picard(gain):
    f, z0 = steps.problem(64, 64, gain, CPU)
    needed = [
        tdeq.fixed_point(f, z0, solver=solver, tol=1e-4, max_steps=300, throw=True).steps.max() for _, solver in MOST
    ]
    assert needed[1] <= needed[0]


@pytest.mark.parametrize("name", sorted(rivals.solvers()))
def test_rivals_reach_the_same_fixed_point(name):
    f, z0 = steps.problem(8, 16, 0.7, CPU)
    truth = tdeq.fixed_point(lambda z: f(z), z0, tol=1e-7, max_steps=200).value
    z, evaluations = rivals.solvers()[name](f, z0, 1e-5, 200)
    assert (z - truth).norm() <= 1e-3 * truth.norm() and 3 < evaluations < 60


def test_the_peak_is_that_of_what_is_alive_at_once():
    with measure.Peak() as seen:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        b.add_(1)  # nothing new
        assert seen.now == 8000
        assert (b + c.view(-1)).sum() > 0
        del b, c
        d = torch.ones(10)
        assert seen.now == d.nbytes == 40
    assert seen.most == 12004 + 1  # three vectors, their sum, and whether it is positive


def test_memory_is_flat_in_steps_and_that_of_explicit_nets_is_not():
    records = [r for r in memory.run(CPU, "tiny")]
    assert not any(r["wrong"] for r in records)
    for net in ("Affine", "Transformer"):
        of = {}
        for r in records:
            if r["net"] == net:
                of.setdefault(r["contestant"], []).append(r["bytes"])
        for name in ("tied loop", "untied stack", "tritondeq Unrolled"):
            assert of[name][1] > 1.4 * of[name][0], (net, name)
        for name in memory.FLAT:
            assert of[name][1] <= 1.1 * of[name][0], (net, name)


def test_states_beside_the_cell():
    """In torch: where it is, where it was, the best and the residual; and for Anderson(m) 2 m differences beside."""
    picard, anderson = (r["states"] for r in memory.states(CPU, "quick"))
    assert 3.9 < picard < 4.3 and 2 * targets.MEMORY + picard <= anderson < 2 * targets.MEMORY + picard + 2.2


def test_a_memory_that_grows_is_a_fault(monkeypatch):
    sizes = iter(range(10**6, 10**8, 10**5))
    monkeypatch.setattr(memory, "peak", lambda net, x: next(sizes))
    wrong = {r["contestant"]: r["wrong"] for r in memory.run(CPU, "tiny")}
    assert "not flat" in wrong["tritondeq"] and wrong["tied loop"] is None


def test_tables_behind_the_options():
    """Each at a size of its own choice: what NOTES.md concludes from them holds."""
    _, *rows = choices.safeguard(factors=(2.0, 100.0), seeds=1)
    assert all(float(at_2[:-1]) <= float(at_100[:-1]) for *_, at_2, at_100 in rows) and rules.SAFEGUARD == 100
    ((_, _, fresh, reused),) = choices.reuse(gains=(1.2,), memories=(40,), seeds=6)[1:]
    assert float(reused) < 0.85 * float(fresh)
    assert all(whole == half for *_, whole, half in choices.half(gains=(0.5, 0.9), tols=(1e-3,))[1:])


@pytest.mark.parametrize("cell", ["gated", "conv"])
def test_the_price_of_a_step_of_any_cell(cell):
    lost = []
    records = list(steps.run(CPU, [shapes.Shape(cell, 16, 9, low=True)], 0.0, lost.append))
    prices = {r["contestant"]: r["over_cell"] for r in records}
    assert prices["bare cell"] == 1 and prices["Picard"] > 0.5 and not any(r["wrong"] for r in records)
    assert all("torchdeq" in one for one in lost)  # its Anderson has no bf16


def test_launches_and_waits_are_told_apart():
    events = [("cudaLaunchKernel", False), ("gemm", True), ("tanh", True), ("Memcpy DtoH (Device -> Pinned)", True)]
    events += [("Memset (Device)", True), ("cudaStreamSynchronize", False), ("cudaEventSynchronize", False)]
    events += [("cudaMemcpyAsync", False), ("aten::mm", False)]
    counts = launches.tally(events)
    assert (counts["launches"], counts["copies"], counts["waits"], counts["looks"]) == (2, 2, 1, 1)


def test_launches_of_a_step_are_the_difference_of_two_solves(monkeypatch):
    asked = []
    monkeypatch.setattr(tdeq, "fixed_point", lambda *_, max_steps, **__: asked.append(max_steps))
    monkeypatch.setattr(rivals, "has_torchdeq", lambda: False)
    monkeypatch.setattr(steps, "problem", lambda *a, make=steps.problem: make(*a[:3], CPU))

    def profile(call):
        call()
        n = asked.pop() if asked else None
        return Counter(launches=2) if n is None else Counter(launches=9 + 4 * n, waits=1, looks=n // 4)

    monkeypatch.setattr(launches, "profile", profile)
    records = list(launches.run(torch.device("cuda")))
    assert [r["contestant"] for r in records] == list(targets.LAUNCHES) * 2
    programs = [launch.parameters("steps.anderson", width=r["width"], itemsize=4)["SPLITS"] for r in records]
    assert programs == [1, 1, 2, 2], "samples of one program and of several"
    assert all((r["launches"], r["syncs"], r["looks"], r["copies"]) == (2, 0, 0.25, 0) for r in records)
    assert list(launches.run(CPU)) == []


@pytest.mark.parametrize("cell", shapes.CELLS)
def test_the_memory_a_shape_is_reckoned_to_take_is_what_explicit_nets_take(cell):
    shape = shapes.Shape(cell, 32, 256)
    taken = memory.peak(rivals.Tied(shape.make(CPU), shapes.BLOCKS), torch.randn(shape.dims))
    kept = taken / (shapes.BLOCKS * 4 * 256 * 32)
    assert taken <= shape.bytes and 0.6 * shapes.CELLS[cell][1] <= kept <= shapes.CELLS[cell][1]
