"""The driver: checks, plans, solves, attaches the gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .adjoints import Adjoint, Implicit, Unrolled, attach
from .capture import Linearised
from .checks import integer, number
from .cuda_graphs import Call, CapturedPoint
from .kernels.dispatch import CellOp, Op, WholeSolve
from .kernels.rules import Rules
from .kernels.tails import PLAIN
from .layout import Layout
from .loop import Estimate, Settings, declared, drive, explain_no_room, flat_tail, iterate
from .solution import Solution
from .solvers import Broyden, Picard, Solver
from .solvers.splitting import Reformulation, Splitting, SplittingSolver


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple = (),
    *,
    solver: Solver = Picard(),  # noqa: B008  frozen
    adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
    tol: float | None = None,
    max_steps: int = 50,
    batch_dims: int = 1,
    mask: Any = None,
    trace: bool = False,
    group: Any = None,
    throw: bool = False,
) -> Solution:
    """Solves z = f(z, *args), sample by sample, and makes the solution differentiable.

    Args:
        f: Returns a state of the structure, shapes and device of `z0`. What it captures gets gradients too. Its
            attribute `whole_solve`, if any, is a `WholeSolve`: kernels that hold f, for a whole solve or for each step;
            `tail` is (g, Tail) where f is that Tail of the parts that g returns, a tuple; `splitting` is a `Splitting`,
            for solvers that split operators.
        z0: Where to start: a floating-point tensor or a tuple / list / dict of them, in any nesting. The iteration runs
            in float32 (float64 if any tensor is) whatever their dtype and autocast; f gets and may return their dtype.
        args: Further arguments of f.
        solver: `Picard`, `Anderson` or `Broyden`; `PeacemanRachford` or `ForwardBackward` where f has a `splitting`.
        adjoint: `Implicit`, `Neumann`, `Phantom`, `OneStep` or `Unrolled`. Only the last gives `z0` a gradient.
        tol: Relative residual ||f(z) - z|| / ||f(z)||, 2-norms over a sample, at which it is frozen. None is 1e-2 where
            the state or autocast is bfloat16 or float16, else 1e-3.
        max_steps: Evaluations of f at most (plus one at the solution, where gradients are wanted).
        batch_dims: Leading dims that index samples; negative counts from the end of the (first) tensor's dims.
        mask: bool, True where an element counts in norms; aligned with the first dims of each tensor.
        trace: Return the residual of every evaluation.
        group: A torch.distributed group whose ranks stop together, for an f that communicates.
        throw: Raise where a sample fails, in place of leaving that to `status`; syncs.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: An argument or what f returned does not fit; the message names it.
        RuntimeError: With `throw`, a sample is MAX_STEPS, GROWING or NONFINITE.
    """
    options = (solver, adjoint, tol, max_steps, batch_dims, mask, trace, group, throw)
    if torch.compiler.is_compiling():  # a compiler can't see through the loop, and need not
        return torch.compiler.disable(_fixed_point)(f, z0, args, options)
    return _fixed_point(f, z0, args, options)


def _fixed_point(f: Any, z0: Any, args: Any, options: tuple) -> Solution:
    solver, adjoint, tol, max_steps, batch_dims, mask, trace, group, throw = options
    if not callable(f):
        raise TypeError(f"f must be callable, got {f!r}")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}")
    integer("batch_dims", batch_dims, least=None)
    check(solver, adjoint, tol, max_steps)
    layout = Layout(z0, batch_dims)
    if tol is None:
        narrow = any(d.itemsize < 4 for d in layout.dtypes) or torch.is_autocast_enabled(layout.device.type)
        tol = 1e-2 if narrow else 1e-3
    reuse = isinstance(adjoint, Implicit) and adjoint.reuse and torch.is_grad_enabled()
    leaves = Estimate() if reuse else None
    settings = Settings(solver, float(tol), max_steps, layout.mask(mask), group, trace, leaves=leaves)
    start = layout.pack(z0, "z0")

    def apply(flat: Tensor) -> Tensor:
        return layout.pack(f(layout.unpack(flat), *args))

    if isinstance(adjoint, Unrolled):
        flat, solution = _unroll(apply, start, settings, adjoint)
    else:
        whole = declared(f, "whole_solve", WholeSolve)
        op, path = _plan(whole, layout, settings)
        backward = _for_adjoint(settings, adjoint)
        splitting = _splitting(f, settings.solver, backward.solver)
        graphs, captured, start = getattr(f, "graphs", None), None, start.detach()
        stepwise = op if isinstance(op, CellOp) else None
        if graphs is not None and op is stepwise:
            call = Call(f, layout, start, args, settings, backward)
            if whole is not None:
                backward_op, _ = _plan(whole, layout, backward)
                call.options, call.op = whole.options, stepwise
                call.backward_op = backward_op if isinstance(backward_op, CellOp) else None
            captured, how = graphs.find(call)
            if captured is not None or op is None:
                op, path = None, how
        with torch.no_grad():
            if captured is not None:
                flat, solution = captured.solve(call)
            elif splitting is not None and isinstance(solver, SplittingSolver):
                flat, solution, op, path = _split(lambda: solver.solve(splitting), start, layout, settings)
            elif whole is None or op is None:
                settings = replace(settings, tail=flat_tail(f, layout, args))
                flat, solution = iterate(apply, start, settings)
            else:
                flat, solution = _run(op, op.solve, (*whole.operands, start), whole, settings)
        solution.path = _path(op, path, solution)
        if torch.is_grad_enabled():
            at = CapturedPoint(captured, call, flat) if captured else Linearised(f, layout, flat, args)
            if at.differentiable:
                solves = _Backward(backward, whole, splitting, layout, flat, solution._adjoints)
                flat = attach(adjoint, at, flat, solves)
    solution.value = layout.unpack(flat)
    _shape(solution, layout)
    if throw:
        solution.raise_if_failed()
    return solution


def check(solver: Any, adjoint: Any, tol: Any, max_steps: Any) -> None:
    """Raises TypeError or ValueError unless these are what `fixed_point` takes."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver such as Picard(), got {solver!r}")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be an Adjoint such as Implicit(), got {adjoint!r}")
    if isinstance(adjoint, Unrolled) and not isinstance(solver, Picard):
        raise ValueError(f"adjoint Unrolled differentiates Picard steps only, got solver {solver!r}")
    if isinstance(adjoint, Implicit) and adjoint.reuse and not isinstance(solver, Broyden):
        raise ValueError(f"adjoint Implicit(reuse=True) needs the inverse estimate of Broyden, got solver {solver!r}")
    if tol is not None:
        number("tol", tol, 0)
    integer("max_steps", max_steps)


