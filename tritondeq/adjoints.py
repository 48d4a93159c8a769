"""How a gradient is attached to a fixed point z* = f(z*, theta).

    dL/dtheta = (df/dtheta)' u,    u = (I - J')^-1 dL/dz*,    J = df/dz at z*

Each adjoint says what u is. All but Unrolled take it from one evaluation of f at z*, kept from the forward pass, so
training memory is that of one cell whatever the number of steps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import Linearised
from .solvers import Solver
from .solvers.base import count, number


class Adjoint(ABC):
    """A way to take the gradient of a fixed point."""

    exact = False

    @abstractmethod
    def pull(self, at: Linearised, g: Tensor, solve: "BackwardSolves") -> Tensor:
        """u [B, N] for the cotangent g [B, N] of z*."""


class BackwardSolves(ABC):
    """The two linear fixed-point solves that an exact adjoint asks its driver for."""

    @abstractmethod
    def adjoint(self, at: Linearised, g: Tensor) -> Tensor:
        """u = J' u + g."""

    @abstractmethod
    def tangent(self, at: Linearised, w: Tensor) -> Tensor:
        """v = J v + w."""


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The exact gradient: u solves u = J' u + g by fixed-point iteration (Bai et al. 2019, theorem 1).

    Twice differentiable, where all that f uses passes through torch functions. Its tolerance is relative to u, sample
    by sample, so grad(c * loss) = c * grad(loss) for every c.

    Args:
        solver: Backward solver; None takes the forward one.
        tol: Relative residual of u; None takes the forward one's.
        max_steps: Vector-Jacobian products at most; None takes the forward one's.
        reuse: Begin with the inverse Jacobian that the forward solve estimated, of which only `Broyden` makes one, and
            solve by `Broyden` too (SHINE; Ramzi et al. 2022). Keeps 2 memory states from the forward pass to the
            backward. Worth it where the spectral radius is above 1: see docs/design-notes.md.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    solver: Solver | None = None
    tol: float | None = None
    max_steps: int | None = None
    reuse: bool = False
    exact = True

    def __post_init__(self):
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a Solver or None, got {self.solver!r}")
        if self.tol is not None:
            number("tol", self.tol, 0)
        if self.max_steps is not None:
            count("max_steps", self.max_steps)
        if not isinstance(self.reuse, bool):
            raise TypeError(f"reuse must be a bool, got {self.reuse!r}")
        if self.reuse and self.solver is not None:
            raise ValueError(f"reuse=True takes the forward solver, so solver must be None, got {self.solver!r}")

    def pull(self, at: Linearised, g: Tensor, solve: BackwardSolves) -> Tensor:
        return solve.adjoint(at, g)


@dataclass(frozen=True)
class Neumann(Adjoint):
    """u = sum_{k < terms} (J')^k g: the first terms of the Neumann series of the exact adjoint.

    A fixed cost of terms - 1 vector-Jacobian products, and a bias of the order of rho(J)^terms.

    Args:
        terms: At least 1; 1 is OneStep.

    Raises:
        TypeError, ValueError: `terms` is not an integer of at least 1.
    """

    terms: int

    def __post_init__(self):
        count("terms", self.terms)

    def pull(self, at: Linearised, g: Tensor, solve: BackwardSolves) -> Tensor:
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

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    steps: int
    damping: float

    def __post_init__(self):
        count("steps", self.steps)
        number("damping", self.damping, 0)
        if self.damping > 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping!r}")

    def pull(self, at: Linearised, g: Tensor, solve: BackwardSolves) -> Tensor:
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

    def pull(self, at: Linearised, g: Tensor, solve: BackwardSolves) -> Tensor:
        return g


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The weight-tied explicit net: exactly `steps` (damped) Picard steps from z0, differentiated by autograd.

    Not a gradient of the fixed point but of these steps, exact to every order, and the only adjoint that gives z0 a
    gradient. For warm-up, and as a rival. Tolerance and early stop do not apply; the residual reported is that of the
    last evaluation, which is made of the state before the one returned.

    Args:
        steps: At least 1.
        checkpoint: Recompute each step in the backward pass: memory of one state a step instead of one cell a step.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    steps: int
    checkpoint: bool = False

    def __post_init__(self):
        count("steps", self.steps)
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"checkpoint must be a bool, got {self.checkpoint!r}")

    def pull(self, at, g, solve):
        raise AssertionError("an unrolled solve is differentiated by autograd")


