"""The layer."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
    any number of times before a backward. What torch.nn.utils.parametrize does to the cell's weights is computed once
    a solve.

    Args:
        cell: Any nn.Module with `forward(z, x)` that returns a state like z, or a `cells.Cell`.
        solver: How the fixed point is found: `Picard`, `Anderson`, `Broyden`, or for a monotone cell `PeacemanRachford`
            or `ForwardBackward`. None asks the cell, and is Picard() for most.
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
        solver: Solver | None = None,
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
        if solver is None:
            own = cell.default_solver() if isinstance(cell, Cell) else Picard()
            solver = _picard(own) if isinstance(adjoint, Unrolled) else own
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
        self._twin: Unrolled | None = None
        self._token = _Token()

    def forward(self, x: Any, z0: Any = None, mask: Any = None) -> Any:
        """The fixed point: `solve(x, z0, mask).value`."""
        return self.solve(x, z0, mask).value

    def unrolled(self, steps: int | None, checkpoint: bool = False) -> "DEQ":
        """Switches to the explicit weight-tied net of `steps` evaluations of the cell, or with None back; returns self.

        The net is `Unrolled(steps, checkpoint)` from where a solve would start, by steps of the layer's solver if it is
        a `Picard`, else of the cell's default, else by plain ones: for warm-up, and to compare with. It holds in
        train() and eval(), and in copies; state_dict does not know of it.

        Raises:
            TypeError, ValueError: an option is of the wrong kind or out of range.
        """
        self._twin = None if steps is None else Unrolled(steps, checkpoint)
        return self

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
        return self._solve(self._map(x), x, z0, mask)

    def _map(self, x: Any) -> "_Map":
        cell = self.cell
        weights = Parametrized(cell)
        with weights.held(weights.values):
            injection = cell.inject(x) if isinstance(cell, Cell) else x
        return _Map(self._evaluate(), cell, injection, weights, self._graphs)

    @torch.no_grad()
    def step(self, x: Any, cache: "Cache | None" = None, z0: Any = None) -> "tuple[Any, Cache]":
        """(fixed point of these tokens, cache of all so far), as if all were solved together, but only these are.

        A causal cell's tokens do not depend on later ones, so what was solved stands, and the cache holds what the cell
        needs of it (keys and values at the equilibrium, for `cells.Transformer`). Any number of tokens is a step: a
        prompt, then one after another. Each step stops by the residual of its own tokens, so the result is that of
        `forward` on all tokens to within the tolerance.

        There are no gradients, neither of z nor of the cache: train with `forward`. A cache belongs to the weights it
        was made with. It may be stepped from any number of times, as beams do that share a prompt. Dropout, in train(),
        draws its mask for each step. Neither `compile` nor `graph` applies.

        Args:
            x: The cell's input for the new tokens, [B, t, ...].
            cache: What the step before returned; None: these are the first tokens.
            z0: Where to start: a state. None asks the cell.

        Raises:
            TypeError: the cell does not define `extend` and `remember`; cache is none of `step`'s.
            ValueError: the cell is not causal; the cache is that of another layer, batch size, dtype or device.
        """
        cell = self.cell
        if not isinstance(cell, Cell) or type(cell).extend is Cell.extend or type(cell).remember is Cell.remember:
            raise TypeError(f"step needs a causal cell that defines extend and remember, got {type(cell).__name__}")
        like = _like(x)
        past = None if cache is None else _past_of(cache, self._token, like)
        weights = Parametrized(cell)
        with weights.held(weights.values):
            injection = cell.extend(x, past)
        f = _Map(cell, cell, injection, weights, None)
        z = self._solve(f, x, z0, None).value
        with f.held(weights.values):
            past = cell.remember(z, injection)
        return z, Cache(self._token, like, past)

    def _solve(self, f: "_Map", x: Any, z0: Any, mask: Any) -> Solution:
        cell, injection = self.cell, f.injection
        own = isinstance(cell, Cell)
        if z0 is None:
            z0 = cell.initial(x, injection) if own else _zeros(x)
        if mask is None and own:
            mask = cell.counts(injection)
        tol = self.tol if self.tol is not None or not own else cell.default_tol()
        solver, adjoint = self.solver, self.adjoint
        if self._twin is not None:
            solver, adjoint = _picard(solver, cell.default_solver() if own else None), self._twin
        solution = fixed_point(
            f,
            z0,
            (injection, f.weights.values),
            solver=solver,
            adjoint=adjoint,
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
        twin = "" if self._twin is None else f", unrolled={self._twin.steps}"
        return f"solver={self.solver}, adjoint={self.adjoint}, tol={tol}, max_steps={self.max_steps}{twin}"

    def __getstate__(self):
        own = {"last": None, "_compiled": None, "_graphs": Graphs() if self.graph else None, "_token": _Token()}
        return {**self.__dict__, **own}


class _Token:
    """Who a layer is, to its caches; a copy of the layer has one of its own."""


@dataclass(frozen=True)
class Cache:
    """What `DEQ.step` remembers of the tokens so far."""

    layer: _Token
    like: dict[str, Any]  # of x: batch size, dtype, device
    past: Any = field(repr=False)  # the cell's


def _like(x: Any) -> dict[str, Any]:
    first = next((leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise TypeError(f"x must hold a tensor [batch, tokens, ...], got {describe(x)}")
    return {"batch size": first.shape[0], "dtype": first.dtype, "device": first.device}


def _past_of(cache: Any, token: _Token, like: dict[str, Any]) -> Any:
    """What the cell remembers, if the cache fits."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be what step returned, or None, got {describe(cache)}")
    if cache.layer is not token:
        raise ValueError("cache must be of this layer's own steps, got that of another layer")
    for name, value in like.items():
        if cache.like[name] != value:
            raise ValueError(f"cache must fit x: it is for {name} {cache.like[name]}, and x has {name} {value}")
    return cache.past


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

    @contextlib.contextmanager
    def held(self, weights: tuple[Tensor, ...]) -> Iterator[None]:
        """For one evaluation."""
        with self.weights.held(weights), self.masks.held():
            yield

    def __call__(self, z: Any, injection: Any, weights: tuple[Tensor, ...]) -> Any:
        if not self.masks.masks and not weights:
            return self.evaluate(z, injection)
        drawn = self.masks.drawn
        with self.held(weights):  # a compiled cell finds the masks and has no branch that draws them
            return (self.evaluate if drawn else self.cell)(z, injection)

    @property
    def whole_solve(self):
        return self.cell.whole_solve(self.injection) if _tells(self.cell, "whole_solve") else None

    @property
    def splitting(self):
        return self.cell.splitting(self.injection) if _tells(self.cell, "splitting") else None

    @property
    def tail(self):
        told = self.cell.tail(self.injection) if _tells(self.cell, "tail") and not self.opaque else None
        if told is None:
            return None
        parts, tail = told

        def held(z: Any, injection: Any, weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
            with self.held(weights):
                return parts(z, injection)

        return held, tail


def _tells(cell: nn.Module, what: str) -> bool:
    """Whether `cell` is a Cell whose `what` speaks of its own forward, not of one that a subclass has replaced."""
    if not isinstance(cell, Cell) or "forward" in vars(cell):
        return False
    defined = {name: next(i for i, c in enumerate(type(cell).__mro__) if name in vars(c)) for name in (what, "forward")}
    return defined[what] <= defined["forward"]


def _picard(*solvers: Solver | None) -> Picard:
    """The first of these that is one, else the plain one."""
    return next((solver for solver in solvers if isinstance(solver, Picard)), Picard())


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
