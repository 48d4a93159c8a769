"""The driver: checks, makes a problem, solves it by a route, attaches the gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .adjoints import Adjoint, Implicit, Unrolled
from .backward import Backward
from .checks import boolean, integer
from .cuda_graphs import Graphs
from .gradient import Point, attach
from .guards import (
    TRACEABLE,
    Watched,
    compare,
    flush,
    leaves_something,
    refuse_export,
    refuse_tangents,
    refuse_transforms,
)
from .held import Held
from .layout import Layout, pytree
from .loop import Settings
from .options import Options
from .problem import Problem, modules_of
from .routes import as_solution, both, replayed, solve, unroll
from .solution import Outcome, Solution
from .solvers import Picard, Solver
from .solvers.splitting import SplittingSolver


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple = (),
    *,
    solver: Solver = Picard(),  # noqa: B008  frozen
    adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
    tol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 50,
    batch_dims: int = 1,
    mask: Any = None,
    trace: bool = False,
    group: Any = None,
    throw: bool = False,
    has_aux: bool = False,
    at: Iterable[int] = (),
    callback: Callable[[int, Any, Tensor], None] | None = None,
    sample_of: Tensor | None = None,
) -> Solution:
    """Solves z = f(z, *args), sample by sample, and makes the solution differentiable.

    Args:
        f: Returns a state of the structure, shapes and device of `z0`. What it captures gets gradients too. It must
            be a function of its state: the same at every call, one sample apart from another, and z left as it is.
        z0: Where to start: a floating-point tensor or a tuple / list / dict of them, in any nesting; never written to.
            The iteration runs in float32 (float64 if any tensor is) whatever their dtype and autocast; f gets and may
            return their dtype.
        args: Further arguments of f.
        solver: `Picard`, `Anderson` or `Broyden`.
        adjoint: `Implicit`, `Neumann`, `Phantom`, `OneStep` or `Unrolled`. Only the last gives `z0` a gradient.
        tol: Relative residual ||f(z) - z|| / ||f(z)||, 2-norms over a sample, at which it is frozen. None is 1e-2 where
            the state or autocast is bfloat16 or float16, else 1e-3. ||f(z)|| counts as 1 % of ||f(z0)|| at least, so
            that a solve ends whose fixed point is 0.
        atol: ||f(z) - z|| at which a sample is frozen, too.
        max_steps: Evaluations of f at most (plus one at the solution, where gradients are wanted).
        batch_dims: Leading dims that index samples; negative counts from the end of the (first) tensor's dims.
        mask: bool, True where an element counts in norms; aligned with the first dims of each tensor.
        trace: Return the residual of every evaluation.
        group: A torch.distributed group whose ranks stop together, for an f that communicates. None is the group over
            which parameters are sharded, where some are.
        throw: Raise where a sample fails, in place of leaving that to `status`, and where a backward solve fails, in
            place of a warning; syncs.
        has_aux: Whether f returns (state, aux): `Solution.aux` is that of one more evaluation, at the solution.
        at: Numbers of evaluations, such as (5, 10): `Solution.states` has the state after each, for losses on the way.
            Its gradient is what the adjoint gives there, as if it were the solution, and takes one more evaluation;
            `Unrolled` gives that of the steps up to it. A sample that has stopped stays as it is.
        callback: Called after each evaluation with (its number, the state that it was made of, the residual of each
            sample). The state may be overwritten later: copy what is to last.
        sample_of: The number of the sample that each row of z0 belongs to, integers [rows], where samples are sets of
            rows that stop one by one: the graphs of a disjoint union. On a GPU the host waits for their sizes.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: An argument or what f returned does not fit; the message names it.
        RuntimeError: f changes its state in place, or drops by a function. With `throw`, a sample is MAX_STEPS, GROWING
            or NONFINITE.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {f!r}")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}")
    integer("batch_dims", batch_dims, least=None)
    if sample_of is not None and batch_dims != 1:
        raise ValueError(f"sample_of numbers the rows of the first dim: batch_dims must be 1, got {batch_dims}")
    options = Options(solver, adjoint, tol, atol, max_steps, mask, trace, group, throw, tuple(at), callback, sample_of)
    boolean("has_aux", has_aux)

    def make(layout: Layout) -> Problem:
        if isinstance(adjoint, Unrolled):
            return Problem(f, args, layout, has_aux=has_aux)
        modules, called = modules_of(f)
        held = Held(*modules, called=called)

        def with_held(z: Any, *args: Any) -> Any:
            with held.on(held.weights):
                return f(z, *args)

        return Problem(f if held.empty else with_held, args, layout, has_aux=has_aux, modules=modules)

    return solve_problem(make, z0, batch_dims, options)


