"""The ways to solve a problem: which kernels, or torch, and why."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from .adjoints import Unrolled
from .cuda_graphs import Call, Captured, CapturedPoint, Graphs
from .guards import Watched
from .kernels import dispatch
from .kernels.dispatch import CellOp, Op, WholeSolve
from .kernels.rules import Rules
from .layout import Ragged
from .loop import Settings, drive, explain_no_room, iterate
from .problem import Problem
from .solution import Outcome, Route, Solution
from .solvers import Picard
from .solvers.splitting import Reformulation, SplittingSolver


def plan(whole: WholeSolve | None, problem: Problem, settings: Settings) -> tuple[Op | CellOp | None, str]:
    """Returns (op, how) if kernels that hold the cell can do it, else (None, why not)."""
    fused = settings.solver.fused()
    if whole is None:
        return None, "the cell names no whole-solve kernel"
    if fused is None:
        return None, f"no whole-solve kernel has {type(settings.solver).__name__}"
    op, how = whole.pick(problem.layout.device, int(fused["memory"]), settings.tol)
    if op is not None and settings.mask is not None:
        return None, "kernels that hold the cell take no mask"
    if op is not None and (settings.at or settings.callback):
        return None, "kernels that hold the cell give no states along the way"
    if isinstance(op, Op) and (settings.group is not None or settings.trace):
        return None, "whole-solve kernels take no group or trace"
    return op, how


def solve(problem: Problem, start: Tensor, settings: Settings, watch: Watched) -> Outcome:
    """Solves z = f(z) from `start` [B, N]."""
    if isinstance(settings.solver, SplittingSolver):
        split, solver = problem.split(settings.solver), settings.solver
        return split_up(lambda: solver.solve(split), problem, start, settings)
    op, why = plan(problem.whole, problem, settings)
    if op is None or problem.whole is None:
        outcome = iterate(problem, start, settings, problem.parts(), watch)
        return outcome._replace(why=both(why, outcome.why))
    return by_kernels(op, why, op.solve, (*problem.whole.operands, start), problem.whole, settings)


class Replayed(NamedTuple):
    """A solve by captured graphs."""

    captured: Captured
    call: Call
    outcome: Outcome

    def point(self) -> CapturedPoint:
        """Returns f at the solution."""
        return CapturedPoint(self.captured, self.call, self.outcome.value)


def replayed(
    graphs: Graphs | None, problem: Problem, start: Tensor, settings: Settings, backward: Settings
) -> tuple[Replayed | None, str]:
    """Solves by captured graphs; or returns None and why, where they can't or a kernel does the whole solve."""
    if graphs is None or problem.cell is None:
        return None, ""
    if settings.at or settings.callback:
        return None, "captured graphs give no states along the way"
    if isinstance(problem.layout, Ragged):
        return None, "samples are sets of rows, whose sizes no captured graph knows"
    op, _ = plan(problem.whole, problem, settings)
    if isinstance(op, Op):
        return None, ""
    backward_op, _ = plan(problem.whole, problem, backward)
    call = Call(problem, problem.cell, start, settings, backward, op)
    call.backward_op = backward_op if isinstance(backward_op, CellOp) else None
    captured, how = graphs.find(call)
    if captured is None:
        return None, how
    with torch.no_grad():
        return Replayed(captured, call, captured.solve(call)._replace(why=how)), how


