"""The layer."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adjoints import Adjoint, Implicit, Unrolled
from .cells import Cell
from .checks import boolean
from .cuda_graphs import Graphs
from .fixed_point import solve_problem
from .generation import Cache, past_of
from .held import ready
from .layout import Layout, describe
from .options import Options
from .problem import HeldCell, Problem, leaves_that_require_grad
from .solution import Solution
from .solvers import Picard, Solver


class DEQ(nn.Module):
    """A deep equilibrium layer: z* = cell(z*, x), solved and differentiated implicitly (Bai et al. 2019).

    An ordinary module in every mode: differentiable in train() and eval(), under autocast and checkpointing, called
    any number of times before a backward. What torch.nn.utils.parametrize does to the cell's weights is computed once
    a solve.

    Args:
        cell: Any nn.Module with `forward(z, x)` that returns a state like z, or a `cells.Cell`.
        solver: How the equation is solved: `Picard`, `Anderson`, `Broyden`, or for a monotone cell `PeacemanRachford`
            or `ForwardBackward`. None is the cell's default, Picard() for most.
        adjoint: How gradients are taken: `Implicit`, `Neumann`, `Phantom`, `OneStep` or `Unrolled`.
        tol: Relative residual at which a sample is done. None is 1e-3, or 1e-2 where operands are bfloat16 or float16.
        atol: ||f(z) - z|| at which a sample is done, too.
        max_steps: Evaluations of the cell at most.
        trace: Store the residual of every evaluation in `last.trace`.
        group: A torch.distributed group whose ranks stop together, for a cell that communicates. None is the group over
            which the cell's parameters are sharded, where they are (FSDP2).
        throw: Raise where a sample or a backward solve fails; syncs.
        has_aux: Whether the cell returns (state, aux); `solve(x).aux` is that of one more evaluation, at the solution.
        compile: Whether the loop calls the cell through torch.compile; a dict gives its options, such as
            {"dynamic": True}. Second derivatives then raise. Whole-solve kernels are taken all the same.
        graph: Whether solves on CUDA are captured as CUDA graphs and replayed, once for each shape of what goes in (the
            last 8 are held). The cell may use only its parameters, its buffers and x, and nothing may depend on values
            that the host reads. Second derivatives then raise. Not yet run on a GPU.

    Attributes:
        last: The `Solution` of the last call without its value (None before it): status, steps, residual per sample.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
        tol: float | None = None,
        atol: float = 0.0,
        max_steps: int = 50,
        trace: bool = False,
        group: Any = None,
        throw: bool = False,
        has_aux: bool = False,
        compile: bool | dict[str, Any] = False,
        graph: bool = False,
    ):
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be an nn.Module, got {describe(cell)}; for a function there is fixed_point")
        if solver is None:
            solver = cell.default_solver() if isinstance(cell, Cell) else Picard()
            solver = _picard(solver) if isinstance(adjoint, Unrolled) else solver
        Options(solver, adjoint, tol, atol, max_steps, throw=throw).check()
        boolean("has_aux", has_aux)
        if not isinstance(compile, bool | dict):
            raise TypeError(f"compile must be a bool or a dict of torch.compile's options, got {compile!r}")
        boolean("graph", graph)
        conflicts = {
            "adjoint Unrolled, which autograd differentiates step by step": isinstance(adjoint, Unrolled),
            "Implicit(reuse=True)": isinstance(adjoint, Implicit) and adjoint.reuse,
            "trace=True, which asks for every residual": trace,
            "group, whose ranks would have to agree on every replay": group is not None,
            "has_aux=True, which asks for one more evaluation": has_aux,
        }
        for what in (what for what, given in conflicts.items() if graph and given):
            raise ValueError(f"graph=True can't be combined with {what}")
        self.cell, self.solver, self.adjoint = cell, solver, adjoint
        self.tol, self.atol, self.max_steps, self.trace, self.group = tol, atol, max_steps, trace, group
        self.throw, self.has_aux = throw, has_aux
        self.compile_cell, self.graph = compile, graph
        self._graphs = Graphs() if graph else None
        self._compiled: Any = None  # as a tuple, or its parameters would be registered twice
        self._unrolled: Unrolled | None = None
        self._token = object()
        self.last: Solution | None = None
        ready(cell)

    def forward(self, x: Any, z0: Any = None, mask: Any = None, **kwargs: Any) -> Any:
        """Returns the fixed point alone; the arguments are those of `solve`."""
        return self.solve(x, z0, mask, **kwargs).value

    def unrolled(self, steps: int | None, checkpoint: bool = False, last: int | None = None) -> "DEQ":
        """Switches to the explicit weight-tied net of `steps` evaluations of the cell, or with None back; returns self.

        The net is `Unrolled(steps, checkpoint, last)` from where a solve would start, for warm-up and comparison, by
        steps of the first `Picard` among the layer's solver, the cell's default and Picard(). It holds in train(), in
        eval() and in copies, not in state_dict.

        Raises:
            TypeError, ValueError: An option is of the wrong kind or out of range.
        """
        self._unrolled = None if steps is None else Unrolled(steps, checkpoint, last)
        return self

    def solve(
        self,
        x: Any,
        z0: Any = None,
        mask: Any = None,
        *,
        at: Iterable[int] = (),
        callback: Callable[[int, Any, Tensor], None] | None = None,
        sample_of: Tensor | None = None,
        **kwargs: Any,
    ) -> Solution:
        """Returns the fixed point and the outcome of each sample.

        Args:
            x: The cell's input; of any structure, with leaves that are not tensors, where the cell takes it.
            z0: Where to start: a state. None is the cell's `initial`, or zeros like x.
            mask: bool, True where an element of the state counts in norms. For cells of tokens, [batch, tokens]: True
                for real tokens, False for padding, the same as x = (x, mask).
            at: Numbers of evaluations after which `Solution.states` has the state, as in `fixed_point`.
            callback: Called after each evaluation, as in `fixed_point`.
            sample_of: The number of the sample that each row of the state belongs to, as in `fixed_point`.
            kwargs: Further arguments of the cell: of `forward`, or of `inject` for a `cells.Cell`.

        Raises:
            TypeError, ValueError: x, z0, mask or what the cell returned does not fit; the message names it.
            RuntimeError: The cell draws other dropout masks than those of `FixedDropout`.
        """
        cell = self.cell
        if mask is not None and isinstance(cell, Cell):
            x, mask = cell.padded(x, mask)
        evaluate: Callable = cell
        if self.compile_cell is not False:
            if self._compiled is None:
                options = {} if self.compile_cell is True else self.compile_cell
                self._compiled = (torch.compile(cell, **options),)
            (evaluate,) = self._compiled
        if isinstance(cell, Cell):
            f = HeldCell(evaluate, cell, lambda: cell.inject(x, **kwargs))
        else:
            f = HeldCell(evaluate, cell, lambda: x, kwargs)
        return self._solve(f, x, z0, mask, self._graphs, at=tuple(at), callback=callback, sample_of=sample_of)

    @torch.no_grad()
    def step(self, x: Any, cache: Cache | None = None, z0: Any = None) -> tuple[Any, Cache]:
        """Returns (fixed point of these tokens, cache of all so far), as if all were solved together; only these are.

        A causal cell's tokens do not depend on later ones, so earlier solutions stand, and the cache holds what the
        cell needs of them (keys and values at the equilibrium, for `cells.Transformer`). A step is any number of
        tokens and stops by their residual, so the result is that of `forward` on all tokens to within the tolerance.

        There are no gradients, neither of z nor of the cache: train with `forward`. A cache belongs to the weights it
        was made with, and may be stepped from any number of times, as beams that share a prompt do. In train(), each
        step draws its dropout masks. Neither `compile` nor `graph` applies.

        Args:
            x: The cell's input for the new tokens, [B, t, ...].
            cache: What the step before returned; None: these are the first tokens.
            z0: Where to start: a state. None is the cell's `initial`.

        Raises:
            TypeError: The cell does not define `extend` and `remember`; cache is none of `step`'s.
            ValueError: The cell is not causal; the cache is that of another layer, batch size, dtype or device.
        """
        cell = self.cell
        past, like = past_of(cell, x, cache, self._token)
        f = HeldCell(cell, cell, lambda: cell.extend(x, past))  # type: ignore[operator]
        z = self._solve(f, x, z0, None).value
        with f.held.on(f.held.weights):
            return z, Cache(self._token, like, cell.remember(z, f.injection))  # type: ignore[operator]

    def _solve(self, f: HeldCell, x: Any, z0: Any, mask: Any, graphs: Graphs | None = None, **way: Any) -> Solution:
        cell, tol, solver, adjoint = self.cell, self.tol, self.solver, self.adjoint
        if self._unrolled is not None:
            default = cell.default_solver() if isinstance(cell, Cell) else None
            solver, adjoint = _picard(solver, default), self._unrolled
        if isinstance(cell, Cell):
            z0 = cell.initial(x, f.injection) if z0 is None else z0
            mask = cell.counts(f.injection) if mask is None else mask
            tol = cell.default_tol() if tol is None else tol
        elif z0 is None:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(
                    "z0 must be given where x is no floating-point tensor and the cell has no `initial`, got x: "
                    + describe(x)
                )
            z0 = torch.zeros_like(x)
        limits = (tol, self.atol, self.max_steps)
        options = Options(solver, adjoint, *limits, mask, self.trace, self.group, self.throw, **way)
        inputs: tuple[Tensor, ...] = ()
        if torch.is_grad_enabled() and not isinstance(adjoint, Unrolled):
            inputs = leaves_that_require_grad(f.args, [parameter for _, _, parameter in f.parameters])

        def make(layout: Layout) -> Problem:
            return f.problem(layout, inputs=inputs, has_aux=self.has_aux, modules=(cell,))

        solution = solve_problem(make, z0, getattr(cell, "batch_dims", 1), options, graphs)
        outcome = solution.status, solution.steps, solution.residual, solution.trace, solution.route, solution.why
        vars(self)["last"] = Solution(
            None, *outcome, _backward=solution._backward
        )  # without nn.Module's look at its kind
        return solution

    def extra_repr(self) -> str:
        tol = "auto" if self.tol is None else self.tol
        unrolled = "" if self._unrolled is None else f", unrolled={self._unrolled.steps}"
        return f"solver={self.solver}, adjoint={self.adjoint}, tol={tol}, max_steps={self.max_steps}{unrolled}"

    def __getstate__(self) -> dict[str, Any]:
        graphs = Graphs() if self.graph else None
        return self.__dict__ | {"last": None, "_compiled": None, "_graphs": graphs, "_token": object()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DEQ":
        made = type(self).__new__(type(self))
        memo |= {id(self): made, id(self.group): self.group}  # ranks are the same for a copy, and can't be copied
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


def _picard(*solvers: Solver | None) -> Picard:
    return next((solver for solver in solvers if isinstance(solver, Picard)), Picard())
