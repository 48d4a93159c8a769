"""The affine cell's solve with a grid barrier: programs that meet, or do not."""

import time

import numpy as np
import pytest
import torch
from close import assert_as_eager, assert_residual, error
from grids import outcomes, shape, uneven
from programs import InProcesses
from test_affine import dense_adjoint, exact, options, problem, true_residual

from tritondeq.kernels import affine, launch
from tritondeq.kernels import affine_grid as op
from tritondeq.kernels.rules import CONVERGED, MAX_STEPS, NONFINITE

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="programs in processes need the interpreter")
KERNEL = "tritondeq.kernels.affine_grid:grid_kernel"


@pytest.fixture
def together(monkeypatch):
    """A program for each 16 features, in processes of their own."""
    monkeypatch.setitem(launch.SHAPES, "affine_grid", shape(16))

    def start(**how):
        processes = InProcesses(KERNEL, **how)
        monkeypatch.setattr(op, "grid_kernel", processes)
        return processes

    return start


def laggard(number, builder):
    """Program 1 of three writes only when the others have come to the barrier, and reads what they wrote only when they
    have come to the next one: no earlier than it may, and as late as it can."""
    if number != 1:
        return
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    arrivals, told = [0], []

    def counting(*call):
        told[:] = call
        arrivals[0] += call[0].name == "ADD" and call[2].data.item() == 2
        return atomic(*call)

    def others_come(seconds):
        does, at, two, *rest = told
        nothing = type(two)(np.zeros_like(two.data), two.dtype)
        end = time.monotonic() + seconds
        while atomic(does, at, nothing, *rest).data.item() < 2 * 3 * arrivals[0] + 2 * 2 and time.monotonic() < end:
            pass

    def late_load(ptrs, *call):
        if told and np.ndim(ptrs.data) == 3:
            others_come(0.2)  # after the last evaluation they do not
        return load(ptrs, *call)

    def late_store(*call):
        if told:
            others_come(0.2)
            time.sleep(0.01)
        return store(*call)

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = late_load, late_store, counting


@CPU
def test_programs_meet(device, together):
    """Two tiles of three programs each, both ways, with rows of many depths: right, and the same to the bit again when
    one of them is as late as it can be."""
    w, u, pre = uneven(18, 40, device)
    settings = options(tol=1e-3)
    processes = together()
    seen = outcomes(w, u, pre, **settings)
    assert processes.grids == [6, 6] and processes.options["launch_cooperative_grid"] is True
    for (z, steps, residual, status), eager, truth in (
        (seen[:4], affine.affine_solve_ref(w, u, **settings), exact(w, u, **settings)),
        (seen[4:], affine.affine_adjoint_ref(w, pre, u, **settings), dense_adjoint(w, pre, u, "tanh")),
    ):
        assert steps.unique().numel() > 2 and (steps - eager[1]).abs().max() <= 1
        assert torch.equal(status, eager[3]) and (status == CONVERGED).all()
        assert ((residual <= 1e-3) & (residual > 0)).all()
        assert_as_eager(z, eager[0], truth, 2)
    assert_residual(seen[2], true_residual(w, u, seen[0], "tanh", 2), 1e-3)
    together(before=laggard)
    for again, first in zip(op.affine_grid_solve(w, u[:16], **settings), seen[:4], strict=True):
        assert torch.equal(again, first[:16])


@CPU
def test_programs_meet_from_a_start_and_at_a_limit(device, together):
    together()
    w, u = problem(3, 40, device)
    z0 = exact(w, u, **options()).float() + 1e-3 * torch.randn_like(u)
    z, steps, residual, status = op.affine_grid_solve(w, u, z0, terms=3, **options())
    assert (status == CONVERGED).all() and error(z, exact(w, u, **options())) < 1e-6
    assert (steps < affine.affine_solve_ref(w, u, **options())[1]).all()
    *_, residual, status = op.affine_grid_solve(w, u, z0, terms=3, **options(max_steps=1))
    assert (status == MAX_STEPS).all()
    assert_residual(residual, true_residual(w, u, z0, "tanh", 3), 1e-6)


def assert_lost(result, rows=slice(None)):
    z, _, residual, status = (each[rows] for each in result)
    assert z.isnan().any(1).all() and residual.isinf().all() and (status == NONFINITE).all()


