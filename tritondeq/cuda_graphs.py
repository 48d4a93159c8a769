"""Solves captured as CUDA graphs, `DEQ(..., graph=True)`: the host replays chunks of steps and launches nothing else.

For each shape of everything that goes in, a solve is captured once, on static tensors: `begin` (from the start, a chunk
of evaluations), `more` (another chunk) and `end` (best iterate, outcome); for gradients the cell at z* under autograd,
the same three of the adjoint solve on it, and the product with (df/d input)'. From torch 2.14 on, the three are one
graph with a WHILE node around `more`, where no step calls autograd. A call copies its start, injection and dropout
masks there and replays; parameters are read where they lie. Captures share a pool, so a forward replay may overwrite
what the cell at z* has saved: the cell is replayed before its gradient, unless nothing came between: see `holder`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .capture import leaves_of, vjp
from .gradient import Point
from .kernels import devices
from .kernels.dispatch import CellOp
from .kernels.tails import PLAIN
from .layout import pytree
from .loop import Ended, Look, Settings, plan_steps, start, without_autocast
from .problem import HeldCell, Problem, leaves_that_require_grad
from .solution import Outcome, Route

CHUNK = 3  # evaluations at least; a chunk has whole periods of kernels/steps, so that it begins with the same buffers
CACHE = 8  # solves a layer stores
WARM_UP = 2  # runs before a capture: lazy initialisations can't be captured

Work = Callable[[], None]


class Recorder:
    """Turns work into a replay of it, on one CUDA device."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # torch's default one is of the device that captured first
        self.repeats = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")

    def repeat(self, going: Tensor, body: Work) -> None:
        """Runs `body` for as long as `going`, a bool scalar that it renews, is true; as part of work."""
        if not torch.cuda.is_current_stream_capturing():
            return body()  # to warm up
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_while_node(going)
        try:
            body()
            graph.set_conditional_handle_for_current_node(going)
        finally:
            graph.end_capture_to_conditional_node()

    def __call__(self, work: Work) -> Work:
        """Returns what replays `work`."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "global" would let another thread end the capture, such as that of a DataLoader that pins memory
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                work()
            graph.replay()  # what it writes has been garbage so far
        return graph.replay


def can_record(device: torch.device) -> bool:
    """Returns whether work on this device can be captured now."""
    return device.type == "cuda" and not devices.capturing(device)


@dataclass
class Call:
    """What one call provides; `op` and `backward_op` hold the cell, one step at a time."""

    problem: Problem
    cell: HeldCell
    start: Tensor
    settings: Settings
    backward: Settings
    op: CellOp | None = None
    backward_op: CellOp | None = None

    def options(self, tol: float) -> dict[str, Any]:
        """Returns the arguments of the ops."""
        return self.problem.whole.options(tol) if self.problem.whole else {}

    def key(self) -> tuple:
        """Returns all that a captured solve depends on beside the numbers in its tensors."""
        leaves, spec = pytree.tree_flatten(self.problem.args)
        kind, cell, layout = self.start.device.type, self.cell.cell, self.problem.layout
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        tensors = [isinstance(x, Tensor) and (x.shape, x.dtype, x.device, x.requires_grad) for x in leaves]
        values = [None if isinstance(x, Tensor) else x for x in leaves]
        weights = [(t.data_ptr(), t.requires_grad) for t in (*cell.parameters(), *cell.buffers())]
        plans = [(s.solver, s.tol, s.max_steps, s.relative, s.scale) for s in (self.settings, self.backward)]
        training = [module.training for module in cell.modules()]
        lists: tuple = (tensors, values, weights, plans, training, layout.shapes, layout.dtypes, layout.channels_last)
        return (
            *(spec, layout.spec, layout.batch, self.start.device, autocast, torch.is_grad_enabled()),
            *(self.settings.mask is not None, id(self.cell.evaluate), self.op, self.backward_op, *map(tuple, lists)),
        )


class Graphs:
    """The captured solves of one layer, the CACHE used last."""

    def __init__(self) -> None:
        self.solves: OrderedDict[tuple, Captured] = OrderedDict()

    def find(self, call: Call) -> "tuple[Captured | None, str]":
        """Returns (the solve captured for such calls, how it is done), or (None, why there is none)."""
        op, device, layout = call.op, call.start.device, call.problem.layout
        if not can_record(device):
            return None, f"graphs are for CUDA, outside of other graphs, and tensors are on {device.type}"
        how = op.label if op else ""
        if op is None:
            op, how = plan_steps(call.settings.solver, device, layout.width, layout.dtype)
        if op is None or not layout.batch:
            return None, f"no graph: {how}"
        if not call.cell.held.drawn:
            with torch.no_grad():
                call.problem(call.start)
        key = call.key()
        try:
            new = key not in self.solves
        except TypeError as error:
            raise TypeError(f"graph=True takes only tensors and hashable values in x: {error}") from error
        if new:
            while len(self.solves) >= CACHE:
                self.solves.popitem(last=False)
            try:
                self.solves[key] = Captured(call)
            except Refused:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "graph=True, and this cell can't be captured as a CUDA graph: it may neither wait for the GPU nor "
                    f"branch on values; take graph=False. {type(error).__name__}: {error}"
                ) from error
        self.solves.move_to_end(key)
        return self.solves[key], f"{self.solves[key].forward.how}, {how}"


class Refused(RuntimeError):
    """A capture that the library refuses, as opposed to one that CUDA does."""


class Captured:
    """One captured solve, forward and, where gradients are wanted, backward."""

    at: Point
    grads: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...] = ()
    sources: tuple[Any, ...] = ()  # of the gradients: a place in args, or a weight

    def __init__(self, call: Call):
        record = Recorder(call.start.device)
        self.holder = None
        self.start = call.start.detach().clone(memory_format=torch.contiguous_format)
        static = lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad)  # noqa: E731
        self.args = pytree.tree_map_only(Tensor, static, call.problem.args)
        self.map = call.cell.copy(self.args[0])
        problem = replace(self.map.problem(call.problem.layout), args=self.args)
        with without_autocast(self.start.device.type, caches=False) as autocast:
            tail = problem.tail and (autocast(problem.tail[0]), problem.tail[1])
            self.problem = replace(problem, f=autocast(self.map), tail=tail, inputs=())
            with torch.no_grad():
                if call.op is None:
                    self.forward = _fused(record, self.problem, self.start, call.settings, self.problem.parts())
                else:
                    self.forward = self._by_cell(record, call.op.solve, call, call.settings)
            if torch.is_grad_enabled():
                self._backward(record, call)

    def _backward(self, record: Recorder, call: Call) -> None:
        self.z, self.u, self.g = (torch.zeros_like(self.start) for _ in range(3))
        self.point = record(lambda: setattr(self, "at", Point(self.problem, self.z)))
        used = {id(leaf): leaf for leaf in leaves_of(self.at.out)}
        places = {id(leaf): i for i, leaf in enumerate(pytree.tree_leaves(self.args))}
        weights = {id(t) for t in (*call.cell.cell.parameters(), *call.cell.cell.buffers())}
        for leaf in (leaf for key, leaf in used.items() if key not in weights and key not in places):
            raise Refused(
                f"graph=True, and the cell uses a tensor of shape {tuple(leaf.shape)} that is no parameter or "
                "input, which a replay would not see change. Pass it in x, or take graph=False"
            )
        self.inputs = tuple(t for t in leaves_that_require_grad(self.args, [*used.values()]) if id(t) in used)
        self.sources = tuple(places.get(id(tensor), tensor) for tensor in self.inputs)
        if not self.inputs:
            return
        with torch.no_grad():
            if call.backward_op is None:
                tail = (lambda u: (self.at.vjp(u), self.g), PLAIN)
                self.adjoint = _fused(record, lambda u: self.at.vjp(u) + self.g, self.g, call.backward, tail, True)
            else:
                self.adjoint = self._by_cell(record, call.backward_op.adjoint, call, call.backward, self.g)
            self.input_vjp = record(lambda: setattr(self, "grads", vjp(self.at.out, self.inputs, self.u)))

    def _by_cell(self, record: Recorder, make: Callable, call: Call, settings: Settings, g: Any = None) -> "_Solve":
        """Captures a solve by steps that evaluate the cell themselves; an adjoint one where g is given."""

        def operands() -> tuple[Tensor, ...]:
            whole: Any = self.map.problem(call.problem.layout).whole
            return whole.operands if g is None else whole.at(self.z)

        held, options = operands(), call.options(settings.tol) | (settings.solver.fused() or {})
        options |= {"relative": settings.relative, "scale": settings.scale}
        steps = make(*held, self.start if g is None else g, tol=settings.tol, max_steps=settings.max_steps, **options)

        def renew() -> None:
            for static, new in zip(held, operands(), strict=True):
                if static.data_ptr() != new.data_ptr():  # else it is a view of the static arguments
                    static.copy_(new)

        return _Solve(record, steps, self.start if g is None else None, settings, None, renew)

    def hold(self, owner: Any, args: tuple, masks: dict) -> None:
        """Copies in what a call provides; `owner` is a token, for this outlives the call."""
        with torch.no_grad():
            for static, given in zip(pytree.tree_leaves(self.args), pytree.tree_leaves(args), strict=True):
                if isinstance(static, Tensor):
                    static.detach().copy_(given)
            for module, (mask,) in self.map.held.masks.items():
                mask.copy_(masks[module][0])
        self.holder = owner

    def solve(self, call: Call) -> Outcome:
        self.hold(None, call.problem.args, call.cell.held.masks)
        self.start.copy_(call.start)
        return self.forward(call.settings.mask)


def _fused(
    record: Recorder, f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings, tail: Ended, autograd: bool = False
) -> "_Solve":
    """Captures a solve by fused steps."""
    op, why = plan_steps(settings.solver, z.device, z.shape[1], z.dtype)
    if op is None:
        raise Refused(f"graph=True needs a solver whose steps are fused: {why}")
    parts, steps = start(op, f, z, settings, tail)
    return _Solve(record, steps, z, settings, parts, lambda: None, autograd)


class _Solve:
    """A captured solve by these steps, from the static `z0` on, after `renew`; as `drive` takes them.

    Where `parts` calls autograd, there is no WHILE node: autograd runs each operation on the stream of its forward, and
    the body of the node is captured on another.
    """

    outcome: Any

    def __init__(
        self, record: Recorder, steps: Any, z0: Any, settings: Settings, parts: Any, renew: Work, autograd: bool = False
    ):
        chunk = -(-CHUNK // steps.period) * steps.period
        self.steps, self.chunks = steps, -(-settings.max_steps // chunk)
        going = torch.empty((), dtype=torch.bool, device=steps.count.device)

        def begin() -> None:
            renew()
            steps.reset(z0)
            steps.take(*(parts(steps.z) if parts else ()))
            evaluate(chunk - 1)

        def evaluate(times: int = chunk) -> None:
            for _ in range(times):
                z = steps.onward()
                steps.take(*(parts(z) if parts else ()))

        end: Work = lambda: setattr(self, "outcome", steps.finish())  # noqa: E731

        def look(before: Work) -> None:
            before()
            torch.gt(steps.count, 0, out=going)  # 0 after `limit` evaluations at the latest

        def whole() -> None:
            look(begin)
            record.repeat(going, lambda: look(evaluate))
            end()

        if record.repeats and not autograd:
            self.replay, self.how = record(whole), "one graph"
        else:
            self.begin, self.more, self.end = record(begin), record(evaluate), record(end)
            self.replay, self.how = self._by_chunks, f"graphs of {chunk} steps"

    def _by_chunks(self) -> None:
        self.begin()
        look = Look(self.steps.device, None)
        for _ in range(self.chunks - 1):
            if look(self.steps.left) == 0:
                break
            self.more()
        self.end()

    def __call__(self, mask: Tensor | None) -> Outcome:
        if mask is not None:
            self.steps.mask.copy_(mask)
        self.replay()
        value, status, steps, residual = (x.clone() for x in self.outcome)
        return Outcome(value, status, steps, residual, None, Route.GRAPH, self.how)


class CapturedPoint:
    """As `gradient.Point` at the solution of one call, by its captured graphs; first derivatives only."""

    out = None

    def __init__(self, captured: Captured, call: Call, z: Tensor):
        self.captured, self.z, self.mask, self.token = captured, z, call.settings.mask, object()
        self.masks, leaves = dict(call.cell.held.masks), pytree.tree_leaves(call.problem.args)
        self.args = pytree.tree_map_only(Tensor, Tensor.detach, call.problem.args)
        self.inputs = tuple(leaves[s] if isinstance(s, int) else s for s in captured.sources)
        self.differentiable = bool(self.inputs)

    def _hold(self) -> Captured:
        captured = self.captured
        if captured.holder is not self.token:
            captured.hold(self.token, self.args, self.masks)
            captured.z.copy_(self.z)
            captured.point()
        return captured

    def vjp(self, u: Tensor) -> Tensor:
        """Returns J' u."""
        return self._hold().at.vjp(u)

    def adjoint(self, g: Tensor) -> Outcome:
        """Returns the solution of u = J' u + g."""
        captured = self._hold()
        captured.g.copy_(g)
        return captured.adjoint(self.mask)

    def input_vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Returns (df/d input)' u for each input."""
        captured = self._hold()
        captured.u.copy_(u)
        captured.input_vjp()
        return tuple(grad.clone() for grad in captured.grads)

    def with_stand_ins(self) -> None:
        """Returns None: there are no second derivatives."""
