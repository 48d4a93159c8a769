"""The layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adjoints import Adjoint, Implicit, Unrolled
from .cells import Cell
from .dropout import Masks
from .fixed_point import check, fixed_point
from .graphs import Graphs
from .layout import describe
from .parametrized import Parametrized
from .solution import Solution
from .solvers import Picard, Solver


class DEQ(nn.Module):
    """A deep equilibrium layer: z* = cell(z*, x), solved and differentiated implicitly (Bai et al. 2019).

    An ordinary module in every mode: differentiable in train() and eval(), under autocast and checkpointing, called
    any number of times before a backward.

    Args:
        cell: Any nn.Module with `forward(z, x)` that returns a state like z, or a `cells.Cell`.
        solver: How the fixed point is found: `Picard`, `Anderson` or `Broyden`.
        adjoint: How gradients are taken: `Implicit`, `Neumann`, `Phantom`, `OneStep` or `Unrolled`.
        tol: Relative residual at which a sample is done. None is 1e-3, or 1e-2 where operands are bfloat16 or float16.
        max_steps: Evaluations of the cell at most.
        trace: Keep the residual of every evaluation, in `last.trace`.
        group: A torch.distributed group whose ranks stop together, for a cell that communicates.
        compile: Whether the loop calls the cell through torch.compile; a dict gives its options, such as
            {"dynamic": True}. Second derivatives then raise. Whole-solve kernels are taken all the same.
        graph: Whether solves on CUDA are captured as CUDA graphs and replayed, once for each shape of what goes in (the
            last 8 are kept). The cell may use only its parameters, its buffers and x, and nothing may depend on values
            that the host reads. Second derivatives then raise. Not yet run on a GPU: see README.

    Attributes:
        last: The `Solution` of the last call without its value (None before it): status, steps, residual per sample.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver = Picard(),  # noqa: B008  frozen
        adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
        tol: float | None = None,
        max_steps: int = 50,
        trace: bool = False,
        group: Any = None,
        compile: bool | dict[str, Any] = False,
        graph: bool = False,
    ):
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be an nn.Module, got {describe(cell)}; for a function there is fixed_point")
        check(solver, adjoint, tol, max_steps)
        self.cell, self.solver, self.adjoint = cell, solver, adjoint
        if not isinstance(compile, bool | dict):
            raise TypeError(f"compile must be a bool or a dict of torch.compile's options, got {compile!r}")
        self.tol, self.max_steps, self.trace, self.group = tol, max_steps, trace, group
        self.compile_cell = compile
        if not isinstance(graph, bool):
            raise TypeError(f"graph must be a bool, got {graph!r}")
        why = _not_captured(adjoint, trace, group) if graph else None
        if why:
            raise ValueError(f"graph=True can't be combined with {why}")
        self.graph = graph
        self._graphs = Graphs() if graph else None
        self._compiled: Any = None  # as a tuple, or its parameters would be registered twice
        self.last: Solution | None = None

    def forward(self, x: Any, z0: Any = None, mask: Any = None) -> Any:
        """The fixed point: `solve(x, z0, mask).value`."""
        return self.solve(x, z0, mask).value

    def _evaluate(self) -> Callable:
        """The cell as the loop calls it."""
        if self.compile_cell is False:
            return self.cell
        if self._compiled is None:
            options = {} if self.compile_cell is True else self.compile_cell
            self._compiled = (torch.compile(self.cell, **options),)
        return self._compiled[0]

    def solve(self, x: Any, z0: Any = None, mask: Any = None) -> Solution:
        """The fixed point and, per sample, what became of it.

        Args:
            x: The cell's input.
            z0: Where to start: a state. None asks the cell (`initial`), or is zeros like x.
            mask: bool, True where an element of the state counts in norms.

        Raises:
            TypeError, ValueError: x, z0, mask or what the cell returned does not fit; the message names it.
            RuntimeError: the cell draws dropout masks of its own: see `FixedDropout`.
        """
        cell = self.cell
        own = isinstance(cell, Cell)
        weights = Parametrized(cell)
        with weights.held(weights.values):
            injection = cell.inject(x) if own else x
        if z0 is None:
            z0 = cell.initial(x, injection) if own else _zeros(x)
        if mask is None and own:
            mask = cell.counts(injection)
        tol = self.tol if self.tol is not None or not own else cell.default_tol()
        solution = fixed_point(
            _Map(self._evaluate(), cell, injection, weights, self._graphs),
            z0,
            (injection, weights.values),
            solver=self.solver,
            adjoint=self.adjoint,
            tol=tol,
            max_steps=self.max_steps,
            batch_dims=getattr(cell, "batch_dims", 1),
            mask=mask,
            trace=self.trace,
            group=self.group,
        )
        self.last = replace(solution, value=None)
        return solution

    def extra_repr(self) -> str:
        tol = "auto" if self.tol is None else self.tol
        return f"solver={self.solver}, adjoint={self.adjoint}, tol={tol}, max_steps={self.max_steps}"

    def __getstate__(self):
        own = {"last": None, "_compiled": None, "_graphs": Graphs() if self.graph else None}
        return {**self.__dict__, **own}