@CPU
@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["absent", "late"])
def test_none_waits_for_ever(device, together, monkeypatch, how, who):
    """Whoever does not come, or comes when the others have given up: every row says so."""
    monkeypatch.setattr(op, "POLLS", 20)
    together(**{how: [who]})
    w, u = problem(5, 40, device)
    result = op.affine_grid_solve(w, u, **options())
    assert_lost(result)
    assert (result[1] == 0).all()
    others = torch.arange(40) // 16 != who
    assert result[0][:, others if how == "absent" else slice(None)].isnan().all()


def deaf(number, builder):
    """From its fourth arrival on program 1 sees none of the others, who see it, and go on."""
    atomic, arrivals, seen = builder.create_atomic_rmw, [0], [None]

    def blind(*told):
        arrives = told[0].name == "ADD" and told[2].data.item() == 2
        arrivals[0] += arrives
        poll = told[0].name == "ADD" and told[2].data.item() == 0
        if number != 1 or arrivals[0] < 4 or not (arrives or poll):
            return atomic(*told)
        if arrives:
            time.sleep(0.001)
            seen[0] = atomic(*told)
            seen[0].data[...] = 2 * 3 * (arrivals[0] - 1)
        return type(seen[0])(seen[0].data.copy(), seen[0].dtype)

    builder.create_atomic_rmw = blind


def pausing(number, builder):
    """Program 1 pauses before its fourth arrival until one of the others has given up."""
    atomic, arrivals = builder.create_atomic_rmw, [0]

    def late(*told):
        arrives = told[0].name == "ADD" and told[2].data.item() == 2
        arrivals[0] += arrives
        if number == 1 and arrives and arrivals[0] == 4:
            does, at, two, *rest = told
            nothing = type(two)(np.zeros_like(two.data), two.dtype)
            while not atomic(does, at, nothing, *rest).data.item() & 1:
                time.sleep(1e-3)
        return atomic(*told)

    builder.create_atomic_rmw = late


@CPU
@pytest.mark.parametrize(
    "before, work",
    [(pausing, op.affine_grid_solve), (deaf, op.affine_grid_solve), (deaf, op.affine_grid_adjoint)],
)
def test_rows_that_all_have_stopped_before_are_right(device, together, monkeypatch, before, work):
    """Where the others found at the fourth evaluation that a row had converged, one that is deaf never does."""
    factors = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], device=device)
    w = torch.diag(factors.repeat(5))
    u = torch.randn(8, 40).to(device) * torch.eye(8, device=device).repeat(1, 5)  # a row has one factor
    settings = options(activation="identity", tol=1e-2)
    operands = (w, u) if work is op.affine_grid_solve else (w, u, u)
    together()
    z, steps, residual, status = whole = work(*operands, **settings)
    early = steps < 4
    assert steps.tolist() == [3, 3, 3, 4, 5, 6, 7, 9] and (status == CONVERGED).all()
    torch.testing.assert_close(z, u / (1 - factors)[:, None], rtol=2e-2, atol=1e-6)
    monkeypatch.setattr(op, "POLLS", 2000)
    together(before=before)
    result = work(*operands, **settings)
    assert_lost(result, ~early)
    assert all(torch.equal(a[early], b[early]) for a, b in zip(result, whole, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs as many programs at once as a GPU runs")
@pytest.mark.parametrize("features", [257, 512, 1024, 2048])
@pytest.mark.parametrize("batch", [1, 17, 64])
def test_on_a_gpu(device, batch, features):
    """With the launch parameters that we ship, a hundred times over: right, and the same to the bit."""
    terms = 2
    of = {"shared": launch.shared_memory(device), "processors": launch.multiprocessors(device)}
    if launch.parameters("affine_grid", batch=batch, features=features, terms=terms, **of) is None:
        pytest.skip("does not fit")
    w, u, pre = uneven(batch, features, device)
    seen = outcomes(w, u, pre, **options())
    for (z, steps, _, status), eager, truth in (
        (seen[:4], affine.affine_solve_ref(w, u, **options()), exact(w, u, **options())),
        (seen[4:], affine.affine_adjoint_ref(w, pre, u, **options()), dense_adjoint(w, pre, u, "tanh")),
    ):
        assert (status == CONVERGED).all() and (steps - eager[1]).abs().max() <= 1
        assert_as_eager(z, eager[0], truth, terms)
    for _ in range(100):
        for again, first in zip(outcomes(w, u, pre, **options()), seen, strict=True):
            assert torch.equal(again, first)
