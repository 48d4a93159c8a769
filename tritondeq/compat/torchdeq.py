"""A drop-in for torchdeq 0.1.0: its calls and options, solved and differentiated by tritondeq.

    from tritondeq.compat.torchdeq import get_deq, reset_deq, apply_norm  # was: from torchdeq import ...

An option is mapped, or refused with an error that names it: docs/from-torchdeq.md has the table.
"""

import argparse
import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adjoints import Adjoint, Implicit, OneStep, Phantom, Unrolled
from ..checks import integer, number
from ..fixed_point import fixed_point
from ..held import FixedDropout, Held, parts_of
from ..inspect.jacobian import spectral_radius
from ..layout import Layout, pytree
from ..problem import modules_of
from ..solution import Solution
from ..solvers import Anderson, Broyden, Picard, Solver
from .torchdeq_parts import DEQ, config
from .torchdeq_parts import VariationalDropout as VariationalDropout
from .torchdeq_parts import VariationalDropout1d as VariationalDropout1d
from .torchdeq_parts import VariationalDropout2d as VariationalDropout2d
from .torchdeq_parts import VariationalDropout3d as VariationalDropout3d
from .torchdeq_parts import VariationalDropToken1d as VariationalDropToken1d
from .torchdeq_parts import VariationalDropToken2d as VariationalDropToken2d
from .torchdeq_parts import VariationalDropToken3d as VariationalDropToken3d
from .torchdeq_parts import add_deq_args as add_deq_args
from .torchdeq_parts import apply_norm as apply_norm
from .torchdeq_parts import fp_correction as fp_correction
from .torchdeq_parts import jac_reg as jac_reg
from .torchdeq_parts import mixed_init as mixed_init
from .torchdeq_parts import register_norm_module as register_norm_module
from .torchdeq_parts import remove_norm as remove_norm
from .torchdeq_parts import reset_deq as reset_deq
from .torchdeq_parts import reset_dropout as reset_dropout
from .torchdeq_parts import reset_norm as reset_norm

_SOLVER_KWARGS = {
    "fixed_point_iter": {"tau", "return_final"},
    "simple_fixed_point_iter": {"tau"},
    "anderson": {"m", "tau"},
    "broyden": {"LBFGS_thres"},
}
_NOT_MAPPED = {
    "lam": "it is an absolute ridge; tritondeq's is relative to each difference: f_solver=Anderson(memory, ridge=...)",
    "ls": "one line search for a whole batch would tie its samples together: leave it out, or damp Picard",
    "return_final": "the state with the lowest residual is returned: leave it out, or take simple_fixed_point_iter",
}
LARGE = 1e4  # a norm of a state up to which an absolute tolerance alone ends a solve
NEVER = 1e-30  # a relative tolerance that is met at an exact fixed point only


def get_deq(args: Any = None, **kwargs: Any) -> "TorchDEQ":
    """Returns the layer that torchdeq's options describe.

    Args:
        args: An argparse.Namespace, whose other arguments belong to the program; or a dict, of torchdeq's options only.
        **kwargs: Options; they take precedence. One of them is ours: `batch_dims=0` makes the whole state one sample, for
            states such as the nodes of a graph, whose rows depend on one another.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or not mapped; the message names it.
    """
    given = config(args, kwargs, "no_stat", "batch_dims")
    return TorchDEQ(**{name: value for name, value in given.items() if name in DEQ or name == "batch_dims"})


class _Run(NamedTuple):
    """The forward solver of one call, its number of evaluations, and whether it takes all of them."""

    solver: Solver
    steps: int
    all: bool


