"""A drop-in for torchdeq 0.1.0: its calls and options, solved and differentiated by tritondeq.

    from tritondeq.compat.torchdeq import get_deq, reset_deq, apply_norm  # was: from torchdeq import ...

An option is mapped, or refused with an error that names it: docs/from-torchdeq.md has the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adjoints import Adjoint, Implicit, OneStep, Phantom, Unrolled
from ..checks import integer
from ..fixed_point import fixed_point
from ..held import FixedDropout, Held, parts_of
from ..inspect.jacobian import spectral_radius
from ..layout import Layout, pytree
from ..problem import modules_of
from ..solution import Solution
from ..solvers import Solver
from .torchdeq_options import DEQ, NOT_MAPPED, SOLVER_KWARGS, checked, config, marks, solver_named
from .torchdeq_options import add_deq_args as add_deq_args
from .torchdeq_parts import VariationalDropout as VariationalDropout
from .torchdeq_parts import VariationalDropout1d as VariationalDropout1d
from .torchdeq_parts import VariationalDropout2d as VariationalDropout2d
from .torchdeq_parts import VariationalDropout3d as VariationalDropout3d
from .torchdeq_parts import VariationalDropToken1d as VariationalDropToken1d
from .torchdeq_parts import VariationalDropToken2d as VariationalDropToken2d
from .torchdeq_parts import VariationalDropToken3d as VariationalDropToken3d
from .torchdeq_parts import apply_norm as apply_norm
from .torchdeq_parts import fp_correction as fp_correction
from .torchdeq_parts import jac_reg as jac_reg
from .torchdeq_parts import mem_gc as mem_gc
from .torchdeq_parts import mixed_init as mixed_init
from .torchdeq_parts import register_norm_module as register_norm_module
from .torchdeq_parts import remove_norm as remove_norm
from .torchdeq_parts import reset_deq as reset_deq
from .torchdeq_parts import reset_dropout as reset_dropout
from .torchdeq_parts import reset_norm as reset_norm

LARGE = 1e4  # a norm of a state up to which an absolute tolerance alone ends a solve
NEVER = 1e-30  # a relative tolerance that is met at an exact fixed point only


def get_deq(args: Any = None, **kwargs: Any) -> "TorchDEQ":
    """Returns the layer that torchdeq's options describe.

    Args:
        args: An argparse.Namespace, whose other arguments belong to the program; or a dict, of torchdeq's options only.
        **kwargs: Options; they take precedence. `batch_dims=0`, of tritondeq, makes the whole state one sample, for
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
        self.batch_dims, self.options = batch_dims, checked(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.options, name) if name in DEQ else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an option, as `deq.f_tol = 1e-4`, or any other attribute."""
        if name in DEQ:
            self.options = checked({**vars(self.options), name: value})
        else:
            super().__setattr__(name, value)

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
            `abs_lowest` and `rel_lowest`, the residual of the solution; `nstep`, its evaluations; `status`, a
            `tritondeq.Status`; `sradius`; and by f_stop_mode `abs_trace` or `rel_trace`, [B, evaluations]. The norm of
            f(z) is taken to be that of z.

        Raises:
            TypeError, ValueError: An argument or what func returned does not fit; the message names it.
        """
        given, o = dict(solver_kwargs or {}), self.options
        f = _Map(func, not isinstance(z_init, Tensor))
        z = list(z_init) if f.many else z_init
        often = o.f_max_iter if self.training else o.eval_f_max_iter
        run = self._run(given.pop("f_max_iter", often if often > 0 else int(o.f_max_iter * o.eval_factor)), given)
        b_solver = solver_named("b_solver", o.b_solver, o.b_max_iter)
        implicit = _Written(b_solver, float(o.b_tol), o.b_max_iter, writer=backward_writer)
        adjoint = implicit if o.ift or o.hook_ift else None
        held = Held(*_held_parts(func))
        with held.on(held.weights):
            if self.training:
                states, solution = self._train(f, z, run, adjoint)
            else:
                solution = self._solve(f, z, run, adjoint or Phantom(o.grad[-1], o.tau))
                states = [solution.value]
            flat = Layout(solution.value, self._batch_dims(z)).pack(solution.value).detach()
            size = torch.linalg.vector_norm(flat, dim=1)
            info = _info(solution, size, o.f_stop_mode, LARGE if o.f_stop_mode == "abs" else 0.0)
            info["sradius"] = info["nstep"].new_full((1,), -1.0 if self.training else 0.0)
            if sradius_mode and not self.training:
                info["sradius"] = spectral_radius(f, solution.value, batch_dims=self._batch_dims(z)).reshape(-1)
        return states, info

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items() if value != DEQ[name])

    def _train(self, f: "_Map", z: Any, run: _Run, implicit: Adjoint | None) -> tuple[list[Any], Solution]:
        """Returns the states of torchdeq's core, and the solution that the last of them is made of."""
        ends, states, along = marks(self.options, run.steps), list[Any](), tuple[Any, ...]()
        grads = self.options.grad * (len(ends) if len(self.options.grad) == 1 else 1)
        if self.options.core == "indexing" and len(ends) > 1:  # one solve; in "sliced" each begins where a state is
            solution = self._solve(f, z, run, at=tuple(ends))
            along = *solution.states[:-1], solution.value
        for i, (begin, end, grad) in enumerate(zip([0, *ends], ends, grads, strict=False)):
            z, steps = (along[i], 0) if along else (z, end - begin)
            if implicit is not None and end == ends[-1]:
                final = self._solve(f, z, run._replace(steps=steps + 1), implicit)
                return [*states, final.value], solution if along else final
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
        if not run.all:
            with torch.set_grad_enabled(graph):
                return fixed_point(f, z, adjoint=adjoint or OneStep(), max_steps=steps + 1, trace=True, **options, **at)
        with torch.no_grad():
            solution = fixed_point(f, z, adjoint=Unrolled(steps), **options, **at)
        if graph:
            attached = fixed_point(f, solution.value, adjoint=adjoint, max_steps=1, **options)  # type: ignore[arg-type]
            solution = replace(solution, value=attached.value)
        return solution

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

    def _run(self, steps: Any, given: dict[str, Any]) -> _Run:
        """Returns the forward solver with the options of one call."""
        integer("f_max_iter", steps)
        name = self.options.f_solver
        for option, value in given.items():
            known = isinstance(name, str) and option in SOLVER_KWARGS.get(name, ())
            if not known and not (value is False and option in ("ls", "return_final")):
                why = NOT_MAPPED.get(option, f"f_solver={name!r} does not take it")
                raise TypeError(f"solver_kwargs has {option!r}: {why}")
        final = given.pop("return_final", False)
        given.pop("ls", None)
        return _Run(
            solver_named("f_solver", name, steps, **given), steps, bool(final) or name == "simple_fixed_point_iter"
        )