class _Map:
    """cell(z, injection), with the same dropout masks at every call, and parametrized tensors of these values.

    Args:
        evaluate: The cell, or what it was compiled to.
        injection: That of this solve, for the whole-solve kernel.
        weights: The parametrized tensors of the cell.
        graphs: The layer's captured solves, if it has any.
    """

    def __init__(
        self, evaluate: Callable, cell: nn.Module, injection: Any, weights: Parametrized, graphs: Graphs | None
    ):
        self.evaluate, self.cell, self.injection, self.graphs = evaluate, cell, injection, graphs
        self.weights = weights
        self.opaque = evaluate is not cell
        self.masks = Masks(cell)

    def twin(self) -> "_Map":
        """The same map, with masks in memory of its own."""
        twin = _Map(self.evaluate, self.cell, None, self.weights, None)
        twin.masks.masks = {module: mask.clone() for module, mask in self.masks.masks.items()}
        return twin

    def __call__(self, z: Any, injection: Any, weights: tuple[Tensor, ...]) -> Any:
        with self.weights.held(weights):
            if not self.masks.masks:
                return self.evaluate(z, injection)
            drawn = self.masks.drawn
            with self.masks.held():  # a compiled cell finds the masks and has no branch that draws them
                return (self.evaluate if drawn else self.cell)(z, injection)

    @property
    def whole_solve(self):
        return self.cell.whole_solve(self.injection) if _tells(self.cell, "whole_solve") else None

    @property
    def tail(self):
        told = self.cell.tail() if _tells(self.cell, "tail") and not self.opaque else None
        if told is None:
            return None
        before, name = told

        def held(z: Any, injection: Any, weights: tuple[Tensor, ...]) -> Any:
            with self.weights.held(weights):
                return before(z, injection)

        return held, name


def _tells(cell: nn.Module, what: str) -> bool:
    """Whether `cell` is a Cell whose `what` speaks of its own forward, not of one that a subclass has replaced."""
    if not isinstance(cell, Cell) or "forward" in vars(cell):
        return False
    defined = {name: next(i for i, c in enumerate(type(cell).__mro__) if name in vars(c)) for name in (what, "forward")}
    return defined[what] <= defined["forward"]


def _not_captured(adjoint: Adjoint, trace: bool, group: Any) -> str | None:
    """What of these a captured solve has not."""
    if isinstance(adjoint, Unrolled):
        return "adjoint Unrolled, which autograd differentiates step by step"
    if isinstance(adjoint, Implicit) and adjoint.reuse:
        return "Implicit(reuse=True)"
    if trace:
        return "trace=True, which asks for every residual"
    return "group, whose ranks would have to agree on every replay" if group is not None else None


def _zeros(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"z0 must be given where x is not a tensor and the cell has no `initial`; x is {describe(x)}")
    return torch.zeros_like(x)
