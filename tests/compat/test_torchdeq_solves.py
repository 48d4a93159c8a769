"""Solves of tritondeq.compat.torchdeq beside those of torchdeq itself: values and gradients in float64."""

import pytest
import torch
from alike import TIGHT, agree

import tritondeq as tdeq
from tritondeq.compat import torchdeq as ours

FEW = {"f_max_iter": 7, "f_tol": 0.0}  # no solve converges in seven evaluations


def outcome(library, options, several=False, train=True, **call):
    """Returns (states, gradients of W and u, info) for z = tanh(W z + u), as one tensor or as two."""
    gen = torch.Generator().manual_seed(1)
    w = (0.12 * torch.randn(6, 6, generator=gen)).requires_grad_()
    u = torch.randn(4, 6, generator=gen).requires_grad_()
    deq = library.get_deq(**options).train(train)
    if several:

        def f(a, b):
            return torch.tanh(b @ w[:3, :3].T + u[:, :3]), torch.tanh(a @ w[3:, 3:].T + u[:, 3:])

        states, info = deq(f, [torch.zeros(4, 3), torch.zeros(4, 3)], **call)
        assert all(len(state) == 2 for state in states)
        states = [torch.cat(list(state), 1) for state in states]
    else:
        states, info = deq(lambda z: torch.tanh(z @ w.T + u), torch.zeros(4, 6), **call)
    loss = sum((k + 1) * state.sin().sum() for k, state in enumerate(states))
    grads = torch.autograd.grad(loss, (w, u)) if train else ()
    return states, grads, info


SOLVERS = ["fixed_point_iter", "anderson", "broyden"]
CONVERGED = {
    "one step": {},
    "phantom": {"grad": 5, "tau": 0.6},
    "ift": {"ift": True},
    "hook_ift": {"hook_ift": True},
    "relative": {"ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel"},
    "indexing core": {"core": "indexing", "ift": True},
    **{f"ift by {name}": {"ift": True, "f_solver": name, "b_solver": name} for name in SOLVERS[1:]},
    "phantom by anderson": {"f_solver": "anderson", "grad": 3, "tau": 0.7},
    "sup_gap": {"grad": 6, "sup_gap": 2},
    "sup_loc": {"grad": 6, "sup_loc": [1, 4]},
    "slices, ift": {"indexing": [2, 4], "ift": True},
}


