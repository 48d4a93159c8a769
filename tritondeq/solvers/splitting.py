"""Operator splitting, for cells z = prox(W z + u) that are monotone: they have one fixed point, and need not contract.

With prox the proximal operator of a convex function phi of each element, z solves u in (I - W) z + d phi(z), a sum of
two monotone operators if the symmetric part of I - W is positive. Splittings iterate over the resolvents of the two in
turn. For this sum each of them is a fixed-point iteration of the same form in another variable, w = act(A w + c), for
which see `Reformulation`; so is the linear system of the gradient, with prox replaced by its derivative.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import FAST
from ..kernels.launch import FEATURES
from ..kernels.tails import Tail
from .base import Solver

FAST_TANH = 5e-3  # tolerance from which the hardware's tanh does
NEWTON = 16  # steps of prox: enough for float64 and alpha between 0.01 and 100


class Splitting:
    """What a cell tells a splitting solver: z = prox(W z + u), row by row.

    Args:
        w: W, [D, D], float32 or float64; detached, and so is `u`.
        u: [B, D].
        activation: "relu" or "tanh", which are proximal operators.
        margin: m > 0 such that the symmetric part of I - W is at least m.
        norm: Gives a bound of ||I - W||_2; asked at most once.
        narrow: Whether kernels may round matrices to bfloat16.
    """

    def __init__(
        self, w: Tensor, u: Tensor, activation: str, margin: float, norm: Callable[[], float], narrow: bool = False
    ):
        self.w, self.u, self.activation, self.margin, self.narrow = w, u, activation, margin, narrow
        self._norm, self._resolvents = norm, {}

    def linear(self, z: Tensor) -> Tensor:
        """W z + u."""
        return torch.addmm(self.u, z, self.w.mT)

    def resolvent(self, alpha: float) -> Tensor:
        """(I + alpha (I - W))^-1, computed once per solve and gradient."""
        if alpha not in self._resolvents:
            eye = torch.eye(len(self.w), dtype=self.w.dtype, device=self.w.device)
            self._resolvents[alpha] = torch.linalg.inv(torch.lerp(eye, 2 * eye - self.w, alpha))
        return self._resolvents[alpha]

    @cached_property
    def norm(self) -> float:
        """A bound of ||I - W||_2."""
        return self._norm()

    def prox(self, y: Tensor, alpha: float) -> Tensor:
        """The proximal operator of alpha phi at y: z with z + alpha (act^-1(z) - z) = y."""
        if self.activation == "relu":
            return torch.relu(y)
        t = y
        for _ in range(NEWTON if alpha != 1 else 0):  # z = tanh(t); from the side on which no step overshoots
            z = torch.tanh(t)
            t = t - (alpha * t + (1 - alpha) * z - y) / (alpha + (1 - alpha) * (1 - z * z))
        return torch.tanh(t)

    def slope(self, pre: Tensor, alpha: float) -> Tensor:
        """Derivative of `prox` at the solution, where W z + u is `pre`."""
        s = (pre > 0).to(pre.dtype) if self.activation == "relu" else 1 - torch.tanh(pre) ** 2
        return s if alpha == 1 else s / torch.lerp(torch.full_like(s, alpha), torch.ones_like(s), s)


@dataclass(frozen=True)
class Reformulation:
    """w = act(A w + c), row by row, whose solution gives that of another problem.

    Attributes:
        matrix: A, [D, D].
        shift: c, [B, D].
        act: Elementwise.
        name: Of `act`, if a kernel has it.
        enter: From the start of the other problem, [B, D], to one of this.
        leave: From A w + c, where act(A w + c) = w, to the solution of the other problem.
        pre: Where a linear problem's slope is that of the activation `name`: what at, [B, D].
        narrow: Whether kernels may round `matrix` to bfloat16.
    """

    matrix: Tensor
    shift: Tensor
    act: Callable[[Tensor], Tensor]
    name: str | None
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    pre: Tensor | None = None
    narrow: bool = False

    def linear(self, w: Tensor) -> Tensor:
        """A w + c."""
        return torch.addmm(self.shift, w, self.matrix.mT)

    @property
    def tail(self) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tail] | None:
        """As a cell's, of maps of [B, D]."""
        return (lambda w: (self.linear(w),), Tail(self.name)) if self.name and self.pre is None else None

    @property
    def whole_solve(self) -> WholeSolve | None:
        """As a cell's; its adjoint's operands come before `shift`."""
        if self.name is None:
            return None
        matrix, pre = (self.matrix, None) if self.pre is None else (self.matrix.mT, self.pre)
        return WholeSolve(
            **affine_problem(matrix, len(self.shift), self.name),
            operands=(matrix, self.shift),
            at=lambda _: (matrix, pre),
            options=lambda tol: {"activation": self.name, "terms": bf16_terms(tol, self.narrow)},
        )


def affine_problem(w: Tensor, rows: int, activation: str, half: bool = False) -> dict[str, Any]:
    """The op and the problem of a WholeSolve of act(W z + u); `half`: torch would multiply in 16 bits."""
    features = len(w)
    problem: dict[str, Any] = {"features": features, "dtype": w.dtype, "activation": activation}
    if features <= FEATURES:
        return {"op": "rows.affine", "problem": problem}
    exact = torch.get_float32_matmul_precision() == "highest"
    problem |= {"rows": rows, "cell": "bf16" if half else "fp32" if exact else "tf32"}
    return {"op": "steps.affine", "problem": problem}


def bf16_terms(tol: float, narrow: bool) -> int:
    """How many bfloat16 terms of a weight a solve to this tolerance takes."""
    return 1 if narrow else 2 if tol >= 1e-5 else 3


def kernel_options(activation: str, tol: float, narrow: bool) -> dict[str, Any]:
    """What kernels that hold a cell are told for a solve to this tolerance. The hardware's tanh has a relative error of
    5e-4, and what is made of it too: that does where weights are bfloat16 and `tol` is ten times that.
    """
    terms = bf16_terms(tol, narrow)
    fast = terms == 1 and tol >= FAST_TANH
    return {"activation": FAST.get(activation, activation) if fast else activation, "terms": terms}


class SplittingSolver(Solver):
    """A solver that iterates in a variable of its own, plainly; it needs a cell with a `splitting`."""

    def init(self, z: Tensor, mask: Tensor | None) -> None:
        return None

    def step(self, memory: Any, z: Tensor, y: Tensor, g: Tensor, seen: Tensor, rules: Any) -> Tensor:
        return y

    @abstractmethod
    def solve(self, s: Splitting) -> Reformulation:
        """Of z = prox(W z + u)."""

    @abstractmethod
    def pull(self, s: Splitting, pre: Tensor, g: Tensor, transpose: bool) -> Reformulation:
        """Of y = M S y + g, [B, D], with S the derivative of prox where W z + u is `pre`, and M = W' or W."""