class TorchDEQ(nn.Module):
    """torchdeq's layer: `deq(func, z_init)` returns (states, info).

    Samples are solved one by one, with the first dimension as the batch. In train() the states are those that
    torchdeq's core returns, with its gradients: n damped steps under autograd, or the implicit gradient with ift=True.
    In eval() there is one, the solution, and it's differentiable: implicitly, or by `Phantom(grad, tau)`.

    Args:
        batch_dims: 1, the leading dims that index samples; 0 where the whole state is one sample.
        **given: torchdeq's options; `f_solver` and `b_solver` may also be solvers of tritondeq.

    Raises:
        TypeError, ValueError: An option is out of range or not mapped; the message names it.
    """

    def __init__(self, *, batch_dims: int = 1, **given: Any):
        super().__init__()
        if batch_dims not in (0, 1):
            raise ValueError(f"batch_dims must be 0 or 1, got {batch_dims!r}")
        self.batch_dims = batch_dims
        o = self.options = argparse.Namespace(**(DEQ | given))
        for name, value in (("core", ("sliced", "indexing")), *((f"{x}_stop_mode", ("abs", "rel")) for x in "fb")):
            if getattr(o, name) not in value:
                raise ValueError(f"{name} must be {' or '.join(value)}, got {getattr(o, name)!r}")
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
        self.ift = bool(o.ift or o.hook_ift)
        self._run(o.f_max_iter, {})
        self.backward = Implicit(_solver("b_solver", o.b_solver, o.b_max_iter), float(o.b_tol), o.b_max_iter)
        if len(o.grad) not in (1, len(self._marks(o.f_max_iter))):
            raise ValueError(f"grad must have one entry, or one for each of the states, got {o.grad}")

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[dict[str, Tensor]], Any] | None = None,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Solves z = func(z), or z = func(*z) where z_init is a list or tuple of tensors.

        Args:
            func: Returns the next state. What it captures gets gradients.
            z_init: Where to start: a tensor, or a list or tuple of them.
            solver_kwargs: Options of the forward solver, for this call: `f_max_iter`, `tau`, `m`, `LBFGS_thres`.
            sradius_mode: Whether `info`, in eval(), has the spectral radius of each sample.
            backward_writer: Called with the info of each implicit backward solve.

        Returns:
            The states, each in the structure of z_init (a tuple becomes a list), and a dict of tensors, [B] each:
            `abs_lowest` and `rel_lowest`, the residual of the solution; `nstep`, its evaluations; `sradius`; and by
            f_stop_mode `abs_trace` or `rel_trace`, [B, evaluations]. The norm of f(z) is taken to be that of z.

        Raises:
            TypeError, ValueError: An argument or what func returned does not fit; the message names it.
        """
        given, o = dict(solver_kwargs or {}), self.options
        f = _Map(func, not isinstance(z_init, Tensor))
        z = list(z_init) if f.many else z_init
        often = o.f_max_iter if self.training else o.eval_f_max_iter
        run = self._run(given.pop("f_max_iter", often if often > 0 else int(o.f_max_iter * o.eval_factor)), given)
        b = self.backward
        implicit = _Written(b.solver, b.tol, b.max_steps, writer=backward_writer) if backward_writer else b
        held = Held(*_held_parts(func))
        with held.on(held.weights):
            if self.training:
                states, solution = self._train(f, z, run, implicit if self.ift else None)
            else:
                solution = self._solve(f, z, run, implicit if self.ift else Phantom(o.grad[-1], o.tau))
                states = [solution.value]
            flat = Layout(solution.value, self._batch_dims(z)).pack(solution.value).detach()
            size = torch.linalg.vector_norm(flat, dim=1)
            info = _info(solution, size, o.f_stop_mode, LARGE if o.f_stop_mode == "abs" else 0.0)
            info["sradius"] = info["nstep"].new_full((1,), -1.0 if self.training else 0.0)
            if sradius_mode and not self.training:
                info["sradius"] = spectral_radius(f, solution.value, batch_dims=self._batch_dims(z)).reshape(-1)
        return states, info

    def _train(self, f: "_Map", z: Any, run: _Run, implicit: Adjoint | None) -> tuple[list[Any], Solution]:
        """Returns the states of torchdeq's core, and the solution that the last of them is made of."""
        marks, states, along = self._marks(run.steps), list[Any](), tuple[Any, ...]()
        grads = self.options.grad * (len(marks) if len(self.options.grad) == 1 else 1)
        if self.options.core == "indexing" and len(marks) > 1:  # one solve; in "sliced" each begins where a state is
            solution = self._solve(f, z, run, at=tuple(marks))
            along = solution.states
        for i, (before, mark, grad) in enumerate(zip([0, *marks], marks, grads, strict=False)):
            z, steps = (along[i], 0) if along else (z, mark - before)
            if implicit is not None and mark == marks[-1]:
                solution = self._solve(f, z, run._replace(steps=steps + 1), implicit)
                return [*states, solution.value], solution
            if not along:
                solution = self._solve(f, z, run._replace(steps=steps))
                z = solution.value
            states += self._unrolled(f, z, grad)
            z = states[-1]
        return states, solution

    def _solve(self, f: "_Map", z: Any, run: _Run, adjoint: Adjoint | None = None, **at: Any) -> Solution:
        """Returns the state that `steps` evaluations lead to, with the gradient of `adjoint` or none.

        The one more evaluation, which the limits allow for, is that of the residual of this state.
        """
        o = self.options
        tol, atol = (max(o.f_tol / LARGE, NEVER), o.f_tol) if o.f_stop_mode == "abs" else (max(o.f_tol, NEVER), 0.0)
        options: dict[str, Any] = {"solver": run.solver, "tol": tol, "atol": atol, "batch_dims": self._batch_dims(z)}
        graph, steps = adjoint is not None and torch.is_grad_enabled(), run.steps
        if run.all:
            with torch.no_grad():
                solution = fixed_point(f, z, adjoint=Unrolled(steps), **options, **at)
            if not graph:
                return solution
            z, steps = solution.value, 0
        with torch.set_grad_enabled(graph):
            return fixed_point(f, z, adjoint=adjoint or OneStep(), max_steps=steps + 1, trace=True, **options, **at)

    def _batch_dims(self, z: Any) -> int:
        return min(z.ndim, self.batch_dims) if isinstance(z, Tensor) else self.batch_dims

    def _unrolled(self, f: "_Map", z: Any, steps: int) -> list[Any]:
        """Returns the states of `steps` damped steps that torchdeq supervises, under autograd."""
        tau, gap, states = self.options.tau, self.options.sup_gap, []
        for k in range(1, steps + 1):
            y = f(z)
            z = y if tau == 1 else pytree.tree_map(lambda new, old: tau * new + (1 - tau) * old, y, z)
            if k % gap == 0 if gap > 0 else k in self.options.sup_loc:
                states.append(z)
        return states if gap > 0 else [*states, z]

    def _marks(self, most: int) -> list[int]:
        """Returns after how many evaluations, counted from the start, there is a state."""
        n, indexing = self.options.n_states, self.options.indexing
        if n > most:
            raise ValueError(f"n_states must be at most f_max_iter, got {n} and {most}")
        if n > 1:
            size = most // n
            return [(size * n if self.options.core == "sliced" else most) - (n - k) * size for k in range(1, n + 1)]
        marks = [*indexing, most]
        if any(a >= b for a, b in zip([0, *marks], marks, strict=False)):
            raise ValueError(f"indexing must increase from 1 to below f_max_iter, {most}, got {indexing}")
        return marks

    def _run(self, steps: Any, given: dict[str, Any]) -> _Run:
        """Returns the forward solver with the options of one call."""
        integer("f_max_iter", steps)
        name = self.options.f_solver
        for option, value in given.items():
            known = isinstance(name, str) and option in _SOLVER_KWARGS.get(name, ())
            if not known and not (value is False and option in ("ls", "return_final")):
                why = _NOT_MAPPED.get(option, f"f_solver={name!r} does not take it")
                raise TypeError(f"solver_kwargs has {option!r}: {why}")
        final = given.pop("return_final", False)
        given.pop("ls", None)
        return _Run(_solver("f_solver", name, steps, **given), steps, bool(final) or name == "simple_fixed_point_iter")


