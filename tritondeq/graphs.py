"""Solves captured as CUDA graphs, `DEQ(..., graph=True)`: the host replays chunks of steps and launches nothing else.

For each shape of everything that goes in, a solve is captured once, on memory of its own: `begin` (from the start, a
chunk of evaluations), `more` (another chunk) and `end` (best iterate, outcome); for gradients the cell at z* under
autograd, the same three of the adjoint solve on it, and the pull to the inputs. From torch 2.14 on, the three are one
graph with a conditional WHILE node around `more`, so that a whole solve is one replay and the host waits for nothing. A
call copies its start, injection and dropout masks there and replays. Parameters are read where they lie, so an
optimizer may update them in place.

The captures share memory, so a forward replay may overwrite what the cell at z* has saved: whoever differentiates it
replays it first, unless nothing came between (`Captured.holder`).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .capture import Linearised
from .kernels.dispatch import CellOp
from .kernels.tails import PLAIN
from .layout import Layout, describe
from .loop import Look, Settings, flat_tail, keep_autocast, plan_steps, split_tail
from .recorder import Recorder, Work, can_record
from .solution import Solution

CHUNK = 3  # evaluations at least; a chunk has whole periods of kernels/steps.py, so that it finds buffers in place
CACHE = 8  # solves a layer keeps


@dataclass
class Call:
    """What one call brings along, and a captured solve copies.

    Args:
        f: Its map: f(state, *args), with `cell`, `masks`, `twin`, `opaque` and `whole_solve` as deq.py has them.
        start: [B, N].
        args: Further arguments of f: its injection.
        settings, backward: Of the two solves.
        options: Arguments of ops that hold the cell, for a tolerance.
        op, backward_op: Such ops, where they take the two solves.
    """

    f: Any
    layout: Layout
    start: Tensor
    args: tuple
    settings: Settings
    backward: Settings
    options: Callable[[float], dict[str, Any]] | None = None
    op: CellOp | None = None
    backward_op: CellOp | None = None

    def key(self) -> tuple:
        """All that a captured solve depends on beside the numbers in its tensors."""
        leaves, spec = pytree.tree_flatten(self.args)
        kind = self.start.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        cell = self.f.cell
        weights = tuple((t.data_ptr(), t.requires_grad) for t in (*cell.parameters(), *cell.buffers()))
        plans = tuple((s.solver, s.tol, s.max_steps) for s in (self.settings, self.backward))
        layout = self.layout
        shape = layout.spec, layout.batch, *map(tuple, (layout.shapes, layout.dtypes, layout.channels_last))
        training = tuple(module.training for module in cell.modules())
        return (
            *(spec, tuple(map(_describe, leaves)), shape, self.start.device, self.settings.keep is not None),
            *(plans, autocast, weights, training, torch.is_grad_enabled(), id(self.f.evaluate)),
            *(self.op, self.backward_op),
        )


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    try:
        hash(leaf)
    except TypeError as error:
        raise TypeError(
            f"graph=True keeps a solve for each value that is not a tensor, so x may not hold {describe(leaf)}"
        ) from error
    return leaf


class Graphs:
    """The captured solves of one layer, the CACHE used last."""

    def __init__(self):
        self.solves: OrderedDict[tuple, Captured] = OrderedDict()

    def find(self, call: Call) -> "tuple[Captured | None, str]":
        """(the solve captured for such calls, how it is done), or (None, why there is none).

        Raises:
            RuntimeError: the cell can't be captured, or uses tensors that are not its own and not its input.
            TypeError: x holds something that is neither a tensor nor hashable.
        """
        device = call.start.device
        if not can_record(device):
            return None, f"graphs are for CUDA, outside of other graphs, and tensors are on {device.type}"
        op, how = call.op, call.op.says if call.op else ""
        if op is None:
            op, how = plan_steps(call.settings.solver, device, call.layout.width, call.layout.dtype)
        if op is None or not call.layout.batch:
            return None, f"no graph: {how}"
        if not call.f.masks.drawn:
            with torch.no_grad():
                call.f(call.layout.unpack(call.start), *call.args)
        key = call.key()
        if key not in self.solves:
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
        captured = self.solves[key]
        return captured, f"{captured.forward.says}, {how}"


class Refused(RuntimeError):
    pass


class Captured:
    """One captured solve, forward and, where gradients are wanted, backward."""

    def __init__(self, call: Call):
        record = Recorder(call.start.device)
        self.layout, self.map = call.layout, call.f.twin()
        self.start = call.start.detach().clone(memory_format=torch.contiguous_format)
        self.args = pytree.tree_map_only(Tensor, _static, call.args)
        self.map.injection = self.args[0]
        self.holder: Any = None
        at_home, outside = keep_autocast(self.map, self.start.device.type, caches=False)
        parts, tail = flat_tail(self.map, self.layout, self.args)
        parts, _ = keep_autocast(parts, self.start.device.type, caches=False)

        def apply(flat: Tensor) -> Tensor:
            return self.layout.pack(at_home(self.layout.unpack(flat), *self.args))

        with outside:
            with torch.no_grad():
                if call.op is None:
                    settings = replace(call.settings, tail=(parts, tail))
                    self.forward = _Solve(record, apply, self.start, settings)
                else:
                    self.forward = self._by_cell(record, call.op.solve, call, call.settings)
            self.differentiable = False
            if torch.is_grad_enabled():
                at_home.opaque = self.map.opaque
                self._backward(record, at_home, call)

    def _backward(self, record: Recorder, f: Callable, call: Call) -> None:
        self.z, self.u, self.g = (torch.zeros_like(self.start) for _ in range(3))

        def point() -> None:
            self.at = Linearised(f, self.layout, self.z, self.args)

        def pull() -> None:
            self.grads = self.at.pull(self.u)

        self.point = record(point)
        self.differentiable = self.at.differentiable
        if not self.differentiable:
            return
        own = {id(leaf): i for i, leaf in enumerate(pytree.tree_leaves(self.args))}
        weights = {id(t) for t in (*call.f.cell.parameters(), *call.f.cell.buffers())}
        self.sources = [own.get(id(tensor), tensor) for tensor in self.at.inputs]  # a place in args, or a weight
        strange = [s for s in self.sources if isinstance(s, Tensor) and id(s) not in weights]
        if strange:
            raise Refused(
                f"graph=True, and the cell uses a tensor of shape {tuple(strange[0].shape)} that requires grad and is "
                "neither its parameter nor its input: a replay would not see it change. Hand it in with x, or take "
                "graph=False"
            )
        with torch.no_grad():
            if call.backward_op is None:
                settings = replace(call.backward, tail=(lambda u: (self.at.vjp(u), self.g), PLAIN))
                self.adjoint = _Solve(record, lambda u: self.at.vjp(u) + self.g, self.g, settings)
            else:
                self.adjoint = self._by_cell(record, call.backward_op.adjoint, call, call.backward, adjoint=True)
            self.pull = record(pull)

    def _by_cell(self, record: Recorder, make: Callable, call: Call, settings: Settings, adjoint: bool = False):
        """A captured solve by steps that evaluate the cell themselves."""

        def operands() -> tuple[Tensor, ...]:
            whole = self.map.whole_solve
            return whole.at(self.z) if adjoint else whole.operands

        held = operands()
        options = call.options(settings.tol) | settings.solver.fused()
        start = self.g if adjoint else self.start
        steps = make(*held, start, tol=settings.tol, max_steps=settings.max_steps, **options)

        def renew() -> None:
            for mine, new in zip(held, operands(), strict=True):
                if mine.data_ptr() != new.data_ptr():  # else it is a view of the static arguments
                    mine.copy_(new)

        return _Solve(record, None, None if adjoint else self.start, settings, steps, renew)

    def hold(self, owner: Any, args: tuple, masks: Any) -> None:
        """Copies in what a call brought along; `owner` is a token, for this outlives the call."""
        pairs = zip(pytree.tree_leaves(self.args), pytree.tree_leaves(args), strict=True)
        with torch.no_grad():
            for mine, theirs in pairs:
                if isinstance(mine, Tensor):
                    mine.detach().copy_(theirs)
            for module, mask in self.map.masks.masks.items():
                mask.copy_(masks[module])
        self.holder = owner

    def solve(self, call: Call) -> tuple[Tensor, Solution]:
        self.hold(None, call.args, call.f.masks.masks)
        self.start.copy_(call.start)
        return self.forward(call.settings.keep)


class _Solve:
    """A captured solve of z = f(z), from the static `start` on; or by `steps` that evaluate the cell themselves, after
    `renew` has brought what they read up to date."""

    def __init__(
        self,
        record: Recorder,
        f: Callable[[Tensor], Tensor] | None,
        start: Tensor | None,
        settings: Settings,
        steps: Any = None,
        renew: Work | None = None,
    ):
        if steps is None:
            op, why = plan_steps(settings.solver, start.device, start.shape[1], start.dtype)
            if op is None:
                raise Refused(f"graph=True needs a solver whose steps are fused: {why}")
            f, tail = split_tail(f, settings, start)
            steps = op.start(start, settings.keep, settings.tol, settings.max_steps, tail, **asdict(settings.solver))
        chunk = -(-CHUNK // steps.period) * steps.period
        self.steps, self.most = steps, -(-settings.max_steps // chunk)

        def begin() -> None:
            if renew is not None:
                renew()
            steps.reset(start)
            steps.take(*(f(steps.z) if f else ()))
            evaluate(chunk - 1)

        def evaluate(times: int = chunk) -> None:
            for _ in range(times):
                z = steps.onward()
                steps.take(*(f(z) if f else ()))

        def end() -> None:
            self.outcome = steps.finish()

        def whole() -> None:
            begin()
            torch.gt(steps.count, 0, out=going)
            record.repeat(going, more)
            end()

        def more() -> None:
            evaluate()
            torch.gt(steps.count, 0, out=going)  # 0 after `limit` evaluations at the latest

        going = torch.empty((), dtype=torch.bool, device=steps.count.device)
        if record.repeats:
            self.replay, self.says = record(whole), "one graph"
        else:
            self.begin, self.more, self.end = record(begin), record(evaluate), record(end)
            self.replay, self.says = self._by_chunks, f"graphs of {chunk} steps"

    def _by_chunks(self) -> None:
        self.begin()
        look = Look(self.steps.rel.device, None, every=1)
        for _ in range(self.most - 1):
            if look(self.steps.left) == 0:
                break
            self.more()
        self.end()

    def __call__(self, keep: Tensor | None) -> tuple[Tensor, Solution]:
        if keep is not None:
            self.steps.mask.copy_(keep)
        self.replay()
        value, status, count, residual = (x.clone() for x in self.outcome)
        return value, Solution(None, status, count, residual)


class CapturedPoint:
    """The cell at the solution of one call: what `Linearised` is where nothing is captured."""

    seen_through = False

    def __init__(self, captured: Captured, call: Call, z: Tensor):
        self.captured, self.z, self.keep, self.token = captured, z, call.settings.keep, object()
        self.masks, leaves = dict(call.f.masks.masks), pytree.tree_leaves(call.args)
        self.args = pytree.tree_map_only(Tensor, Tensor.detach, call.args)
        sources = captured.sources if captured.differentiable else []
        self.inputs = tuple(leaves[s] if isinstance(s, int) else s for s in sources)
        self.differentiable = captured.differentiable

    def _hold(self) -> Captured:
        captured = self.captured
        if captured.holder is not self.token:
            captured.hold(self.token, self.args, self.masks)
            captured.z.copy_(self.z)
            captured.point()
        return captured

    def vjp(self, u: Tensor) -> Tensor:
        return self._hold().at.vjp(u)

    def adjoint(self, g: Tensor) -> tuple[Tensor, Solution]:
        captured = self._hold()
        captured.g.copy_(g)
        return captured.adjoint(self.keep)

    def pull(self, u: Tensor) -> tuple[Tensor, ...]:
        captured = self._hold()
        captured.u.copy_(u)
        captured.pull()
        return tuple(grad.clone() for grad in captured.grads)

    def require_seen_through(self) -> None:
        raise RuntimeError("second derivatives need graph=False")


def _static(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)
