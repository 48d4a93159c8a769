"""torchdeq's options: their defaults, and what they have to be."""

import argparse
import difflib
from collections.abc import Mapping
from typing import Any

from ..checks import integer, number
from ..layout import describe
from ..solvers import Anderson, Broyden, Picard, Solver

DEQ: dict[str, Any] = {
    "core": "sliced", "f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter", "f_max_iter": 40,
    "b_max_iter": 40, "f_tol": 1e-3, "b_tol": 1e-6, "f_stop_mode": "abs", "b_stop_mode": "abs", "eval_factor": 1.0,
    "eval_f_max_iter": 0, "ift": False, "hook_ift": False, "n_states": 1, "indexing": [], "grad": [1], "tau": 1.0,
    "sup_gap": -1, "sup_loc": [],
}  # fmt: skip
NORM: dict[str, Any] = {
    "norm_type": "weight_norm", "norm_no_scale": False, "norm_clip": False, "norm_clip_value": 1.0,
    "norm_target_norm": 1.0, "sn_n_power_iters": 1,
}  # fmt: skip
LOSS: dict[str, Any] = {
    "gamma": 0.8, "jac_loss_weight": 0.0, "jac_loss_freq": 0.0, "jac_incremental": 0, "sradius_mode": False,
}  # fmt: skip


SOLVER_KWARGS = {
    "fixed_point_iter": {"tau", "return_final"},
    "simple_fixed_point_iter": {"tau"},
    "anderson": {"m", "tau"},
    "broyden": {"LBFGS_thres"},
}
NOT_MAPPED = {
    "lam": "it is an absolute ridge; tritondeq's is relative to each difference: f_solver=Anderson(memory, ridge=...)",
    "ls": "one line search for a whole batch would tie its samples together: leave it out, or damp Picard",
    "return_final": "the state with the lowest residual is returned: leave it out, or take simple_fixed_point_iter",
}


def config(args: Any, kwargs: dict[str, Any], *more: str) -> dict[str, Any]:
    """Returns the options given, as one dict.

    Raises:
        TypeError: args is neither a Namespace nor a dict, or an option of the dict or of the keywords is unknown.
    """
    if not isinstance(args, argparse.Namespace | Mapping | None):
        raise TypeError(f"args must be an argparse.Namespace or a dict, got {describe(args)}: pass vars(args)")
    program, given = (vars(args), kwargs) if isinstance(args, argparse.Namespace) else ({}, {**(args or {}), **kwargs})
    known = [*DEQ, *NORM, *LOSS, *more]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 2, 0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise TypeError(
                f"unknown option {name!r}: {hint}Pass a program's whole configuration as argparse.Namespace(**config)"
            )
    return {**program, **given}


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Adds torchdeq's command line arguments, with its defaults."""
    for name, default in (DEQ | NORM | LOSS).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)


def checked(options: dict[str, Any]) -> argparse.Namespace:
    """Returns torchdeq's options with their defaults, and lists where it takes a number or a list.

    Raises:
        TypeError, ValueError: One is of the wrong kind or out of range; the message names it.
    """
    o = argparse.Namespace(**(DEQ | options))
    for name, values in (("core", ("sliced", "indexing")), *((f"{x}_stop_mode", ("abs", "rel")) for x in "fb")):
        if getattr(o, name) not in values:
            raise ValueError(f"{name} must be {' or '.join(values)}, got {getattr(o, name)!r}")
    for name in ("f_max_iter", "b_max_iter", "n_states"):
        integer(name, getattr(o, name))
    integer("eval_f_max_iter", o.eval_f_max_iter, least=None)
    number("f_tol", o.f_tol, 0, closed=True)
    number("b_tol", o.b_tol, 0)
    number("eval_factor", o.eval_factor, 0)
    number("tau", o.tau, 0)
    if o.tau > 1:
        raise ValueError(f"tau must be in (0, 1], got {o.tau!r}")
    o.grad = [o.grad] if isinstance(o.grad, int) else list(o.grad)
    o.indexing, o.sup_loc = list(o.indexing or ()), list(o.sup_loc or ())
    for steps in o.grad:
        integer("grad", steps)
        if o.sup_gap > steps:
            raise ValueError(f"sup_gap must be at most grad, or there is no state, got {o.sup_gap} and {steps}")
    for name, most in (("f_solver", o.f_max_iter), ("b_solver", o.b_max_iter)):
        solver_named(name, getattr(o, name), most)
    if len(o.grad) not in (1, len(marks(o, o.f_max_iter))):
        raise ValueError(f"grad must have one entry, or one for each of the states, got {o.grad}")
    return o


def marks(o: argparse.Namespace, most: int) -> list[int]:
    """Returns after how many of `most` evaluations there is a state; ValueError where these options give none."""
    if o.n_states > most:
        raise ValueError(f"n_states must be at most f_max_iter, got {o.n_states} and {most}")
    if o.n_states > 1:
        size = most // o.n_states
        last = size * o.n_states if o.core == "sliced" else most
        return [last - (o.n_states - k) * size for k in range(1, o.n_states + 1)]
    found = [*o.indexing, most]
    if any(a >= b for a, b in zip([0, *found], found, strict=False)):
        raise ValueError(f"indexing must increase from 1 to below f_max_iter, {most}, got {o.indexing}")
    return found


def solver_named(
    option: str, name: Any, most: int, *, m: int = 6, tau: float = 1.0, LBFGS_thres: int | None = None
) -> Solver:
    """Returns tritondeq's solver for one of torchdeq's names."""
    if isinstance(name, Solver):
        return name
    if name == "fixed_point_iter" or (name == "simple_fixed_point_iter" and option == "f_solver"):
        return Picard(tau)
    if name == "anderson":
        integer("m", m, least=2)
        return Anderson(m - 1, tau)  # m iterates have m - 1 differences
    if name == "broyden":
        return Broyden(LBFGS_thres or most)
    names = [known for known in SOLVER_KWARGS if option == "f_solver" or known != "simple_fixed_point_iter"]
    raise ValueError(f"{option} must be {', '.join(names)} or a solver of tritondeq such as Anderson(), got {name!r}")
