"""The MLP and the gated cell on the row-tile skeleton: against float64, against torch, row by row."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from close import FLOOR, assert_as_eager, assert_residual, error
from torch import Tensor

from tritondeq.kernels import devices, formulas, launch
from tritondeq.kernels.rows import gated as gated_op
from tritondeq.kernels.rows import mlp as mlp_op
from tritondeq.kernels.rules import CONVERGED, MAX_STEPS, NONFINITE, PLATEAU, WINDOW

nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


@dataclass(frozen=True)
class Problem:
    """A cell's op and the tensors of one problem; `rows` are those with a row of each problem."""

    op: object
    f: Callable[..., Tensor]  # (shared, rows, z)
    shared: tuple
    rows: tuple
    options: dict
    adjoint_of: Callable  # (shared, rows, z) -> operands of the adjoint, before g

    @property
    def like(self) -> Tensor:
        return self.rows[0]

    def solve(self, ref=False, z0=None, double=False, rows=None, **changed):
        shared, rows = (to(x, torch.float64) if double else x for x in (self.shared, rows or self.rows))
        work = self.op.solve_ref if ref or double else self.op.solve
        return work(*shared, *self.packed(rows), z0, **{"tol": 1e-6, "max_steps": 400} | self.options | changed)

    def adjoint(self, z, g, ref=False, double=False, rows=None, **changed):
        shared, rows, z, g = (to(x, torch.float64) if double else x for x in (self.shared, rows or self.rows, z, g))
        work = self.op.adjoint_ref if ref or double else self.op.adjoint
        settings = {"tol": 1e-6, "max_steps": 400} | self.options | changed
        return work(*self.adjoint_of(shared, rows, z), g, **settings)

    def packed(self, rows):
        return rows if len(rows) == 1 else (rows,)


def to(x, dtype):
    return x.to(dtype) if isinstance(x, Tensor) else tuple(to(y, dtype) for y in x)


def matrix(n, m, norm, terms, device):
    w = torch.randn(n, m, dtype=torch.float64)
    w = (w * norm / torch.linalg.matrix_norm(w, 2)).float()
    return (w.bfloat16().float() if terms == 1 else w).to(device)


def mlp_problem(device, batch=5, features=12, hidden=20, form="post", activation="gelu", gate=False, terms=2):
    shapes = [(hidden, features), (features, hidden), *([(hidden, features)] if gate else [])]
    weights = tuple(matrix(n, m, 0.7, terms, device) for n, m in shapes)
    biases = tuple(0.3 * torch.randn(n, device=device) for n, _ in shapes)
    scale = 0.5 + 0.4 * torch.rand(features, device=device)  # post: 0.5 to 0.9; pre: halved
    scale = scale if form == "post" else scale / 2
    u = torch.randn(batch, features, device=device)

    def f(shared, rows, z):
        return formulas.mlp(form, activation, *shared, *rows, z)

    def at(shared, rows, z):
        (weights, biases, scale), (u,) = shared, rows
        pre = formulas.mlp_inner(form, weights, biases, u, z)
        normed = formulas.mlp_outer(form, activation, weights, biases, u, z, pre) if form == "post" else z
        return weights, scale, (normed, *formulas.hidden_slopes(activation, pre))

    options = {"form": form, "activation": activation, "terms": terms}
    return Problem(mlp_op.op, f, (weights, biases, scale), (u,), options, at)


def gated_problem(device, batch=5, features=12, terms=2):
    weights = tuple(matrix(features, features, 0.6, terms, device) for _ in range(3))
    rows = tuple(torch.randn(batch, 3 * features, device=device).chunk(3, 1))  # strided, as the cell has them

    def f(shared, rows, z):
        _, s, c = formulas.gru(*shared, rows, z)
        return (1 - s) * z + s * c

    def at(shared, rows, z):
        return shared[0], formulas.gru_slopes(z, *formulas.gru(shared[0], rows, z))

    return Problem(gated_op.gated, f, (weights,), rows, {"terms": terms}, at)


PROBLEMS = {
    "post relu 12-20": lambda device: mlp_problem(device, activation="relu"),
    "post gelu 17-16": lambda device: mlp_problem(device, 17, 17, 16),
    "post swiglu 12-33": lambda device: mlp_problem(device, hidden=33, activation="silu", gate=True),
    "post silu 1-1": lambda device: mlp_problem(device, 1, 1, 1, activation="silu"),
    "pre gelu 16-17": lambda device: mlp_problem(device, 16, 16, 17, form="pre"),
    "pre swiglu 12-20 bf16": lambda device: mlp_problem(device, form="pre", activation="silu", gate=True, terms=1),
    "pre relu 65-30 terms3": lambda device: mlp_problem(device, 2, 65, 30, form="pre", activation="relu", terms=3),
    "gated 12": gated_problem,
    "gated 17 bf16": lambda device: gated_problem(device, 17, 17, terms=1),
    "gated 33 terms3": lambda device: gated_problem(device, 3, 33, terms=3),
}
FEW = ["post swiglu 12-33", "pre gelu 16-17", "gated 12"]


