"""The driver: stopping, freezing, what is returned, masks, structures, precisions, and bad input."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from problems import tanh_problem

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Picard, Status, fixed_point, layout
from tritondeq.kernels import rules

RATES = torch.tensor([[0.1], [0.5], [0.9], [0.99]])


def linear(z, rates=RATES):
    return rates * z + 1


def half(z):
    return 0.5 * z + 1


def test_each_sample_stops_alone():
    solution = fixed_point(linear, torch.zeros(4, 3), tol=1e-4, max_steps=2000)
    alone = [fixed_point(linear, torch.zeros(1, 3), (r,), tol=1e-4, max_steps=2000).steps.item() for r in RATES]
    assert solution.steps.tolist() == alone
    assert alone == sorted(alone) and alone[-1] > 10 * alone[1]


def test_steps_are_evaluations_and_the_loop_ends_with_the_slowest():
    calls = []

    def f(z):
        calls.append(1)
        return linear(z)

    for tol, max_steps in ((1e-4, 2000), (1e-9, 7)):
        calls.clear()
        solution = fixed_point(f, torch.zeros(4, 3), tol=tol, max_steps=max_steps)
        assert len(calls) == solution.steps.max() + 1  # one at the solution, for gradients


def test_a_frozen_sample_does_not_move():
    seen = []

    def f(z):
        seen.append(z[0].clone())
        return linear(z)

    solution = fixed_point(f, torch.zeros(4, 3), tol=1e-3, max_steps=50)
    stopped = solution.steps[0].item()
    assert all(torch.equal(z, seen[stopped - 1]) for z in seen[stopped:])
    assert torch.equal(solution.value[0], seen[stopped - 1])


@pytest.mark.parametrize("solver", [Picard(), Picard(0.8), Anderson(4), Broyden(5)], ids=repr)
def test_batch_mates_change_nothing_to_the_bit(solver):
    """With a cell that computes each row by itself; permuted, split and padded."""
    gen = torch.Generator().manual_seed(1)
    rates = torch.rand(9, 40, generator=gen) * 1.9 - 0.95
    u = torch.randn(9, 40, generator=gen)

    def solve(rows):
        r, b = rates[rows], u[rows]
        return fixed_point(lambda z: torch.tanh(r * z + b), torch.zeros(len(rows), 40), solver=solver, tol=1e-6)

    base = solve(torch.arange(9))
    for rows in (torch.randperm(9, generator=gen), torch.arange(4), torch.tensor([5]), torch.arange(9).repeat(3)):
        other = solve(rows)
        assert torch.equal(other.steps, base.steps[rows])
        assert torch.equal(other.residual, base.residual[rows])
        assert torch.equal(other.value, base.value[rows])


def test_the_best_iterate_is_returned_not_the_last():
    """A map whose residual falls, then rises: the third iterate is the best."""
    defects = torch.tensor([1.0, 0.5, 0.01, 0.3, 0.7, 0.9], dtype=torch.float64)
    path = []

    def f(z):
        k = len(path)
        path.append(z.clone())
        return z + defects[min(k, 5)]

    with torch.no_grad():
        solution = fixed_point(f, torch.full((1, 1), 10.0, dtype=torch.float64), tol=1e-6, max_steps=6)
    assert torch.equal(solution.value, path[2])
    assert solution.residual.item() == pytest.approx(0.01 / (path[2].item() + 0.01))
    assert solution.status.item() == Status.MAX_STEPS


def test_a_nonfinite_sample_stays_alone_and_finite():
    bad = torch.tensor([[1.0], [float("nan")], [1.0], [float("inf")]])
    for solver in (Picard(), Anderson(), Broyden()):
        solution = fixed_point(lambda z: 0.5 * z + bad, torch.zeros(4, 3), solver=solver, tol=1e-5)
        assert solution.status.tolist() == [0, 4, 0, 4]
        assert solution.value.isfinite().all()
        torch.testing.assert_close(solution.value[::2], torch.full((2, 3), 2.0), rtol=2e-5, atol=0)  # tol / (1 - rho)
        assert solution.steps[1] == rules.WINDOW  # a sample that is not finite ends with its window
        good = fixed_point(half, torch.zeros(2, 3), solver=solver, tol=1e-5)
        assert torch.equal(good.steps, solution.steps[::2]) and torch.equal(good.value, solution.value[::2])


def test_infinity_after_some_steps_returns_the_last_good_iterate():
    calls = []

    def f(z):
        calls.append(1)
        return 0.9 * z + 1 if len(calls) < 5 else z + float("inf")

    solution = fixed_point(f, torch.zeros(2, 2), tol=1e-9)
    assert (solution.status == Status.NONFINITE).all() and solution.value.isfinite().all()
    assert solution.value[0, 0].item() == pytest.approx(1 + 0.9 + 0.81)


def test_a_plateau_ends_a_solve_that_cannot_get_there():
    f, _, _ = tanh_problem(16, 64, 0.5)
    noisy = fixed_point(lambda z: f(z).bfloat16().float(), torch.zeros(16, 64), tol=1e-6, max_steps=500)
    assert set(noisy.status.tolist()) <= {Status.PLATEAU, Status.CONVERGED}
    assert (noisy.status == Status.PLATEAU).any()
    assert noisy.steps.max() < 100 and noisy.residual.max() < rules.FLOOR
    noisy.raise_if_failed()


def test_a_state_that_runs_away_is_growing():
    """A residual block without an outer norm: z grows by a constant, so the relative residual falls like 1 / k."""
    solution = fixed_point(lambda z: z + 1, torch.zeros(2, 3), tol=2e-2, max_steps=200)
    assert (solution.status == Status.GROWING).all() and solution.residual.max() < 3e-2
    with pytest.raises(RuntimeError, match="GROWING.*outer norm"):
        fixed_point(lambda z: z + 1, torch.zeros(2, 3), tol=2e-2, max_steps=200, throw=True)


@pytest.mark.parametrize("rate, shift, value", [(0.995, 1, 200), (0.98, 1, 50), (0.5, 0, 0)])
def test_slow_progress_is_no_plateau_and_a_large_fixed_point_is_not_growing(rate, shift, value):
    solution = fixed_point(lambda z: rate * z + shift, torch.zeros(1, 3), tol=1e-5, max_steps=5000)
    assert solution.converged.all() and solution.value.mean().item() == pytest.approx(value, rel=1e-2)
    assert fixed_point(lambda z: rate * z + shift, solution.value, tol=1e-5).steps.item() == 1  # a warm start


def test_trace_is_every_residual():
    solution = fixed_point(linear, torch.zeros(4, 3), tol=1e-3, max_steps=30, trace=True)
    assert solution.trace.shape == (30, 4)
    for i in range(4):
        assert solution.trace[:, i].min() == solution.residual[i]
    assert fixed_point(linear, torch.zeros(4, 3)).trace is None


def test_a_state_of_mixed_dtypes_keeps_each():
    z0 = (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.float64))
    solution = fixed_point(lambda z: (0.5 * z[0] + 1, 0.5 * z[1] + 1), z0, tol=1e-2)
    assert [v.dtype for v in solution.value] == [torch.bfloat16, torch.float64]
    assert solution.residual.dtype == torch.float64


@pytest.mark.parametrize("batch_dims,shape", [(0, ()), (1, (4,)), (2, (4, 5)), (-1, (4, 5)), (3, (4, 5, 6))])
def test_batch_dims_say_what_a_sample_is(batch_dims, shape):
    z0 = torch.zeros(6, 5, 4).permute(2, 1, 0)  # not contiguous
    solution = fixed_point(half, z0, batch_dims=batch_dims, tol=1e-5)
    assert solution.status.shape == solution.steps.shape == solution.residual.shape == shape
    torch.testing.assert_close(solution.value, torch.full((4, 5, 6), 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single_states(shape):
    for solver in (Picard(), Anderson(), Broyden()):
        solution = fixed_point(half, torch.zeros(shape), solver=solver)
        assert solution.value.shape == shape and solution.converged.all()


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=3), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    kind=st.sampled_from(["list", "tuple", "dict", "deep"]),
    solver=st.sampled_from([Picard(), Anderson(2), Broyden(2)]),
)
@hypothesis.settings(max_examples=40)
def test_random_structures_solve_as_their_concatenation(shapes, batch, kind, solver):
    leaves = [torch.zeros(batch, *shape) for shape in shapes]
    wrap = {
        "list": list,
        "tuple": tuple,
        "dict": lambda xs: {str(i): x for i, x in enumerate(xs)},
        "deep": lambda xs: {"x": (xs[0], list(xs[1:]))},
    }[kind]
    width = sum(leaf[0].numel() for leaf in leaves)
    rates = torch.linspace(-0.9, 0.9, max(width, 1))[:width]

    def flat(state):
        return torch.cat([x.reshape(batch, -1) for x in layout.pytree.tree_leaves(state)], dim=1)

    def f(state):
        parts = torch.tanh(rates * flat(state) + 0.5).split([leaf[0].numel() for leaf in leaves], dim=1)
        return wrap([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

    nested = fixed_point(f, wrap(leaves), solver=solver, tol=1e-5)
    plain = fixed_point(lambda z: torch.tanh(rates * z + 0.5), torch.zeros(batch, width), solver=solver, tol=1e-5)
    assert torch.equal(flat(nested.value), plain.value) and torch.equal(nested.steps, plain.steps)
    assert layout.pytree.tree_structure(nested.value) == layout.pytree.tree_structure(wrap(leaves))


def test_a_mask_removes_elements_from_both_norms():
    rates = torch.tensor([0.1, 0.1, 0.99])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    solution = fixed_point(lambda z: rates * z + 1, torch.zeros(2, 3), tol=1e-4, max_steps=60, mask=mask)
    assert solution.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    value = solution.value[0]
    y = rates * value + 1
    assert solution.residual[0].item() == pytest.approx(((y - value)[:2].norm() / y[:2].norm()).item(), rel=1e-4)


def test_padding_with_a_mask_changes_nothing():
    f, w, u = tanh_problem(3, 16, 0.8)
    plain = fixed_point(f, torch.zeros(3, 16), tol=1e-5)
    wide = torch.cat([u, torch.randn(3, 4)], dim=1)

    def padded(z):
        return torch.cat([torch.tanh(torch.addmm(u, z[:, :16], w.T)), torch.sin(7 * z[:, 16:]) + wide[:, 16:]], dim=1)

    mask = (torch.arange(20) < 16).expand(3, 20)
    masked = fixed_point(padded, torch.zeros(3, 20), tol=1e-5, mask=mask)
    assert torch.equal(masked.steps, plain.steps) and torch.equal(masked.value[:, :16], plain.value)


def test_a_mask_of_the_batch_shape_covers_each_sample():
    mask = torch.tensor([[True, False, True]])
    solution = fixed_point(half, torch.zeros(2, 3, 4), batch_dims=2, mask=mask, tol=1e-4)
    assert (solution.steps[:, 1] == 1).all() and (solution.steps[:, 0] > 5).all()


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_default_tolerance_follows_the_dtype(dtype, tol):
    solution = fixed_point(lambda z: 0.8 * z + 1, torch.zeros(2, 3, dtype=dtype))
    assert solution.value.dtype == dtype and solution.residual.dtype == torch.float32
    assert tol / 3 < solution.residual.max() <= tol


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_states_iterate_in_float32(solver, dtype):
    f, _, _ = tanh_problem(8, 32, 0.45)
    solution = fixed_point(lambda z: f(z.float()).to(dtype), torch.zeros(8, 32, dtype=dtype), solver=solver)
    assert solution.converged.all()
    truth = fixed_point(f, torch.zeros(8, 32), tol=1e-6).value
    assert (solution.value.float() - truth).norm() / truth.norm() < 2e-2


def test_autocast_rules_the_cell_only():
    w = torch.randn(16, 16) * 0.1
    seen = set()

    def f(z):
        y = z @ w.T
        seen.add((z.dtype, y.dtype))
        return torch.tanh(y) + 1

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for solver in (Picard(), Anderson(), Broyden()):
            solution = fixed_point(f, torch.zeros(4, 16), solver=solver)
            assert solution.value.dtype == torch.float32 and solution.residual.dtype == torch.float32
            assert solution.converged.all() and solution.residual.max() <= 1e-2
    assert seen == {(torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitudes_far_from_one(scale):
    solution = fixed_point(lambda z: 0.5 * z + scale, torch.zeros(2, 3), solver=Anderson(2), tol=1e-5)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full((2, 3), 2 * scale), rtol=1e-4, atol=0)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "f, z0, options, error, words",
    [
        (half, ONES.long(), {}, TypeError, "z0.*floating-point.*int64"),
        (half, [ONES, 1.0], {}, TypeError, "z0.*float 1.0"),
        (half, ONES.to(torch.complex64), {}, TypeError, "z0.*complex64"),
        (half, (), {}, ValueError, "z0 must hold at least one tensor"),
        (half, (ONES, torch.ones(3, 3)), {}, ValueError, r"z0.*first 1 dims.*\(2, 3\).*\(3, 3\)"),
        (half, ONES, {"batch_dims": 3}, ValueError, "batch_dims=3"),
        (half, ONES, {"batch_dims": 1.0}, TypeError, "batch_dims must be an integer"),
        (None, ONES, {}, TypeError, "f must be callable"),
        (half, ONES, {"args": [1]}, TypeError, "args must be a tuple.*list"),
        (lambda z: z[:, :2], ONES, {}, ValueError, r"f\(z\).*\(2, 3\).*\(2, 2\)"),
        (lambda z: (z, z), ONES, {}, TypeError, r"f\(z\).*tuple"),
        (lambda z: z[0], (ONES, ONES), {}, ValueError, r"f\(z\).*structure"),
        (lambda z: z.long(), ONES, {}, TypeError, r"f\(z\).*int64"),
        (lambda z: z.to("meta"), ONES, {}, ValueError, r"f\(z\).*cpu.*meta"),
        (lambda z: None, ONES, {}, TypeError, r"f\(z\).*None"),
        (half, ONES, {"tol": 0}, ValueError, "tol must be above 0, got 0"),
        (half, ONES, {"tol": "1e-3"}, TypeError, "tol must be a number"),
        (half, ONES, {"max_steps": 0}, ValueError, "max_steps.*at least 1.*0"),
        (half, ONES, {"solver": "anderson"}, TypeError, "solver.*'anderson'"),
        (half, ONES, {"adjoint": Picard()}, TypeError, "adjoint"),
        (half, ONES, {"stop_mode": "rel"}, TypeError, "stop_mode"),
        (half, ONES, {"mask": ONES}, TypeError, "mask.*bool.*float32"),
        (half, ONES, {"mask": torch.ones(3) > 0}, ValueError, r"mask.*\(3,\).*\(2, 3\)"),
        (half, ONES, {"mask": (ONES > 0,)}, ValueError, "mask.*structure"),
    ],
)
def test_bad_input_is_named(f, z0, options, error, words):
    with pytest.raises(error, match=words):
        fixed_point(f, z0, **options)


def test_an_error_in_f_comes_through_and_leaves_no_mode_behind():
    def f(z):
        raise ZeroDivisionError("mine")

    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError, match="mine"):
        fixed_point(f, torch.zeros(2, 3))
    assert (w * 2).grad_fn.next_functions[0][0].variable is w


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cell_is_a_function_too(backend):
    """f(z, injection); its methods of an injection are for layers."""
    cell, x = tdeq.cells.Affine(5), torch.randn(3, 5)
    with tdeq.backend(backend):
        solution = tdeq.fixed_point(cell, torch.zeros(3, 5), (cell.inject(x),), tol=1e-6)
        z = tdeq.DEQ(cell, tol=1e-6)(x)
    torch.testing.assert_close(solution.value, z, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(solution.value.sum(), cell.weight)[0].abs().max() > 0
