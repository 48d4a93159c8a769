"""How a gradient is attached to a fixed point z* = f(z*, theta).

    dL/dtheta = (df/dtheta)' u,    u = (I - J')^-1 dL/dz*,    J = df/dz at z*

Each adjoint is a way to compute u. All but Unrolled take it from one evaluation of f at z*, saved in the forward pass,
so training needs the storage of one cell whatever the number of steps.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .capture import Linearised
from .checks import boolean, integer, number
from .solvers import Solver


class BackwardSolves(Protocol):
    """The two linear fixed-point solves that an exact adjoint needs: u = J' u + g, and v = J v + w."""

    def adjoint(self, at: Linearised, g: Tensor) -> Tensor: ...  # noqa: D102

    def tangent(self, at: Linearised, w: Tensor) -> Tensor: ...  # noqa: D102


class Adjoint:
    """A way to take the gradient of a fixed point. A bad option raises TypeError or ValueError at construction.

    Attributes:
        exact: Whether u is the exact one, so that its derivative may be taken.
    """

    exact = False

    def cotangent(self, at: Linearised, g: Tensor, solves: BackwardSolves) -> Tensor:
        """Returns u [B, N] for the cotangent g [B, N] of z*."""
        raise NotImplementedError(f"{type(self).__name__} has no cotangent of a fixed point")


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The exact gradient: u solves u = J' u + g by fixed-point iteration (Bai et al. 2019, theorem 1).

    Twice differentiable, where all that f uses passes through torch functions. Its tolerance is relative to u, sample
    by sample, so grad(c * loss) = c * grad(loss) for every c.

    Args:
        solver: Backward solver; None takes the forward one.
        tol: Relative residual of u; None takes the forward one's.
        max_steps: Vector-Jacobian products at most; None takes the forward one's.
        reuse: Begin with the inverse Jacobian that the forward solve estimated, which only `Broyden` does, and solve by
            `Broyden` too (SHINE; Ramzi et al. 2022). Stores 2 * memory states between the forward pass and the
            backward. Worth it where the spectral radius is above 1: see docs/design-notes.md.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    solver: Solver | None = None
    tol: float | None = None
    max_steps: int | None = None
    reuse: bool = False
    exact = True

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a Solver or None, got {self.solver!r}")
        if self.tol is not None:
            number("tol", self.tol, 0)
        if self.max_steps is not None:
            integer("max_steps", self.max_steps)
        boolean("reuse", self.reuse)
        if self.reuse and self.solver is not None:
            raise ValueError(f"reuse=True takes the forward solver, so solver must be None, got {self.solver!r}")

    def cotangent(self, at: Linearised, g: Tensor, solves: BackwardSolves) -> Tensor:
        return solves.adjoint(at, g)


@dataclass(frozen=True)
class Neumann(Adjoint):
    """u = sum_{k < terms} (J')^k g: the first terms of the Neumann series of the exact adjoint.

    A fixed cost of terms - 1 vector-Jacobian products, and a bias of the order of rho(J)^terms.

    Args:
        terms: At least 1; 1 is OneStep.
    """

    terms: int

    def __post_init__(self) -> None:
        integer("terms", self.terms)

    def cotangent(self, at: Linearised, g: Tensor, solves: BackwardSolves) -> Tensor:
        u = g
        for _ in range(self.terms - 1):
            u = at.vjp(u) + g
        return u


@dataclass(frozen=True)
class Phantom(Adjoint):
    """u = damping sum_{k < steps} ((1 - damping) I + damping J')^k g (Geng et al. 2021, Neumann form).

    The gradient of `steps` damped iterations that start at z*, all linearised at z*. Its norm is that of the exact one
    times about 1 - (1 - damping (1 - rho))^steps, which regularises; the literature trains with 4 or 5 steps.

    Args:
        steps: At least 1.
        damping: In (0, 1].
    """

    steps: int
    damping: float

    def __post_init__(self) -> None:
        integer("steps", self.steps)
        number("damping", self.damping, 0)
        if self.damping > 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping!r}")

    def cotangent(self, at: Linearised, g: Tensor, solves: BackwardSolves) -> Tensor:
        term = self.damping * g
        u = term
        for _ in range(self.steps - 1):
            term = torch.lerp(term, at.vjp(term), self.damping)
            u = u + term
        return u


