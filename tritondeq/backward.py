"""The linear systems of the exact adjoint: which kernels, or torch, solve them at a solution."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .adjoints import Adjoint, Jacobian
from .cuda_graphs import CapturedPoint
from .guards import FAR, blur, compare_last, flush, warn_if
from .kernels import dispatch, formulas
from .kernels.dispatch import CellOp, Op
from .kernels.tails import PLAIN
from .loop import Settings, iterate
from .problem import Problem
from .routes import as_solution, both, by_kernels, plan, split_up
from .solution import Outcome, Solution, failures
from .solvers.splitting import SplittingSolver

SAFE = (2.0**-40, 2.0**40)  # norms whose squares are far from underflow and overflow
SMALL = 2.0**-40  # of the largest cotangent in a batch: below it, a sample is scaled by itself


@dataclass
class Backward:
    """Solves the linear systems of the exact adjoint at the solution z; `record` gets the last Solution.

    It holds all that it needs of the forward pass, for a backward pass may run in any thread.
    """

    problem: Problem
    settings: Settings
    z: Tensor
    throw: bool
    record: list[Solution] = field(default_factory=list)
    backend: str = field(default_factory=dispatch.chosen)

    def __post_init__(self) -> None:
        self.allowed = FAR * self.settings.tol + blur(self.problem.layout)
        self.versions = self._versions()

    @cached_property
    def plan(self) -> tuple[Op | CellOp | None, str]:
        """The kernels that solve for the adjoint, and why, as `plan` has them."""
        return plan(self.problem.whole, self.problem, self.settings)

    def multiplies(self, adjoint: Adjoint) -> bool:
        """Returns whether autograd has to multiply by J'.

        A map of which less is known may need z on autograd's graph in other ways: for a checkpoint in it, or a hook.
        """
        cell, splits = self.problem.cell, isinstance(self.settings.solver, SplittingSolver)
        known = cell is not None and self.problem.stateless and self._operands()
        if not known or (adjoint.products and not adjoint.exact):
            return True
        if cell is not None and any(part._backward_hooks or part._backward_pre_hooks for part in cell.held.parts):
            return True
        return adjoint.products and not splits and self.plan[0] is None

    def _operands(self) -> list[Tensor]:
        """Returns the tensors of which kernels and splitting solvers solve for the adjoint."""
        whole, split = self.problem.whole, self.problem.splitting
        parts: tuple[Any, ...] = (() if whole is None else whole.operands) + ((split.w, split.u) if split else ())
        return [t for part in parts for t in ((part,) if isinstance(part, Tensor) else part)]

    def _versions(self) -> list[int]:
        """Returns what changes when one of these is changed in place."""
        return [0 if t.is_inference() else t._version for t in self._operands()]

    def _normalised(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `_normalised(g)`, for a solve that autograd does not watch over."""
        if self.versions != self._versions():
            raise RuntimeError("weights that a backward solve needs were changed in place since the forward pass")
        return _normalised(g, self.settings.mask)

    def adjoint(self, at: Jacobian, g: Tensor) -> Tensor:
        """Returns u = J' u + g."""
        problem, settings = self.problem, self.settings
        scale: Tensor | None
        with torch.no_grad(), dispatch.backend(self.backend):
            op, why = self.plan
            if isinstance(at, CapturedPoint):
                unit, scale = self._normalised(g)
                outcome = at.adjoint(unit)
            elif isinstance(settings.solver, SplittingSolver):
                unit, scale = self._normalised(g)
                outcome = self._linear(unit, transpose=True)
            elif op is None or problem.whole is None:
                unit, scale, sizes = _rescaled(g, settings.mask)
                tail = (lambda u: (at.vjp(u), unit), PLAIN)
                outcome = iterate(lambda u: at.vjp(u) + unit, unit, replace(settings, sizes=sizes), tail)
                outcome = outcome._replace(why=both(why, outcome.why))
            else:
                unit, scale = self._normalised(g)
                outcome = by_kernels(op, why, op.adjoint, (*problem.whole.at(self.z), unit), problem.whole, settings)
        u = self._judged(outcome) - unit
        return g + u if scale is None else torch.addcmul(g, u, scale)  # to the bit g, where J is 0

    def tangent(self, at: Any, w: Tensor) -> Tensor:
        """Returns v = J v + w."""
        split, solver = self.problem.splitting, self.settings.solver
        scale: Tensor | None
        with torch.no_grad(), dispatch.backend(self.backend):
            if split is not None and isinstance(solver, SplittingSolver):
                unit, scale = self._normalised(w)
                with torch.autocast(w.device.type, enabled=False):
                    outcome = self._linear(unit @ split.w.mT, transpose=False)
                    slope = split.slope(split.linear(self.z), 1.0)
                    outcome = outcome._replace(value=slope * outcome.value + unit)
            else:  # without the estimate, which is of the transposed problem
                unit, scale, sizes = _rescaled(w, self.settings.mask)
                tail = (lambda v: (at.jvp(v), unit), PLAIN)
                settings = replace(self.settings, estimate=None, sizes=sizes)
                outcome = iterate(lambda v: at.jvp(v) + unit, unit, settings, tail)
        v = self._judged(outcome)
        return v if scale is None else v * scale

    def _linear(self, g: Tensor, transpose: bool) -> Outcome:
        """Solves y = M S y + g."""
        solver: Any = self.settings.solver
        split = self.problem.split(solver)
        return split_up(lambda: solver.pull(split, split.linear(self.z), g, transpose), self.problem, g, self.settings)

    def _judged(self, outcome: Outcome) -> Tensor:
        """Returns the solution, NaN in samples whose first product is not finite: J is not.

        Stores the outcome, and warns, or raises with `throw`, where a sample has failed.
        """
        self.record[:] = [as_solution(outcome, self.problem, None)]
        status, residual, u = outcome.status, outcome.residual, outcome.value
        compare_last(outcome, self.settings, self.problem.layout)
        flush()
        if status.device.type == "cpu" and not status.any():  # all have converged
            return u
        if self.throw and (failed := failures(status, advice=False)):
            raise RuntimeError(f"{_FAILED}: {failed}")
        warn_if(residual > self.allowed, _FAILED)
        return torch.where((residual == torch.inf).unsqueeze(1), torch.nan, u)