@pytest.mark.parametrize("several", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("options", CONVERGED.values(), ids=CONVERGED)
def test_a_converged_solve_has_their_value_and_gradient(theirs, options, several):
    mine, other = (outcome(library, TIGHT | options, several) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-12)
    agree(mine[1], other[1], 1e-12)


TRUNCATED = {
    "phantom": {"grad": 3, "tau": 0.5},
    "sliced, n_states": {"n_states": 3, "grad": [1, 2, 3], "tau": 0.5},
    "sliced, indexing": {"indexing": [1, 4], "grad": 2},
    "indexing core, n_states": {"core": "indexing", "n_states": 3, "grad": [2, 1, 3], "tau": 0.5},
    "indexing core, indexing": {"core": "indexing", "indexing": [2, 3], "grad": 2},
    "simple": {"f_solver": "simple_fixed_point_iter", "grad": 2, "tau": 0.8},
    "simple, slices": {"f_solver": "simple_fixed_point_iter", "n_states": 2},
    "simple, states": {"f_solver": "simple_fixed_point_iter", "core": "indexing", "indexing": [1, 3]},
}


@pytest.mark.parametrize("several", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("options", TRUNCATED.values(), ids=TRUNCATED)
def test_a_truncated_solve_is_theirs_to_the_digit(theirs, options, several):
    mine, other = (outcome(library, FEW | options, several) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-15)
    agree(mine[1], other[1], 1e-15)


@pytest.mark.parametrize("several", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("options", TRUNCATED.values(), ids=TRUNCATED)
def test_a_truncated_solve_with_ift_has_their_values(theirs, options, several):
    """Its gradient is implicit at that value; theirs takes df/dtheta one evaluation before."""
    options = FEW | options | {"ift": True, "b_tol": 1e-12, "b_max_iter": 100}
    if several and "f_solver" in options:
        with pytest.raises(AttributeError):  # there, lists fail
            outcome(theirs, options, several)
        outcome(ours, options, several)
        return
    mine, other = (outcome(library, options, several) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-15)
    agree(mine[1], other[1], 1e-2)
    assert (mine[2]["nstep"] >= (7 if "core" in options else 2)).all()


CALLS = {
    "damped": ({}, {"tau": 0.7}),
    "f_max_iter": ({}, {"f_max_iter": 4}),
    "f_max_iter of states": ({"core": "indexing", "n_states": 2}, {"f_max_iter": 4}),
    "return_final": ({}, {"return_final": True}),
    "simple and damped": ({"f_solver": "simple_fixed_point_iter"}, {"tau": 0.7}),
}


@pytest.mark.parametrize(("options", "call"), CALLS.values(), ids=CALLS)
def test_solver_kwargs_are_of_one_call(theirs, options, call):
    mine, other = (outcome(library, FEW | options, solver_kwargs=call) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-15)
    agree(mine[1], other[1], 1e-15)


@pytest.mark.parametrize(("solver", "call"), [("anderson", {"m": 3, "tau": 0.9}), ("broyden", {"LBFGS_thres": 6})])
def test_memories_of_solvers_are_options_of_a_call(theirs, solver, call):
    options = TIGHT | {"f_solver": solver, "f_max_iter": 100, "grad": 2}
    mine, other = (outcome(library, options, solver_kwargs=call) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-12)
    plain, _, _ = outcome(ours, options | {"f_max_iter": 9, "f_tol": 0.0})
    other, _, _ = outcome(ours, options | {"f_max_iter": 9, "f_tol": 0.0}, solver_kwargs=call)
    assert not torch.equal(plain[0], other[0])


def test_a_solver_of_tritondeq_is_a_solver(theirs):
    options = {"f_solver": tdeq.Anderson(3), "b_solver": tdeq.Broyden(8), "ift": True}
    agree(outcome(ours, TIGHT | options)[1], outcome(theirs, TIGHT | {"ift": True})[1], 1e-12)


@pytest.mark.parametrize("options", [{"eval_factor": 0.5}, {"eval_f_max_iter": 3}, {"eval_factor": 2.0}])
def test_eval_takes_its_own_number_of_evaluations(theirs, options):
    mine, other = (outcome(library, FEW | options, train=False) for library in (ours, theirs))
    agree(mine[0], other[0], 1e-15)


@pytest.mark.parametrize(
    "options", [{"ift": True}, {"grad": 400}, {"grad": 1}, {"f_solver": "simple_fixed_point_iter"}]
)
def test_eval_is_differentiable(options):
    """There the state has no graph."""
    u = torch.randn(3, 5, requires_grad=True)
    deq = ours.get_deq(**TIGHT | options).eval()
    states, info = deq(lambda z: torch.tanh(0.5 * z + u), torch.zeros(3, 5))
    assert (info["nstep"] > 10).all()
    slope = 1 - states[-1].detach() ** 2
    exact = slope if options.get("grad", 1) == 1 and "ift" not in options else slope / (1 - 0.5 * slope)
    agree(torch.autograd.grad(states[-1].sum(), u), [exact], 1e-12)


@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_info_has_their_keys(theirs, mode):
    options = {"f_max_iter": 30, "f_tol": 1e-6, "f_stop_mode": mode}
    mine, other = (outcome(library, options)[2] for library in (ours, theirs))
    assert {*mine} - {"status"} == {*other} - {"rel_trace" if mode == "abs" else "abs_trace"}
    assert (mine["status"] == tdeq.Status.CONVERGED).all()
    assert (mine["nstep"] <= other["nstep"]).all() and mine["nstep"].max() == other["nstep"].max()
    assert (mine[f"{mode}_lowest"] < 1e-6).all()
    slowest = other[f"{mode}_lowest"].argmax()  # theirs go on until it is done
    for key in ("abs_lowest", "rel_lowest"):
        assert mine[key][slowest] == pytest.approx(other[key][slowest].item(), rel=1e-5)
    n = int(mine["nstep"].min())
    torch.testing.assert_close(mine[f"{mode}_trace"][:, 1:n], other[f"{mode}_trace"][:, 2 : n + 1], rtol=1e-4, atol=0)
    assert mine["sradius"].tolist() == other["sradius"].tolist() == [-1]


def test_sradius_is_right_where_eigenvalues_are_complex(theirs):
    """There: the Rayleigh quotient of a rotation, 0.9 cos(1) here."""
    turn = 0.9 * torch.tensor([[0.5403, -0.8415], [0.8415, 0.5403]])
    options = {"f_max_iter": 300, "f_tol": 1e-9}
    mine, other = (
        library.get_deq(**options).eval()(lambda z: z @ turn.T + 1, torch.zeros(3, 2), sradius_mode=True)[1]["sradius"]
        for library in (ours, theirs)
    )
    torch.testing.assert_close(mine, torch.full((3,), 0.9), rtol=1e-4, atol=0)
    assert (other < 0.6).all()


def test_a_writer_gets_the_info_of_backward_solves():
    seen = []
    outcome(ours, TIGHT | {"ift": True}, backward_writer=seen.append)
    (info,) = seen
    assert info["rel_lowest"].shape == (4,) and (info["rel_lowest"] <= 1e-13).all() and (info["nstep"] > 5).all()


def test_scalars_and_vectors_are_states(theirs):
    for z0 in (torch.tensor(0.2), torch.linspace(0, 1, 5)):
        (mine,), info = ours.get_deq(**TIGHT)(torch.cos, z0)
        agree([mine], theirs.get_deq(**TIGHT)(torch.cos, z0)[0], 1e-12)
        assert info["nstep"].shape == (z0.numel(),)


def test_all_states_come_back_where_a_solve_converges_early(theirs):
    """There: one state in place of three, with the one-step gradient in place of the implicit one."""
    options = TIGHT | {"core": "indexing", "n_states": 3, "ift": True}
    assert len(outcome(theirs, options)[0]) == 1
    states, grads, _ = outcome(ours, options)
    assert len(states) == 3
    final, exact, _ = outcome(ours, TIGHT | {"ift": True})
    agree([states[-1]], final, 1e-12)
