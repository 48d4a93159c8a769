"""tritondeq.compat.torchdeq beside torchdeq itself: values and gradients in float64, and what it refuses."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritondeq as tdeq
from tritondeq.compat import torchdeq as ours

TIGHT = {"f_max_iter": 120, "f_tol": 1e-13, "b_max_iter": 120, "b_tol": 1e-13}
FEW = {"f_max_iter": 7, "f_tol": 0.0}  # no solve converges in seven evaluations


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdeq")


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


def agree(mine, other, rtol):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()


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


def test_args_of_a_program_and_dicts_configure_alike():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    ours.add_deq_args(parser)
    line = "--ift --f_tol 1e-9 --grad 2 3 --n_states 2 --norm_clip_value 2 --core indexing".split()
    args = parser.parse_args(line)
    options = {"ift": True, "f_tol": 1e-9, "grad": [2, 3], "n_states": 2, "norm_clip_value": 2.0, "core": "indexing"}
    for deq in (ours.get_deq(args), ours.get_deq(options), ours.get_deq(**options), ours.get_deq(args, f_tol=1e-9)):
        assert vars(deq.options) == vars(ours.get_deq(args).options)
    assert ours.get_deq(args, f_tol=1e-4).options.f_tol == 1e-4 and args.f_tol == 1e-9


def test_options_are_attributes_that_may_be_set():
    deq = ours.get_deq(f_tol=1e-2)
    _, before = deq(torch.cos, torch.ones(1, 3))
    deq.f_tol = 1e-6
    _, after = deq(torch.cos, torch.ones(1, 3))
    assert deq.f_tol == 1e-6 and before["abs_lowest"] > 1e-4 > 1e-6 >= after["abs_lowest"]
    with pytest.raises(ValueError, match="tau must be in"):
        deq.tau = 2.0
    assert deq.tau == 1.0 and deq.grad == [1] and repr(deq) == "TorchDEQ(f_tol=1e-06)"


def test_the_command_line_is_theirs(theirs):
    parsers = argparse.ArgumentParser(), argparse.ArgumentParser()
    ours.add_deq_args(parsers[0])
    theirs.add_deq_args(parsers[1])
    mine, other = (vars(parser.parse_args([])) for parser in parsers)
    assert mine == other


REFUSED = {
    "core": ({"core": "custom"}, ValueError, "core must be sliced or indexing, got 'custom'"),
    "newton": ({"f_solver": "newton"}, ValueError, "f_solver must be fixed_point_iter, .* got 'newton'"),
    "b_solver": (
        {"b_solver": "simple_fixed_point_iter"},
        ValueError,
        "b_solver must be fixed_point_iter, anderson, broyden or .* got 'simple_fixed_point_iter'",
    ),
    "f_stop_mode": ({"f_stop_mode": "both"}, ValueError, "f_stop_mode must be abs or rel, got 'both'"),
    "b_stop_mode": ({"b_stop_mode": "both"}, ValueError, "b_stop_mode must be abs or rel, got 'both'"),
    "f_tol": ({"f_tol": -1.0}, ValueError, "f_tol must be at least 0"),
    "b_tol": ({"b_tol": 0.0}, ValueError, "b_tol must be above 0"),
    "f_max_iter": ({"f_max_iter": 2.5}, TypeError, "f_max_iter must be an integer"),
    "b_max_iter": ({"b_max_iter": 0}, ValueError, "b_max_iter must be at least 1"),
    "eval_factor": ({"eval_factor": 0}, ValueError, "eval_factor must be above 0"),
    "eval_f_max_iter": ({"eval_f_max_iter": 1.5}, TypeError, "eval_f_max_iter must be an integer"),
    "tau": ({"tau": 1.5}, ValueError, r"tau must be in \(0, 1\], got 1.5"),
    "grad": ({"grad": 0}, ValueError, "grad must be at least 1"),
    "grads": ({"grad": [1, 2]}, ValueError, r"grad must have one entry, or one for each .* got \[1, 2\]"),
    "sup_gap": ({"sup_gap": 3, "grad": 2}, ValueError, "sup_gap must be at most grad"),
    "n_states": ({"n_states": 41}, ValueError, "n_states must be at most f_max_iter, got 41 and 40"),
    "indexing": ({"indexing": [5, 40]}, ValueError, r"indexing must increase .* 40, got \[5, 40\]"),
    "batch_dims": ({"batch_dims": 2}, ValueError, "batch_dims must be 0 or 1, got 2"),
    "stop_mode": ({"stop_mode": "rel"}, TypeError, "unknown option 'stop_mode': did you mean .*f_stop_mode"),
    "unknown": ({"learning_rate": 1.0}, TypeError, "unknown option 'learning_rate'.*argparse.Namespace"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_mapped_is_refused_by_name(options, error, message):
    for make in (lambda: ours.get_deq(**options), lambda: ours.get_deq(options)):
        with pytest.raises(error, match=message):
            make()


def test_other_configurations_are_refused():
    class Config:
        f_tol = 1e-6

    with pytest.raises(TypeError, match=r"args must be an argparse.Namespace or a dict, got Config .*vars\(args\)"):
        ours.get_deq(Config())


@pytest.mark.parametrize(
    ("solver", "option", "message"),
    [
        ("anderson", {"lam": 1e-4}, "solver_kwargs has 'lam': it is an absolute ridge"),
        ("broyden", {"ls": True}, "solver_kwargs has 'ls': one line search"),
        ("anderson", {"return_final": True}, "solver_kwargs has 'return_final': the state with the lowest"),
        ("fixed_point_iter", {"m": 3}, "solver_kwargs has 'm': f_solver='fixed_point_iter' does not take it"),
        ("anderson", {"tolerance": 3}, "solver_kwargs has 'tolerance': f_solver='anderson' does not take it"),
        (tdeq.Anderson(3), {"m": 3}, "solver_kwargs has 'm': f_solver=Anderson"),
    ],
)
def test_options_of_a_call_are_refused_by_name(solver, option, message):
    with pytest.raises(TypeError, match=message):
        ours.get_deq(f_solver=solver)(torch.cos, torch.zeros(2, 2), solver_kwargs=option)
    if option in ({"ls": True}, {"return_final": True}):
        ours.get_deq(f_solver=solver)(torch.cos, torch.zeros(2, 2), solver_kwargs=dict.fromkeys(option, False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("get_solver", "tritondeq.fixed_point"),
        ("register_solver", "Solver"),
        ("register_deq", "fixed_point"),
        ("register_norm", "register_parametrization"),
        ("register_weight_func", "weight_func="),
        ("power_method", "spectral_radius"),
        ("solver_stat_from_final_step", "info"),
    ],
)
def test_names_without_a_counterpart_are_refused_as_they_are_imported(name, message):
    with pytest.raises(ImportError, match=f"torchdeq's {name} has no counterpart: .*{message}"):
        exec(f"from tritondeq.compat.torchdeq import {name}")


def test_every_other_public_name_is_there(theirs):
    public = {name for name in vars(theirs) if not name.startswith("_") and callable(getattr(theirs, name))}
    public -= {
        *"get_solver register_solver register_deq register_norm register_weight_func power_method mem_gc".split()
    }
    assert not {name for name in public - {"solver_stat_from_final_step"} if not hasattr(ours, name)}
    assert not hasattr(ours, "solve")


def twins(theirs, make, norm_type, **options):
    """Returns one model normed here, and the same one normed there, with what their power iteration converges to."""
    models = []
    for library in (ours, theirs):
        torch.manual_seed(0)
        model = make()
        library.apply_norm(model, norm_type, **options)
        for _ in range(50):
            library.reset_norm(model)
            model(torch.randn(1, *SHAPES[make]))  # one power iteration a call here, one a reset there
        models.append(model)
    return models


def linear():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def conv():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3))


SHAPES = {linear: (5,), conv: (2, 6, 6)}
NORMS = {
    "default": {},
    "target": {"target_norm": 0.7},
    "frozen": {"learn_scale": False, "target_norm": 0.7},
    "filter_out": {"filter_out": "0"},
    "prefix_filter_out": {"prefix_filter_out": ["2"]},
    "args": {"args": argparse.Namespace(norm_no_scale=True, norm_target_norm=0.5, sn_n_power_iters=2)},
}


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm", "none"])
@pytest.mark.parametrize("make", SHAPES)
def test_normed_models_compute_and_train_alike(theirs, make, norm_type, options):
    mine, other = twins(theirs, make, norm_type, **options)
    x = torch.randn(3, *SHAPES[make])
    for step in range(2):  # after a step of gradient descent, too
        theirs.reset_norm(other)
        out = mine(x), other(x)
        torch.testing.assert_close(*out, rtol=1e-6, atol=1e-9)
        for model, y in zip((mine, other), out, strict=True):
            y.sin().sum().backward()
            torch.optim.SGD(model.parameters(), 1e-3 if step else 0.0).step()
    assert sum(p.requires_grad for p in mine.parameters()) == sum(p.requires_grad for p in other.parameters())


def test_a_checkpoint_of_weight_norm_loads(theirs):
    mine, other = twins(theirs, linear, "weight_norm")
    for p in other.parameters():
        nn.init.normal_(p)
    mine.load_state_dict(other.state_dict())
    theirs.reset_norm(other)
    x = torch.randn(2, 5)
    torch.testing.assert_close(mine(x), other(x))


@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm"])
def test_remove_norm_leaves_the_weights(norm_type):
    model, x = linear(), torch.randn(2, 5)
    names = {*model.state_dict()}
    ours.apply_norm(model, norm_type)
    assert {*model.state_dict()} != names
    model.eval()
    y = model(x)
    ours.remove_norm(model)
    assert {*model.state_dict()} == names and torch.allclose(model(x), y)


def test_other_modules_are_normed_where_registered():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 4))

    model = nn.ModuleList([Kernel()])
    ours.apply_norm(model, "weight_norm")
    assert not nn.utils.parametrize.is_parametrized(model[0])
    ours.register_norm_module(Kernel, "weight_norm", "kernel", 1)
    ours.apply_norm(model, "weight_norm", learn_scale=False)
    torch.testing.assert_close(model[0].kernel.norm(dim=0), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": True}, ValueError, "norm_clip and clip are not mapped"),
        ({"args": {"norm_clip": True}}, ValueError, "norm_clip and clip are not mapped"),
        ({"norm_type": "layer_norm"}, ValueError, "norm_type must be weight_norm, spectral_norm or none"),
        ({"power": 1}, TypeError, "unknown option 'power'"),
    ],
)
def test_options_of_norms_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        ours.apply_norm(linear(), **options)


def test_modules_of_torchdeq_itself_are_refused(theirs):
    model = linear()
    theirs.apply_norm(model, "weight_norm")
    with pytest.raises(TypeError, match="0 holds dropout or a norm of torchdeq itself"):
        ours.reset_deq(model)
    with pytest.raises(TypeError, match="1 holds dropout or a norm of torchdeq itself"):
        ours.reset_deq(nn.Sequential(nn.Linear(2, 2), theirs.VariationalDropout(0.5)))


DROPOUTS = {
    "VariationalDropout": (3, 4),
    **{f"Variational{kind}{n}d": (2, 5, 6, 7, 8)[: n + 2] for kind in ("Dropout", "DropToken") for n in (1, 2, 3)},
}


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("token_first", [True, False])
def test_masks_have_the_shape_of_theirs(theirs, name, token_first):
    options = {} if name == "VariationalDropout" else {"token_first": token_first}
    x = torch.ones(*DROPOUTS[name])
    module, other = (getattr(library, name)(0.4, **options) for library in (ours, theirs))
    other(x)
    mask = module(x)
    shared = [dim for dim in range(x.ndim) if other.mask.shape[dim] == 1]
    assert all((mask == mask.narrow(dim, 0, 1)).all() for dim in shared)
    assert {round(v, 9) for v in mask.unique().tolist()} == {0.0, round(1 / 0.6, 9)}
    for dim in set(range(x.ndim)) - set(shared):
        assert any(((y := module(x)) != y.narrow(dim, 0, 1)).any() for _ in range(5))
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("options", [{"grad": 3}, {"ift": True}, {"f_solver": "simple_fixed_point_iter", "grad": 2}])
def test_a_mask_lasts_for_the_solve_and_its_gradient(options):
    drop, linear, seen = ours.VariationalDropout1d(0.5), nn.Linear(4, 4), []

    def cell(z):  # which the function of the layer reaches by its closure
        kept = drop(torch.ones_like(z))
        seen.append(kept)
        return torch.tanh(0.3 * linear(z) * kept + 1)

    def outer(z):
        return cell(z)

    deq = ours.get_deq(f_max_iter=6, **options)
    (z,), _ = deq(lambda z: outer(z), torch.zeros(2, 3, 4))
    first = len(seen)
    z.sum().backward()
    assert first > 3 and all(torch.equal(mask, seen[0]) for mask in seen)
    deq(lambda z: outer(z), torch.zeros(2, 3, 4))
    assert not torch.equal(seen[-1], seen[0])


@pytest.mark.parametrize("options", [{"grad": 3, "tau": 0.8}, {"ift": True}], ids=str)
def test_what_mem_gc_recomputes_has_the_mask_of_the_solve(options):
    linear, drop = nn.Linear(4, 4), ours.VariationalDropout(0.5)
    ours.apply_norm(linear, "weight_norm")

    def gradients(recompute):
        torch.manual_seed(1)
        u, calls = torch.ones(3, 4, requires_grad=True), []

        def cell(z, u):
            calls.append(1)
            return torch.tanh(0.5 * drop(linear(z)) + u)

        deq = ours.get_deq(**TIGHT | options)
        (z,), _ = deq(lambda z: ours.mem_gc(cell, (z, u)) if recompute else cell(z, u), torch.zeros(3, 4))
        before = len(calls)
        grads = torch.autograd.grad(z.sin().sum(), [u, *linear.parameters()])
        assert (len(calls) > before) == recompute
        return grads

    agree(gradients(True), gradients(False), 1e-14)


def test_dropout_is_refused_where_it_has_no_form():
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1.0"):
        ours.VariationalDropout(1.0)
    with pytest.raises(ValueError, match="x must have 3 dims, got a float64 tensor of shape"):
        ours.VariationalDropout1d()(torch.zeros(2, 3))


class WholeModel(nn.Module):
    """As clients are: the function of the layer reaches the stem, which it does not call."""

    def __init__(self, library):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.cell, self.deq = nn.Linear(4, 4), library.get_deq(ift=True, **TIGHT)
        nn.init.normal_(self.cell.weight, std=0.1)

    def forward(self, x):
        u = self.stem(x)
        return self.deq(lambda z: torch.tanh(self.cell(z) + u), torch.zeros_like(u))[0][-1]


def test_modules_that_the_function_reaches_and_does_not_call_may_be_any(theirs):
    x, results = torch.randn(5, 4), []
    for library in (ours, theirs):
        torch.manual_seed(0)
        model = WholeModel(library).train()
        z = model(x)
        results.append((z, *torch.autograd.grad(z.sin().sum(), [*model.parameters()])))
    agree(*results, 1e-11)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"weight_func": "linear", "bias": 0.1}])
def test_fp_correction_weighs_as_theirs(theirs, options):
    states, y = [torch.randn(3, 2) for _ in range(4)], torch.randn(3, 2)
    mine, other = (
        library.fp_correction(F.mse_loss, (states, y), return_loss_values=True, **options) for library in (ours, theirs)
    )
    assert mine[0] == pytest.approx(other[0].item(), rel=1e-14) and mine[1] == other[1]
    plain = ours.fp_correction(F.mse_loss, (states, y), weight_func=lambda n, k: k == n - 1)
    assert plain == F.mse_loss(states[-1], y)
    assert ours.fp_correction(F.mse_loss, (states, y), "const") == pytest.approx(sum(mine[1]), rel=1e-14)


def test_jac_reg_and_mixed_init_are_theirs(theirs):
    results = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        z = library.mixed_init((4, 6)).requires_grad_()
        w = torch.ones(6, 6, requires_grad=True)
        penalty = library.jac_reg(torch.tanh(z @ w), z, vecs=2)
        results.append((z, penalty, *torch.autograd.grad(penalty, w)))
    assert torch.equal(results[0][0], results[1][0])
    agree(*results, 1e-14)


class Language(nn.Module):
    """A causal transformer layer at equilibrium, weight-normed, with variational dropout and a Jacobian penalty."""

    options = {"f_solver": "anderson", "b_solver": "anderson", "ift": True}

    def __init__(self, library):
        super().__init__()
        self.library, d = library, 8
        self.embed, self.head = nn.Embedding(11, d), nn.Linear(d, 11)
        self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in ((d, 3 * d), (d, d), (d, 16), (16, d)))
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))
        self.drop = library.VariationalDropout1d(0.0)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.1)
        library.apply_norm(self, "weight_norm", filter_out=["embed", "head"])
        self.deq = library.get_deq(**TIGHT | self.options)

    def block(self, z, u):
        q, k, v = (self.qkv(z) + u).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
        z = self.norms[0](self.drop(self.out(scores.softmax(-1) @ v)) + 2 * u[..., :8])
        return self.norms[1](0.3 * self.down(F.gelu(self.up(z))) + z)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (3, 6), generator=gen)
        x = self.embed(tokens[:, :-1])
        u = torch.cat([x, x, x], -1)
        states, _ = self.deq(lambda z: self.block(z, u), torch.zeros(3, 5, 8))
        z = states[-1]
        around = z.detach().requires_grad_()
        penalty = self.library.jac_reg(self.block(around, u), around)
        return F.cross_entropy(self.head(z).flatten(0, 1), tokens[:, 1:].flatten()) + 0.1 * penalty


class Vision(nn.Module):
    """Two scales as a list of states, GroupNorm, phantom gradients in slices."""

    options = {"f_solver": "broyden", "f_max_iter": 24, "f_tol": 1e-13, "n_states": 2, "grad": 3, "tau": 0.6}

    def __init__(self, library):
        super().__init__()
        self.library = library
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(8, 3)
        self.fine, self.coarse = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        for conv in (self.fine, self.coarse, self.down, self.up):
            nn.init.normal_(conv.weight, std=0.03)
        self.deq = library.get_deq(**self.options)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        u, y = self.stem(torch.randn(3, 1, 8, 8, generator=gen)), torch.randint(3, (3,), generator=gen)

        def f(a, b):
            a_next = self.norms[0](torch.relu(self.fine(a) + u + F.interpolate(self.up(b), scale_factor=2)))
            return a_next, self.norms[1](torch.relu(self.coarse(b) + self.down(a) + F.avg_pool2d(u, 2)))

        states, _ = self.deq(f, [torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 4, 4)])
        logits = [self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1)) for a, b in states]
        return self.library.fp_correction(F.cross_entropy, (logits, y))


class Graph(nn.Module):
    """An implicit graph network: rows are nodes, so that the whole state is one sample."""

    def __init__(self, library):
        super().__init__()
        gen = torch.Generator().manual_seed(5)
        edges = (torch.rand(9, 9, generator=gen) < 0.4).double()
        self.x, self.y = torch.randn(9, 6, generator=gen), torch.randint(3, (9,), generator=gen)
        edges = edges + edges.T + torch.eye(9)
        self.edges = edges / edges.sum(1, keepdim=True)
        self.inject, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        nn.init.normal_(self.mix.weight, std=0.15)
        options = TIGHT | {"ift": True, "core": "indexing"}
        self.deq = library.get_deq(**options | ({"batch_dims": 0} if library is ours else {}))

    def loss(self, step):
        u = self.edges @ self.inject(self.x)
        (z,), _ = self.deq(lambda z: torch.relu(self.mix(self.edges @ z) + u), torch.zeros(9, 8))
        return F.cross_entropy(self.head(z), self.y)


class Flow(nn.Module):
    """Updates of a hidden state and a flow by a gated cell, a few of them, supervised on the way."""

    options = {
        "f_solver": "simple_fixed_point_iter",
        "f_max_iter": 9,
        "core": "indexing",
        "n_states": 3,
        "grad": [2, 1, 2],
    }

    def __init__(self, library):
        super().__init__()
        self.library, self.deq = library, library.get_deq(**self.options)
        self.context = nn.Conv2d(2, 6, 3, padding=1)
        self.gates, self.new = nn.Conv2d(14, 12, 3, padding=1), nn.Conv2d(14, 6, 3, padding=1)
        self.delta = nn.Conv2d(6, 2, 3, padding=1)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        frames, flow = torch.randn(2, 2, 6, 6, generator=gen), torch.randn(2, 2, 6, 6, generator=gen)
        context = self.context(frames)

        def update(h, flow):
            x = torch.cat([context, flow], 1)
            keep, reset = self.gates(torch.cat([h, x], 1)).sigmoid().chunk(2, 1)
            h = (1 - keep) * h + keep * torch.tanh(self.new(torch.cat([reset * h, x], 1)))
            return h, flow + self.delta(h)

        states, _ = self.deq(update, (torch.tanh(context), torch.zeros_like(flow)))
        return self.library.fp_correction(lambda z, y: (z[1] - y).abs().mean(), ([tuple(z) for z in states], flow))


CURVES = {Language: 1e-9, Vision: 1e-9, Graph: 1e-9, Flow: 1e-12}  # the last has no tolerance: the same arithmetic


def curve(kind, library, steps=4):
    torch.manual_seed(0)
    model, losses = kind(library).train(), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        loss = model.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("kind", CURVES)
def test_clients_train_alike(theirs, kind):
    mine, other = curve(kind, ours), curve(kind, theirs)
    assert (mine[1:] != mine[:-1]).all()
    agree([mine], [other], CURVES[kind])


def test_rows_that_depend_on_one_another_take_batch_dims_0(theirs):
    """There, each row of a chain is that of its lowest residual, 0 at the start, and the state is no fixed point."""

    def chain(z):
        return torch.cat([torch.ones(1, 2), 0.9 * z[:-1]])

    options, exact = {"f_max_iter": 30, "f_tol": 1e-6}, (0.9 ** torch.arange(6.0))[:, None].expand(6, 2)
    (z,), info = ours.get_deq(**options, batch_dims=0)(chain, exact / 2)
    torch.testing.assert_close(z, exact)
    assert info["abs_lowest"].shape == (1,)
    with pytest.warns(UserWarning, match="rows that are nodes of a graph: batch_dims=0"):
        ours.get_deq(**options)(chain, exact / 2)
    (z,), info = theirs.get_deq(**options)(chain, exact / 2)
    torch.testing.assert_close(z[2:], exact[2:] / 2)
    assert info["abs_lowest"].max() == 0


def test_the_page_runs_as_a_reader_would_run_it():
    torch.set_default_dtype(torch.float32)
    page, names = Path(__file__).parent.parent / "docs/from-torchdeq.md", {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), names)
    assert len(names["states"]) == 2 and (names["info"]["abs_lowest"] <= 1e-3).all()
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
    assert len(names["solution"].states) == 2


def test_the_page_has_every_option_and_name():
    text = (Path(__file__).parent.parent / "docs/from-torchdeq.md").read_text()
    parser = argparse.ArgumentParser()
    ours.add_deq_args(parser)
    for name in vars(parser.parse_args([])):
        assert f"`{name}" in text or name.startswith(("norm_", "jac_")), name