def unroll(problem: Problem, z: Tensor, settings: Settings, adjoint: Unrolled) -> Outcome:
    """Takes `steps` damped steps, the last ones under autograd; the residual is that of the last evaluation."""
    mask, damping = settings.mask, getattr(settings.solver, "damping", 1.0)
    residuals, grad = [], torch.is_grad_enabled()
    backend = None if torch.compiler.is_dynamo_compiling() else dispatch.chosen()  # which it can't trace
    first = 0 if adjoint.last is None else adjoint.steps - adjoint.last  # steps without a gradient
    callback, states = settings.callback, {}

    def again(z: Tensor) -> Tensor:
        if backend is None:
            return problem(z)
        with dispatch.backend(backend):  # which a backward pass in another thread would not have
            return problem(z)

    for k in range(1, adjoint.steps + 1):
        graph = grad and k > first
        with torch.set_grad_enabled(graph):
            if adjoint.checkpoint and graph:
                y = torch.utils.checkpoint.checkpoint(again, z, use_reentrant=False)
            else:
                y = problem(z)
        y = y if graph else y.detach()  # a cell may enable grad for itself
        if settings.trace or callback or k == adjoint.steps:
            with torch.no_grad():
                limits = settings.tol, settings.relative, settings.scale
                rules = Rules(z.shape[0], z.dtype, z.device, *limits, plain=False)  # nor are they in a transform
                counted = (x if mask is None else torch.where(mask, x, 0.0) for x in (y - z, y))
                rules.update(1, *(torch.linalg.vector_norm(x, dim=1) for x in counted))
                residuals.append(rules.rel)
                if callback:
                    callback(k, z, rules.rel)
        with torch.set_grad_enabled(graph):
            z = y if damping == 1 else torch.lerp(z, y, damping)
        if k in settings.at:
            states[k] = z
    trace = torch.stack(residuals) if settings.trace else None
    steps, why = rules.steps * adjoint.steps, f"Unrolled({adjoint.steps}) was asked for"
    along = tuple([states[k] for k in settings.at])
    return Outcome(z, rules.status(), steps, rules.rel, trace, Route.UNROLLED, why, states=along)


def both(why: str, steps: str) -> str:
    """Returns the two reasons as one."""
    return why if steps in ("", why) else f"{why}; {steps}" if why else steps


def split_up(made: Callable[[], Reformulation], problem: Problem, start: Tensor, settings: Settings) -> Outcome:
    """Solves what `made` reformulates, in the state's precision."""
    with torch.autocast(start.device.type, enabled=False):
        p, settings = made(), replace(settings, solver=Picard())
        whole = p.whole_solve
        op, why = plan(whole, problem, settings)
        if whole is None or op is None:
            outcome = iterate(lambda w: p.act(p.linear(w)), p.enter(start), settings, p.tail)
            y = p.linear(outcome.value)
            outcome = outcome._replace(why=both(why, outcome.why))
        elif p.pre is None:
            outcome = by_kernels(op, why, op.solve, (*whole.operands, p.enter(start)), whole, settings)
            y = p.linear(outcome.value)
        else:
            outcome = by_kernels(op, why, op.adjoint, (*whole.at(start), p.shift), whole, settings)
            y = outcome.value
        return outcome._replace(value=p.leave(y))


def by_kernels(
    op: Op | CellOp, why: str, work: Callable, operands: tuple[Tensor, ...], whole: WholeSolve, settings: Settings
) -> Outcome:
    """Runs one solve by kernels that hold the cell."""
    options = whole.options(settings.tol) | (settings.solver.fused() or {})
    options |= {"relative": settings.relative, "scale": settings.scale}
    with explain_no_room(settings.solver, operands[-1]):
        made = work(*operands, tol=settings.tol, max_steps=settings.max_steps, **options)
    if isinstance(op, CellOp):
        return drive(made, settings, why=why)
    value, steps, residual, status = made
    return Outcome(value, status, steps, residual, None, Route.KERNEL, why)


def as_solution(outcome: Outcome, problem: Problem, value: Any, aux: Any = None, record: Any = None) -> Solution:
    """Returns the outcome with vectors of the batch shape."""
    shape = problem.layout.per_sample
    trace = None if outcome.trace is None else shape(outcome.trace)
    status, steps, residual = map(shape, (outcome.status, outcome.steps, outcome.residual))
    states = tuple(map(problem.layout.unpack, outcome.states))
    record = [] if record is None else record
    return Solution(value, status, steps, residual, trace, outcome.route, outcome.why, aux, states, record)