class _Map:
    """func as a map of one state. It shows no modules: those that func reaches are held by the layer."""

    def __init__(self, func: Callable[..., Any], many: bool):
        self.func, self.many = func, many

    def __call__(self, z: Any) -> Any:
        return list(self.func(*z)) if self.many else self.func(z)


def _held_parts(func: Callable[..., Any]) -> list[nn.Module]:
    """Returns the dropout and the parametrized modules that func reaches.

    No other module is held, which would refuse those that func reaches by `self` and does not call.
    """
    modules = parts_of(modules_of(func)[0])
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
        "status": solution.status.reshape(-1),
        "nstep": solution.steps.reshape(-1).to(residual.dtype),
        f"{mode}_trace": trace * least if mode == "abs" else trace,
    }


_NO_COUNTERPART = {
    "solver_stat_from_final_step": "read the info that the layer returns",
    "get_solver": "call tritondeq.fixed_point(f, z0, solver=Anderson())",
    "register_solver": "write a tritondeq.solvers.Solver and pass it as f_solver or b_solver",
    "register_deq": "call tritondeq.fixed_point in a module of yours",
    "register_norm": "register a parametrization by torch.nn.utils.parametrize.register_parametrization",
    "register_weight_func": "pass the function as fp_correction(weight_func=...)",
    "power_method": "tritondeq.spectral_radius(f, z), which is right for complex eigenvalues, too",
}


def __getattr__(name: str) -> Any:
    if name in _NO_COUNTERPART:
        raise ImportError(f"torchdeq's {name} has no counterpart: {_NO_COUNTERPART[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