def solve_problem(
    make: Callable[[Layout], Problem], z0: Any, batch_dims: int, options: Options, graphs: Graphs | None = None
) -> Solution:
    """Solves the problem that `make` returns for the layout of z0."""
    plain = isinstance(options.adjoint, Unrolled) and not (options.throw or options.callback)  # asks the host nothing
    if torch.compiler.is_dynamo_compiling():
        if plain and TRACEABLE:
            return _solve_normal(make, z0, batch_dims, options, graphs)
        from .outside import outside

        return outside(_solve_problem, make, z0, batch_dims, options, graphs)
    if not plain:
        refuse_export()
    return _solve_problem(make, z0, batch_dims, options, graphs)


def _solve_problem(
    make: Callable[[Layout], Problem], z0: Any, batch_dims: int, options: Options, graphs: Graphs | None
) -> Solution:
    if torch.is_inference_mode_enabled():  # its tensors have no version counters, which show what f changes
        with torch.inference_mode(False), torch.no_grad():
            return _solve_normal(make, z0, batch_dims, options, graphs)
    return _solve_normal(make, z0, batch_dims, options, graphs)


def _solve_normal(
    make: Callable[[Layout], Problem], z0: Any, batch_dims: int, options: Options, graphs: Graphs | None
) -> Solution:
    options.check()
    layout = options.layout(z0, batch_dims)
    problem, adjoint, graph = make(layout), options.adjoint, torch.is_grad_enabled()
    settings = options.forward(layout, problem.modules)
    start = layout.pack(z0, "z0").clone()  # z0 is the caller's, whatever f does
    flush()
    if isinstance(adjoint, Unrolled):
        outcome = unroll(problem, start, settings, adjoint)
        return _finish(problem, outcome, outcome.value, options, [])
    refuse_transforms()
    refuse_tangents(problem.args)
    backward = options.backward(settings) if graph else settings
    start = start.detach()
    captured, why = replayed(graphs, problem, start, settings, backward)
    if captured:
        outcome = captured.outcome
    else:
        watch = Watched(graph and not (problem.stateless or problem.opaque))  # a compiler would compile once more
        with torch.no_grad():
            outcome = solve(problem, start, settings, watch)
        outcome = outcome._replace(why=both(why, outcome.why))
        watch.report(outcome, settings, layout)
    value, record = outcome.value, list[Solution]()
    if graph:
        solves = Backward(problem, backward, value, options.throw, record)
        at: Any = captured.point() if captured else Point(problem, value, solves.multiplies(adjoint))
        if not captured and not isinstance(settings.solver, SplittingSolver):  # whose residual is of another map
            compare(at.out, outcome, settings, start, layout)
        if at.differentiable:
            value = attach(adjoint, at, value, solves)
        if outcome.states:
            outcome = outcome._replace(states=_attached(problem, outcome, value, backward, options))
    return _finish(problem, outcome, value, options, record)


def _attached(
    problem: Problem, outcome: Outcome, value: Tensor, backward: Settings, options: Options
) -> tuple[Tensor, ...]:
    """Returns the states along the way, each with the gradient that the adjoint takes there."""
    states = []
    for z in outcome.states:
        if z is outcome.value:
            states.append(value)
            continue
        solves = Backward(problem, backward, z, options.throw)
        at = Point(problem, z, solves.multiplies(options.adjoint))
        states.append(attach(options.adjoint, at, z, solves) if at.differentiable else z)
    return tuple(states)


def _finish(problem: Problem, outcome: Outcome, flat: Tensor, options: Options, record: list[Solution]) -> Solution:
    """Returns the Solution, after one more evaluation of f at it where f hands out more than its state."""
    aux, unrolled = None, isinstance(options.adjoint, Unrolled)
    beside = flat.requires_grad and not unrolled and leaves_something(problem.modules)
    if problem.has_aux or beside:
        aux = problem.evaluate(flat, problem.args)[1]
        if not torch.is_grad_enabled():  # a cell may enable it for itself
            aux = pytree.tree_map_only(Tensor, Tensor.detach, aux)
    value = flat if problem.layout.flat else problem.layout.unpack(flat)  # FSDP warns of a view
    solution = as_solution(outcome, problem, value, aux, record)
    if options.throw:
        solution.raise_if_failed()
    return solution