@pytest.fixture
def problem(request, device):
    return PROBLEMS[request.param](device)


every = pytest.mark.parametrize("problem", PROBLEMS, indirect=True)
some = pytest.mark.parametrize("problem", FEW, indirect=True)


def true_residual(problem, z):
    shared, rows, z = to(problem.shared, torch.float64), to(problem.rows, torch.float64), z.double()
    f = problem.f(shared, rows, z)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-30)


@every
def test_solve(problem):
    z, steps, residual, status = problem.solve()
    eager, eager_steps, *_ = problem.solve(ref=True)
    assert_as_eager(z, eager, problem.solve(double=True, tol=1e-13, max_steps=2000)[0], problem.options["terms"])
    assert (steps - eager_steps).abs().max() <= 1
    assert (status == CONVERGED).all() and (residual <= 1e-6).all()
    assert_residual(residual, true_residual(problem, z), 1e-5 if problem.options["terms"] == 2 else 1e-6)


@every
def test_adjoint_is_the_dense_system_of_autograd(problem):
    z = problem.solve(double=True, tol=1e-13, max_steps=2000)[0]
    z += 0.05 * torch.randn_like(z)  # at any point: the gate's slope is 0 at a solution
    g = torch.randn_like(problem.like)
    shared, rows = to(problem.shared, torch.float64), to(problem.rows, torch.float64)

    def one(i):
        def f(z_row):
            return problem.f(shared, tuple(r[i : i + 1] for r in rows), z_row[None])[0]

        jacobian = torch.autograd.functional.jacobian(f, z[i])
        return torch.linalg.solve(torch.eye(len(jacobian), dtype=z.dtype, device=z.device) - jacobian.T, g[i].double())

    exact = torch.stack([one(i) for i in range(len(z))])
    u, steps, residual, status = problem.adjoint(z.float(), g)
    eager, eager_steps, *_ = problem.adjoint(z.float(), g, ref=True)
    assert error(problem.adjoint(z, g, double=True, tol=1e-13, max_steps=2000)[0], exact) < 1e-11
    assert_as_eager(u, eager, exact, problem.options["terms"])
    slack = torch.where(eager_steps < 4, 2, 1)  # an increment in bf16 takes 2^-8 off an error at best
    assert ((steps - eager_steps).abs() <= slack).all()
    assert (status == CONVERGED).all() and (residual <= 1e-6).all()


def same_steps(steps, eager):
    """Anderson's path is sensitive to rounding, its cost is not."""
    return (steps - eager).abs().max() <= 3 and (steps.sum() - eager.sum()).abs() <= 0.1 * eager.sum()


@some
@pytest.mark.parametrize("memory, damping", [(0, 0.7), (2, 1.0), (4, 0.8)])
def test_solvers(problem, memory, damping):
    settings = {"memory": memory, "damping": damping, "tol": 1e-5}
    exact = problem.solve(double=True, tol=1e-13, max_steps=2000)[0]
    z, steps, _, status = problem.solve(**settings)
    eager, eager_steps, *_ = problem.solve(ref=True, **settings)
    assert (status == CONVERGED).all() and same_steps(steps, eager_steps)
    assert_as_eager(z, eager, exact, 2)
    g = torch.randn_like(problem.like)
    u, steps, _, status = problem.adjoint(exact.float(), g, **settings)
    eager, eager_steps, *_ = problem.adjoint(exact.float(), g, ref=True, **settings)
    assert (status == CONVERGED).all() and same_steps(steps, eager_steps)
    assert_as_eager(u, eager, problem.adjoint(exact, g, double=True, tol=1e-13, max_steps=2000)[0], 2)


@some
def test_warm_start(problem):
    cold, steps, *_ = problem.solve()
    again, one, *_ = problem.solve(z0=cold, tol=3e-6)
    assert torch.equal(again, cold) and (one == 1).all()
    warm, fewer, *_ = problem.solve(z0=cold + 1e-3 * torch.randn_like(cold))
    assert (fewer < steps).all() and error(warm, cold.double()) < FLOOR[2]