@dataclass(frozen=True)
class OneStep(Adjoint):
    """u = g: the gradient of one application of f at z*, Jacobian-free backpropagation (Fung et al. 2022).

    The cheapest. Use it below a spectral radius of about 0.6 only: its angle to the gradient grows with it.
    """

    def cotangent(self, at: Linearised, g: Tensor, solves: BackwardSolves) -> Tensor:
        return g


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The weight-tied explicit net: exactly `steps` (damped) Picard steps from z0, differentiated by autograd.

    Not a gradient of the fixed point but of these steps, exact to every order, and the only adjoint that gives z0 a
    gradient. For warm-up, and for comparison. Tolerance and early stop do not apply; the residual reported is that of
    the last evaluation, which is made of the state before the one returned.

    Args:
        steps: At least 1.
        checkpoint: Recompute each step in the backward pass, which stores one state a step instead of one cell a step.
    """

    steps: int
    checkpoint: bool = False

    def __post_init__(self) -> None:
        integer("steps", self.steps)
        boolean("checkpoint", self.checkpoint)


def attach(adjoint: Adjoint, at: Linearised, z: Tensor, solves: BackwardSolves) -> Tensor:
    """Returns z [B, N] with a gradient to all that f captured."""
    return _Attached.apply(adjoint, at, solves, z, *at.inputs)


class _Attached(torch.autograd.Function):
    """The value; its backward is the adjoint's u, then (df/d input)' u, each a Function of explicit inputs."""

    @staticmethod
    def forward(ctx: Any, adjoint: Adjoint, at: Linearised, solves: BackwardSolves, z: Tensor, *inputs: Tensor) -> Any:
        ctx.adjoint, ctx.at, ctx.solves = adjoint, at, solves
        value = z.clone()
        ctx.save_for_backward(value, *inputs)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        adjoint, at, solves = ctx.adjoint, ctx.at, ctx.solves
        if torch.is_grad_enabled() and adjoint.exact:
            z, *inputs = ctx.saved_tensors
            u = _Adjoint.apply(at, solves, g, z, *inputs)
            grads = _InputVjp.apply(at, u, z, *inputs)
        else:
            with torch.no_grad():
                grads = at.input_vjp(adjoint.cotangent(at, g, solves))
            if torch.is_grad_enabled():
                why = (
                    f"the gradient of {type(adjoint).__name__} is an approximation whose derivative would be wrong: "
                    "for second derivatives use Implicit(), or Unrolled(steps)"
                )
                grads = _Refused.apply(why, ctx.saved_tensors[0], *grads)
        return None, None, None, None, *grads


class _Adjoint(torch.autograd.Function):
    """u = J' u + g as a function of g, z and the inputs: g gets v = J v + du, z and the inputs d(u' J v)."""

    @staticmethod
    def forward(ctx: Any, at: Linearised, solves: BackwardSolves, g: Tensor, z: Tensor, *inputs: Tensor) -> Any:
        ctx.at, ctx.solves = at, solves
        u = solves.adjoint(at, g)
        ctx.save_for_backward(u, z)
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Any:
        ctx.at.require_seen_through()
        u, z = ctx.saved_tensors
        with torch.no_grad():
            v = ctx.solves.tangent(ctx.at, du)
            grads = (v, *ctx.at.bilinear(u, v))
        return None, None, *_no_third(z, grads)


class _InputVjp(torch.autograd.Function):
    """(df/d input)' u as a function of u, z and the inputs."""

    @staticmethod
    def forward(ctx: Any, at: Linearised, u: Tensor, z: Tensor, *inputs: Tensor) -> Any:
        ctx.at = at
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, z)
        return at.input_vjp(u)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        ctx.at.require_seen_through()
        u, z = ctx.saved_tensors
        if all(c is None for c in cotangents):
            return None, *(None for _ in range(2 + len(cotangents)))
        with torch.no_grad():
            grads = ctx.at.input_bilinear(u, cotangents)
        return None, *_no_third(z, grads)


def _no_third(z: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns `grads`, and if a graph is being made, such that differentiating them raises."""
    why = "Implicit() is twice differentiable, and this is a third derivative: use Unrolled(steps)"
    return _Refused.apply(why, z, *grads) if torch.is_grad_enabled() else grads


class _Refused(torch.autograd.Function):
    """Identity of `grads`; `anchor` requires grad, and so do they then, whatever they were made of."""

    @staticmethod
    def forward(ctx: Any, why: str, anchor: Tensor, *grads: Tensor) -> Any:
        ctx.why = why
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.why)
