"""Operator splitting, for cells z = prox(W z + u) that are monotone: they have one fixed point, and need not contract.

With prox the proximal operator of a convex function of each element, z is a zero of the sum of two monotone operators,
over whose resolvents splittings iterate in turn. Each is a fixed-point iteration of the same form in another variable,
w = act(A w + c); so is the linear system of the gradient, with prox replaced by its derivative.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.dispatch import WholeSolve
from ..kernels.rules import Rules
from ..kernels.tails import Tail
from ..row_kernels import affine_problem, bf16_terms
from .base import Solver

NEWTON = 16  # steps of prox: enough for float64 and alpha between 0.01 and 100


@dataclass(frozen=True)
class Splitting:
    """A cell z = prox(W z + u), row by row, as a splitting solver needs it."""

    w: Tensor  # W, [D, D], float32 or float64; detached, and so is `u`
    u: Tensor  # [B, D]
    activation: str  # "relu" or "tanh", which are proximal operators
    margin: float  # m > 0 such that the symmetric part of I - W is at least m
    bound: Callable[[], float]  # returns a bound of ||I - W||_2; called at most once
    narrow: bool = False  # whether kernels may round matrices to bfloat16
    _resolvents: dict[float, Tensor] = field(default_factory=dict)

    def linear(self, z: Tensor) -> Tensor:
        """Returns W z + u."""
        return torch.addmm(self.u, z, self.w.mT)

    def resolvent(self, alpha: float) -> Tensor:
        """Returns (I + alpha (I - W))^-1, computed once per solve and gradient."""
        if alpha not in self._resolvents:
            eye = torch.eye(len(self.w), dtype=self.w.dtype, device=self.w.device)
            self._resolvents[alpha] = torch.linalg.inv(torch.lerp(eye, 2 * eye - self.w, alpha))
        return self._resolvents[alpha]

    @cached_property
    def norm(self) -> float:
        """A bound of ||I - W||_2."""
        return self.bound()

    def prox(self, y: Tensor, alpha: float) -> Tensor:
        """Returns the proximal operator of alpha phi at y: z with z + alpha (act^-1(z) - z) = y."""
        if self.activation == "relu":
            return torch.relu(y)
        t = y
        for _ in range(NEWTON if alpha != 1 else 0):  # z = tanh(t); from the side on which no step overshoots
            z = torch.tanh(t)
            t = t - (alpha * t + (1 - alpha) * z - y) / (alpha + (1 - alpha) * (1 - z * z))
        return torch.tanh(t)

    def slope(self, pre: Tensor, alpha: float) -> Tensor:
        """Returns the derivative of `prox` at the solution, where W z + u is `pre`."""
        s = (pre > 0).to(pre.dtype) if self.activation == "relu" else 1 - torch.tanh(pre) ** 2
        return s if alpha == 1 else s / torch.lerp(torch.full_like(s, alpha), torch.ones_like(s), s)


@dataclass(frozen=True)
class Reformulation:
    """A problem w = act(A w + c), row by row, whose solution gives that of another problem."""

    matrix: Tensor  # A, [D, D]
    shift: Tensor  # c, [B, D]
    act: Callable[[Tensor], Tensor]  # elementwise
    name: str | None  # the kernels' name of `act`, or None if no kernel has it
    enter: Callable[[Tensor], Tensor]  # maps the start of the other problem, [B, D], to one of this
    leave: Callable[[Tensor], Tensor]  # maps A w + c, where act(A w + c) = w, to the solution of the other problem
    narrow: bool  # whether kernels may round `matrix` to bfloat16
    pre: Tensor | None = None  # where the problem is linear, with the slope of `name`: at which point, [B, D]

    def linear(self, w: Tensor) -> Tensor:
        """Returns A w + c."""
        return torch.addmm(self.shift, w, self.matrix.mT)

    @property
    def tail(self) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tail] | None:
        """As `Cell.tail`, for maps of [B, D]."""
        return (lambda w: (self.linear(w),), Tail(self.name)) if self.name and self.pre is None else None

    @property
    def whole_solve(self) -> WholeSolve | None:
        """As `Cell.whole_solve`; its adjoint's operands come before `shift`."""
        if self.name is None:
            return None
        matrix, pre = (self.matrix, None) if self.pre is None else (self.matrix.mT, self.pre)
        return WholeSolve(
            **affine_problem(matrix, len(self.shift), self.name),
            operands=(matrix, self.shift),
            at=lambda _: (matrix, pre),
            options=lambda tol: {"activation": self.name, "terms": bf16_terms(tol, self.narrow)},
        )


class SplittingSolver(Solver):
    """A solver that iterates plainly on w = act(A w + c) in place of z = prox(W z + u); its cell has a `splitting`.

    A subclass defines the four maps below, for prox and, in the gradient, for its derivative in place of prox.
    """

    def init(self, z: Tensor, mask: Tensor | None) -> None:
        return None

    def step(self, history: None, z: Tensor, y: Tensor, g: Tensor, counted: Tensor, rules: Rules) -> Tensor:
        return y

    @abstractmethod
    def step_size(self, s: Splitting) -> float:
        """Returns alpha."""

    @abstractmethod
    def affine(self, s: Splitting, u: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
        """Returns (A, c) for this u [B, D], of W or of W'."""

    @abstractmethod
    def act(self, image: Tensor, y: Tensor) -> Tensor:
        """Returns the activation of a reformulation at y, where prox(y) is `image`."""

    @abstractmethod
    def act_name(self, s: Splitting) -> str | None:
        """Returns the kernels' name of act, or None if no kernel has it."""

    def enter(self, s: Splitting, z: Tensor) -> Tensor:
        """Returns where w starts for a start z."""
        return z

    def solve(self, s: Splitting) -> Reformulation:
        """Returns z = prox(W z + u) reformulated."""
        alpha = self.step_size(s)
        return Reformulation(
            *self.affine(s, s.u),
            act=lambda y: self.act(s.prox(y, alpha), y),
            name=self.act_name(s),
            enter=lambda z: self.enter(s, z),
            leave=lambda y: s.prox(y, alpha),
            narrow=s.narrow,
        )

    def pull(self, s: Splitting, pre: Tensor, g: Tensor, transpose: bool) -> Reformulation:
        """Returns y = M S y + g, [B, D], reformulated: S is prox's derivative where W z + u is `pre`, M is W' or W."""
        slope, m = s.slope(pre, self.step_size(s)), s.w.mT if transpose else s.w
        matrix, shift = self.affine(s, g, transpose)
        size = torch.linalg.vector_norm(shift, dim=1, keepdim=True)  # a linear solve wants a right-hand side of norm 1
        size = torch.where((size > 0) & size.isfinite(), size, 1.0)
        return Reformulation(
            matrix,
            shift / size,
            act=lambda y: self.act(slope * y, y),
            name=self.act_name(s),
            enter=torch.zeros_like,
            leave=lambda y: torch.addmm(g, slope * (y * size), m.mT),
            narrow=s.narrow,
            pre=pre,
        )