@some
def test_max_steps_and_the_best_iterate(problem):
    for limit in (1, 4):
        z, steps, residual, status = problem.solve(max_steps=limit)
        assert (status == MAX_STEPS).all() and (steps == limit).all()
        exact = true_residual(problem, z)  # unconverged: increments in bf16
        assert ((residual - exact).abs() <= 0.02 * exact + 2e-3).all()


@some
def test_as_far_as_the_precision_goes(problem):
    z, _, residual, status = problem.solve(tol=1e-12)
    assert ((status == PLATEAU) | (status == CONVERGED)).all() and (residual < 3e-7).all()
    assert error(z, problem.solve(double=True, tol=1e-14, max_steps=2000)[0]) < FLOOR[2]


@nonfinite
@some
@pytest.mark.parametrize("memory", [0, 2])
def test_nonfinite_row_stays_alone(problem, memory):
    clean = problem.solve(memory=memory)
    rows = tuple(r.clone() for r in problem.rows)
    rows[0][2, 0] = torch.nan
    spoilt = problem.solve(rows=rows, memory=memory)
    others = torch.arange(len(rows[0])) != 2
    for seen, expected in zip(spoilt, clean, strict=True):
        assert torch.equal(seen[others], expected[others])
    z, steps, _, status = spoilt
    assert status[2] == NONFINITE and (z[2] == 0).all() and steps[2] == WINDOW


@some
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_adjoint_is_homogeneous(problem, scale):
    z, g = problem.solve()[0], torch.randn_like(problem.like)
    u, steps, *_ = problem.adjoint(z, g)
    scaled, scaled_steps, *_ = problem.adjoint(z, g * scale)
    assert error(scaled / scale, u.double()) < 1e-5 and (steps - scaled_steps).abs().max() <= 1


@pytest.mark.parametrize("make", [mlp_problem, gated_problem])
def test_empty_batch(device, make):
    problem = make(device, batch=0)
    for z, steps, residual, status in (problem.solve(), problem.adjoint(problem.like, problem.like)):
        assert z.shape == (0, 12) and steps.shape == residual.shape == status.shape == (0,)


def spread(make, device):
    """36 rows of very different depths."""
    problem = make(device, batch=36)
    factor = torch.logspace(-3, 1, 36, device=device)[torch.randperm(36)][:, None]
    return Problem(**vars(problem) | {"rows": tuple(r * factor for r in problem.rows)})


@pytest.mark.slow  # those of Affine are not
@pytest.mark.parametrize("make", [mlp_problem, lambda *a, **k: mlp_problem(*a, form="pre", **k), gated_problem])
@pytest.mark.parametrize("memory", [0, 2])
def test_lanes_take_new_rows(device, monkeypatch, make, memory):
    """Rows do not depend on their tile mates, nor on the row that had their lane before."""
    problem, settings = spread(make, device), {"max_steps": 18, "memory": memory, "tol": 1e-4}
    g, z0 = torch.randn_like(problem.like), torch.randn_like(problem.like)
    z = problem.solve(**settings)[0]

    def outcome():
        cold, warm = problem.solve(**settings), problem.solve(z0=z0, **settings)
        return *cold, *warm, *problem.adjoint(z, g, **settings)

    whole = outcome()
    assert whole[1].unique().numel() >= 3, "the rows are not of different depths"
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 1)
    for refill, programs in ((8, 1), (15, 2)):
        one = {"programs": programs, "REFILL": refill}
        with launch.override("rows.mlp", one), launch.override("rows.gated", one):
            for seen, expected in zip(outcome(), whole, strict=True):
                assert torch.equal(seen, expected)


def test_refuses(monkeypatch):
    takes = {"shapes": [(256, 128), (128, 256)], "dtype": torch.float32, "terms": 1}
    assert mlp_op.refuses(**takes) is None
    assert "262144 bytes of weights in 2 bf16 terms" in mlp_op.refuses(**takes | {"terms": 2})
    assert "float64" in mlp_op.refuses(**takes | {"dtype": torch.float64})
    assert "'tanh'" in mlp_op.refuses(**takes, activation="tanh")
    assert "memory 5" in mlp_op.refuses(**takes, solver_memory=5)
    takes = {"shapes": [(128, 128)] * 3, "dtype": torch.float32, "terms": 1}
    assert gated_op.refuses(**takes) is None
    assert "float64" in gated_op.refuses(**takes | {"dtype": torch.float64})
    assert "memory 5" in gated_op.refuses(**takes, solver_memory=5)
    assert "bytes" in gated_op.refuses(**takes | {"shapes": [(256, 256)] * 3})
