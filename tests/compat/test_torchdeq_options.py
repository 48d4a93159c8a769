"""Options of tritondeq.compat.torchdeq: mapped as torchdeq has them, or refused by name."""

import argparse

import pytest
import torch

import tritondeq as tdeq
from tritondeq.compat import torchdeq as ours


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