_FAILED = (
    "a backward solve, u = J'u + g of the implicit gradient, did not converge, so the gradient is wrong by about its "
    "residual relative to g, which solution.adjoint has for each sample. Iteration needs a spectral radius of J below "
    "1 (see tritondeq.spectral_radius): use adjoint=Implicit(solver=Anderson()) or Broyden(), raise its max_steps or "
    "tol, or take Phantom(steps, damping)"
)


def _rescaled(g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns (g / scale, scale, norm of each sample's elements that count, after that).

    The scale is a power of two, so that gradients are solved to the bit alike, tiny or huge. It is the same for all
    samples but those that are so much smaller that their squares would underflow: where samples depend on one another,
    other scales would make another system of it. It is None, for 1, on a CPU where all norms are far from both.
    """
    if not g.numel():
        return g, None, g.new_ones(g.shape[0])
    if (norm := _safe_norm(g, mask)) is not None:
        return g, None, norm
    peak = torch.linalg.vector_norm(g, torch.inf, dim=1, keepdim=True).nan_to_num_(0.0, 0.0)
    top = peak.max()
    peak = torch.where(peak < SMALL * top, peak, top)
    scale = (0.5 * peak / torch.frexp(peak).mantissa).nan_to_num_(1.0)  # the power of two below; 1 where peak is 0
    g = g / scale
    norm = torch.linalg.vector_norm(g if mask is None else torch.where(mask, g, 0.0), dim=1)
    return g, scale, torch.where(norm > 0, norm, 1.0)


def _safe_norm(g: Tensor, mask: Tensor | None) -> Tensor | None:
    """Returns the norms [B] where it costs no wait to see that their squares are far from underflow and overflow."""
    if g.device.type != "cpu" or mask is not None:
        return None
    norm = torch.linalg.vector_norm(g, dim=1)
    return norm if all(SAFE[0] < size.item() < SAFE[1] for size in norm.aminmax()) else None


def _normalised(g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (g / scale, scale), such that the elements that count have norm 1, sample by sample."""
    if not g.numel():
        return g, g.new_ones(g.shape[0], 1)
    op, _ = dispatch.pick("norms.unit", g.device, g=g)
    if op is not None:
        return op.run(g, mask)  # type: ignore[union-attr]
    if (norm := _safe_norm(g, mask)) is not None:
        norm = norm.unsqueeze(1)
        return g / norm, norm
    return formulas.unit(g, mask)