def _for_adjoint(settings: Settings, adjoint: Adjoint) -> Settings:
    """Returns how the linear systems of the exact adjoint are solved: as the forward one, or by its options."""
    settings = replace(settings, trace=False, estimate=settings.leaves, leaves=None)
    chosen = {name: getattr(adjoint, name, None) for name in ("solver", "tol", "max_steps")}
    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})


_Outcome = tuple[Tensor, Solution, Op | CellOp | None, str]


@dataclass
class _Backward:
    """Solves the linear systems of the exact adjoint at z; `record` gets the last Solution."""

    settings: Settings
    whole: WholeSolve | None
    splitting: Splitting | None
    layout: Layout
    z: Tensor
    record: list[Solution]

    def adjoint(self, at: Linearised, g: Tensor) -> Tensor:
        settings, whole = self.settings, self.whole
        with torch.no_grad():
            g, scale = _normalised(g)
            op, path = _plan(whole, self.layout, settings)
            if isinstance(at, CapturedPoint):
                op, (u, solution) = None, at.adjoint(g)
            elif self.splitting is not None and isinstance(settings.solver, SplittingSolver):
                u, solution, op, path = self._linear(self.splitting, settings.solver, g, transpose=True)
            elif whole is None or op is None:
                settings = replace(settings, tail=(lambda u: (at.vjp(u), g), PLAIN))
                u, solution = iterate(lambda u: at.vjp(u) + g, g, settings)
            else:
                u, solution = _run(op, op.adjoint, (*whole.at(self.z), g), whole, settings)
            solution.path = _path(op, path, solution)
            _shape(solution, self.layout)
            self.record[:] = [solution]
            return u * scale

    def tangent(self, at: Linearised, w: Tensor) -> Tensor:
        with torch.no_grad():
            w, scale = _normalised(w)
            split, solver = self.splitting, self.settings.solver
            if split is not None and isinstance(solver, SplittingSolver):
                with torch.autocast(w.device.type, enabled=False):
                    y = self._linear(split, solver, w @ split.w.mT, transpose=False)[0]
                    return (split.slope(split.linear(self.z), 1.0) * y + w) * scale
            # without the estimate, which is of the transposed problem
            settings = replace(self.settings, estimate=None, tail=(lambda v: (at.jvp(v), w), PLAIN))
            return iterate(lambda v: at.jvp(v) + w, w, settings)[0] * scale

    def _linear(self, split: Splitting, solver: SplittingSolver, g: Tensor, transpose: bool) -> "_Outcome":
        """Solves y = M S y + g."""
        return _split(lambda: solver.pull(split, split.linear(self.z), g, transpose), g, self.layout, self.settings)