def attach(adjoint: Adjoint, at: Linearised, z: Tensor, solve: BackwardSolves) -> Tensor:
    """z [B, N] with a gradient to all that f captured."""
    return _Attached.apply(adjoint, at, solve, z, *at.inputs)


class _Attached(torch.autograd.Function):
    """The value; its backward is `adjoint.pull`, then (df/d input)' u, each a Function of explicit inputs."""

    @staticmethod
    def forward(ctx, adjoint, at, solve, z, *inputs):
        ctx.adjoint, ctx.at, ctx.solve = adjoint, at, solve
        value = z.clone()
        ctx.save_for_backward(value, *inputs)
        return value

    @staticmethod
    def backward(ctx, g):
        adjoint, at, solve = ctx.adjoint, ctx.at, ctx.solve
        if not torch.is_grad_enabled():
            grads = at.pull(adjoint.pull(at, g, solve))
        elif adjoint.exact:
            z, *inputs = ctx.saved_tensors
            u = _Adjoint.apply(at, solve, g, z, *inputs)
            grads = _Pull.apply(at, u, z, *inputs)
        else:
            with torch.no_grad():
                grads = at.pull(adjoint.pull(at, g, solve))
            grads = _refuse(_APPROXIMATE.format(type(adjoint).__name__), ctx.saved_tensors[0], grads)
        return None, None, None, None, *grads


class _Adjoint(torch.autograd.Function):
    """u = J' u + g as a function of g, z and the inputs: du solves v = J v + du, and z and inputs get d(u' J v)."""

    @staticmethod
    def forward(ctx, at, solve, g, z, *inputs):
        ctx.at, ctx.solve = at, solve
        u = solve.adjoint(at, g)
        ctx.save_for_backward(u, z)
        return u

    @staticmethod
    def backward(ctx, du):
        ctx.at.require_seen_through()
        u, z = ctx.saved_tensors
        with torch.no_grad():
            v = ctx.solve.tangent(ctx.at, du)
            grads = (v, *ctx.at.bilinear(u, v))
        return None, None, *_refuse(_THIRD, z, grads)


class _Pull(torch.autograd.Function):
    """(df/d input)' u as a function of u, z and the inputs."""

    @staticmethod
    def forward(ctx, at, u, z, *inputs):
        ctx.at = at
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, z)
        return at.pull(u)

    @staticmethod
    def backward(ctx, *cotangents):
        ctx.at.require_seen_through()
        u, z = ctx.saved_tensors
        if all(c is None for c in cotangents):
            return None, *(None for _ in range(2 + len(cotangents)))
        with torch.no_grad():
            grads = ctx.at.pull_vjp(u, cotangents)
        return None, *_refuse(_THIRD, z, grads)


_APPROXIMATE = (
    "the gradient of {} is an approximation whose own derivative would be wrong: "
    "for second derivatives use Implicit(), or Unrolled(steps)"
)
_THIRD = "Implicit() is twice differentiable, and this is a third derivative: use Unrolled(steps)"


def _refuse(why: str, anchor: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`grads` as they are, but if a graph is being made, one that raises where they are differentiated."""
    return _Refused.apply(why, anchor, *grads) if torch.is_grad_enabled() else grads


class _Refused(torch.autograd.Function):
    """Identity of `grads`; `anchor` requires grad, and so do they then, whatever they were made of."""

    @staticmethod
    def forward(ctx, why, anchor, *grads):
        ctx.why = why
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.why)
