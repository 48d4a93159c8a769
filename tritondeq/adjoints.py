"""How a gradient is attached to a fixed point z* = f(z*, theta).

    dL/dtheta = (df/dtheta)' u,    u = (I - J')^-1 dL/dz*,    J = df/dz at z*

Each adjoint is a way to compute u. All but Unrolled take it from one evaluation of f at z*, saved in the forward pass,
so training needs the storage of one cell whatever the number of steps. gradient.py attaches it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .checks import boolean, integer, number
from .solvers import Solver


class Jacobian(Protocol):
    """Products with J = df/dz at the solution."""

    def vjp(self, u: Tensor) -> Tensor: ...  # noqa: D102


class BackwardSolves(Protocol):
    """The two linear fixed-point solves that an exact adjoint needs: u = J' u + g, and v = J v + w."""

    def adjoint(self, at: Jacobian, g: Tensor) -> Tensor: ...  # noqa: D102

    def tangent(self, at: Jacobian, w: Tensor) -> Tensor: ...  # noqa: D102


class Adjoint:
    """A way to take the gradient of a fixed point. A bad option raises TypeError or ValueError at construction.

    Attributes:
        exact: Whether u is the exact one, so that its derivative may be taken.
        products: Whether u takes products with J.
    """

    exact = False
    products = True

    def cotangent(self, at: Jacobian, g: Tensor, solves: BackwardSolves) -> Tensor:
        """Returns u [B, N] for the cotangent g [B, N] of z*."""
        raise NotImplementedError(f"{type(self).__name__} has no cotangent of a fixed point")


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The exact gradient: u solves u = J' u + g by fixed-point iteration (Bai et al. 2019, theorem 1).

    Twice differentiable, where all that f uses passes through torch functions. Its tolerance is relative to dL/dz*,
    sample by sample, so grad(c * loss) = c * grad(loss) for every c. A backward solve that fails warns, or with
    `throw` raises; a sample whose products are not finite gets NaN.

    Args:
        solver: Backward solver; None takes the forward one.
        tol: Residual ||J' u + g - u|| / ||g||; None takes the forward one's.
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

    def cotangent(self, at: Jacobian, g: Tensor, solves: BackwardSolves) -> Tensor:
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

    def cotangent(self, at: Jacobian, g: Tensor, solves: BackwardSolves) -> Tensor:
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

    def cotangent(self, at: Jacobian, g: Tensor, solves: BackwardSolves) -> Tensor:
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

    products = False

    def cotangent(self, at: Jacobian, g: Tensor, solves: BackwardSolves) -> Tensor:
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
        last: Differentiate this many steps, the last ones: those before run without a graph, and z0 gets no gradient,
            as recursive reasoners and looped transformers are trained. None is all.
    """

    steps: int
    checkpoint: bool = False
    last: int | None = None

    def __post_init__(self) -> None:
        integer("steps", self.steps)
        boolean("checkpoint", self.checkpoint)
        if self.last is not None:
            integer("last", self.last)
            if self.last > self.steps:
                raise ValueError(f"last must be at most steps, {self.steps}, got {self.last}")