def _normalised(g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (g / scale, scale), a power of two per sample: tiny and huge gradients are solved to the bit alike."""
    peak = g.abs().amax(dim=1, keepdim=True) if g.shape[1] else g.new_zeros(g.shape[0], 1)
    scale = torch.exp2(torch.frexp(peak).exponent.to(g.dtype))
    scale = torch.where((peak > 0) & peak.isfinite(), scale, 1.0)
    return g / scale, scale


def _plan(whole: WholeSolve | None, layout: Layout, settings: Settings) -> tuple[Op | CellOp | None, str]:
    """Returns (op, how) if kernels that hold the cell can do it, else (None, why not)."""
    fused = settings.solver.fused()
    if whole is None:
        return None, "the cell names no whole-solve kernel"
    if fused is None:
        return None, f"no whole-solve kernel has {type(settings.solver).__name__}"
    op, how = whole.pick(layout.device, int(fused["memory"]), settings.tol)
    if op is not None and settings.mask is not None:
        return None, "kernels that hold the cell take no mask"
    if isinstance(op, Op) and (settings.group is not None or settings.trace):
        return None, "whole-solve kernels take no group or trace"
    return op, how


def _splitting(f: Callable, *solvers: Solver) -> Splitting | None:
    """Returns the splitting of f, if one of these solvers needs it."""
    asking = [solver for solver in solvers if isinstance(solver, SplittingSolver)]
    splitting = declared(f, "splitting", Splitting) if asking else None
    if asking and splitting is None:
        raise ValueError(f"solver {asking[0]!r} needs a cell with a splitting, such as cells.Monotone")
    return splitting


def _split(problem: Callable[[], Reformulation], start: Tensor, layout: Layout, settings: Settings) -> _Outcome:
    """Returns (solution of what `problem` reformulates, Solution without it, op, how), in the state's precision."""
    with torch.autocast(start.device.type, enabled=False):
        p, settings = problem(), replace(settings, solver=Picard())
        whole = p.whole_solve
        op, path = _plan(whole, layout, settings)
        if whole is None or op is None:
            settings = replace(settings, tail=p.tail)
            w, solution = iterate(lambda w: p.act(p.linear(w)), p.enter(start), settings)
            y = p.linear(w)
        elif p.pre is None:
            w, solution = _run(op, op.solve, (*whole.operands, p.enter(start)), whole, settings)
            y = p.linear(w)
        else:
            y, solution = _run(op, op.adjoint, (*whole.at(start), p.shift), whole, settings)
        return p.leave(y), solution, op, path


def _path(op: Op | CellOp | None, how: str, solution: Solution) -> str:
    if op is None:
        return f"{solution.path}: {how}"
    return f"loop, {how}" if isinstance(op, CellOp) else how


def _run(
    op: Op | CellOp, work: Callable, operands: tuple[Tensor, ...], whole: WholeSolve, settings: Settings
) -> tuple[Tensor, Solution]:
    """Runs one solve by kernels that hold the cell."""
    options = whole.options(settings.tol) | (settings.solver.fused() or {})
    with explain_no_room(settings.solver, operands[-1]):
        made = work(*operands, tol=settings.tol, max_steps=settings.max_steps, **options)
    if isinstance(op, CellOp):
        return drive(made, settings)
    value, steps, residual, status = made
    return value, Solution(None, status, steps, residual)


def _unroll(f: Callable, z: Tensor, settings: Settings, adjoint: Unrolled) -> tuple[Tensor, Solution]:
    """Takes `steps` damped steps under autograd; the residual is that of the last evaluation."""
    mask, damping = settings.mask, getattr(settings.solver, "damping", 1.0)
    residuals = []
    for k in range(1, adjoint.steps + 1):
        recompute = adjoint.checkpoint and torch.is_grad_enabled()
        y = torch.utils.checkpoint.checkpoint(f, z, use_reentrant=False) if recompute else f(z)
        if settings.trace or k == adjoint.steps:
            with torch.no_grad():
                rules = Rules(z.shape[0], z.dtype, z.device, settings.tol)
                counted = (x if mask is None else torch.where(mask, x, 0.0) for x in (y - z, y))
                rel, _ = rules.update(1, *(torch.linalg.vector_norm(x, dim=1) for x in counted))
                residuals.append(rel)
        z = y if damping == 1 else torch.lerp(z, y, damping)
    trace = torch.stack(residuals) if settings.trace else None
    return z, Solution(None, rules.status(), rules.steps * adjoint.steps, rel, trace, "loop: unrolled under autograd")


def _shape(solution: Solution, layout: Layout) -> None:
    for name in ("status", "steps", "residual", "trace"):
        vector = getattr(solution, name)
        setattr(solution, name, None if vector is None else layout.per_sample(vector))