def _solver(
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
    names = [known for known in _SOLVER_KWARGS if option == "f_solver" or known != "simple_fixed_point_iter"]
    raise ValueError(f"{option} must be {', '.join(names)} or a solver of tritondeq such as Anderson(), got {name!r}")


class _Map:
    """func as a map of one state. It shows no modules: those that func reaches are held by the layer."""

    def __init__(self, func: Callable[..., Any], many: bool):
        self.func, self.many = func, many

    def __call__(self, z: Any) -> Any:
        return list(self.func(*z)) if self.many else self.func(z)


def _held_parts(func: Callable[..., Any]) -> list[nn.Module]:
    """Returns the dropout and the parametrized modules that func reaches, by functions in its closure, too.

    No other module is held, which would refuse those that func reaches by `self` and does not call.
    """
    functions: list[Any] = [func]
    for function in functions:  # it grows
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a variable that is not bound yet
                if inspect.isroutine(cell.cell_contents) and cell.cell_contents not in functions:
                    functions.append(cell.cell_contents)
    modules = parts_of(module for function in functions for module in modules_of(function))
    return [part for part in modules if isinstance(part, FixedDropout) or parametrize.is_parametrized(part)]


@dataclass(frozen=True)
class _Written(Implicit):
    """`Implicit`, after whose solves a writer gets their info."""

    writer: Callable[[dict[str, Tensor]], Any] | None = None

    def cotangent(self, at: Any, g: Tensor, solves: Any) -> Tensor:
        u = super().cotangent(at, g, solves)
        if self.writer is not None:
            self.writer(_info(solves.record[-1], torch.linalg.vector_norm(g, dim=1), "rel"))
        return u


def _info(solution: Solution, size: Tensor, mode: str, least: float = 0.0) -> dict[str, Tensor]:
    """Returns torchdeq's statistics of a solve whose residuals are relative to `size` [B], or to `least` if more."""
    residual, scale = solution.residual.reshape(-1), size.clamp(min=least)
    trace = solution.residual[None] if solution.trace is None else solution.trace
    trace = trace.reshape(len(trace), -1).mT
    return {
        "abs_lowest": residual * scale,
        "rel_lowest": residual * scale / (size + 1e-9),
        "nstep": solution.steps.reshape(-1).to(residual.dtype),
        f"{mode}_trace": trace * least if mode == "abs" else trace,
    }


_NO_COUNTERPART = {
    "get_solver": "call tritondeq.fixed_point(f, z0, solver=Anderson())",
    "register_solver": "write a tritondeq.solvers.Solver and pass it as f_solver or b_solver",
    "register_deq": "call tritondeq.fixed_point in a module of yours",
    "register_norm": "register a parametrization by torch.nn.utils.parametrize.register_parametrization",
    "register_weight_func": "pass the function as fp_correction(weight_func=...)",
    "power_method": "tritondeq.spectral_radius(f, z), which is right for complex eigenvalues, too",
    "mem_gc": "torch.utils.checkpoint.checkpoint(func, *in_args, use_reentrant=False)",
}


def __getattr__(name: str) -> Any:
    if name in _NO_COUNTERPART:
        raise ImportError(f"torchdeq's {name} has no counterpart: {_NO_COUNTERPART[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
