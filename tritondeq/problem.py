"""A fixed-point problem: the map, how its state lies in memory, and what is known of the map."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .cells import Cell
from .held import Held, computed, hooked, parts_of
from .kernels.dispatch import WholeSolve
from .kernels.tails import PARTS, PLAIN, Tail
from .layout import Layout, Ragged, pytree
from .solvers.splitting import Splitting

Parts = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """z = f(z, *args), and what is known of f.

    Attributes:
        f: Returns a state like z, or (state, aux) where `has_aux`.
        args: What f takes after z.
        layout: Of the state.
        whole: Kernels that hold f, for a whole solve or for each step.
        tail: (g, Tail) where f is that Tail of the parts that g(z, *args) returns, a tuple.
        splitting: f as solvers that split operators need it.
        inputs: The tensors that f depends on and that require grad; None: they have to be looked for.
        opaque: Whether a compiler has replaced f, so that operations in it can't be seen.
        stateless: Whether f is known to compute nothing at its first evaluation that it stores for later ones.
        modules: The modules that f calls, as far as is known.
        cell: The cell behind f, where solves may be captured as CUDA graphs.
    """

    f: Callable[..., Any]
    args: tuple
    layout: Layout
    whole: WholeSolve | None = None
    tail: tuple[Callable[..., tuple[Any, ...]], Tail] | None = None
    splitting: Splitting | None = None
    inputs: tuple[Tensor, ...] | None = None
    opaque: bool = False
    stateless: bool = False
    has_aux: bool = False
    modules: tuple[nn.Module, ...] = ()
    cell: "HeldCell | None" = None

    def __call__(self, flat: Tensor) -> Tensor:
        """Returns f(z) as [B, N], for z [B, N]; RuntimeError where f changes z."""
        layout = self.layout
        if not layout.single or self.has_aux or torch.compiler.is_dynamo_compiling():
            return layout.pack(self.evaluate(flat, self.args)[0])
        f, args = self.f, self.args
        if self.cell is f and self.cell.held.empty and not self.cell.kwargs:
            f, args = self.cell.evaluate, args[:1]
        version = flat._version
        out = f(flat.view_as(flat) if layout.flat else layout.unpack(flat), *args)
        if flat._version != version:
            raise RuntimeError(_CHANGED)
        return layout.pack(out)

    def evaluate(self, flat: Tensor, args: tuple) -> tuple[Any, Any]:
        """Returns (f(z, *args), aux or None) in the structure of z, for z [B, N]; RuntimeError where f changes z."""
        out = self._unchanged(self.f, flat, args)
        if not self.has_aux:
            return out, None
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(f"with has_aux=True, f must return (state, aux), got {type(out).__name__}")
        return out

    def split(self, solver: Any) -> Splitting:
        """Returns `splitting`, or raises ValueError where there is none for this solver."""
        if self.splitting is None:
            raise ValueError(f"solver {solver!r} needs a cell with a splitting, such as cells.Monotone, and no hooks")
        return self.splitting

    def parts(self) -> tuple[Parts, Tail]:
        """Returns `tail` as a map of [B, N]; a plain one where there is none, or where the state has no such rows."""
        before, tail = self.tail or (None, PLAIN)
        if before is None or not self.layout.has_rows(tail.features):
            return (lambda flat: (self.layout.pack(self.evaluate(flat, self.args)[0], cast=False),)), PLAIN

        def parts(flat: Tensor) -> tuple[Tensor, ...]:
            given = self._unchanged(before, flat, self.args)
            if not isinstance(given, tuple) or not len(tail.gains) < len(given) <= PARTS:
                got = len(given) if isinstance(given, tuple) else type(given).__name__
                raise ValueError(f"a tail takes a tuple of {len(tail.gains) + 1} to {PARTS} parts, got {got}")
            return tuple(self.layout.pack(part, cast=False) for part in given)

        return parts, tail

    def _unchanged(self, f: Callable[..., Any], flat: Tensor, args: tuple) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which reads no version counters: f gets a copy, and may change it
            return f(self.layout.unpack(flat.clone()), *args)
        state = self.layout.unpack(flat)
        leaves = pytree.tree_leaves(state)
        versions = [leaf._version for leaf in leaves]
        out = f(state, *args)
        if versions != [leaf._version for leaf in leaves]:
            raise RuntimeError(_CHANGED)
        return out


_CHANGED = (
    "f changes its state in place (an operation such as z.mul_(), z += ... or an activation with inplace=True, on the "
    "state that it is given): f must leave z as it is and return a new state"
)


_NONE: dict[str, Any] = {}


class HeldCell:
    """The map z, injection, weights -> cell(z, injection, **kwargs), with the same dropout masks at every call.

    Attributes:
        evaluate: The cell, or what a compiler made of it.
        cell: The module.
        held: Its masks and parametrized tensors.
        injection: What does not depend on z.
        kwargs: Further arguments of the cell, which are the map's last argument where there are any.
    """

    def __init__(
        self, evaluate: Callable, cell: nn.Module, inject: Callable[[], Any], kwargs: dict[str, Any] | None = None
    ):
        self.evaluate, self.cell, self.opaque = evaluate, cell, evaluate is not cell
        self.held, self.kwargs = Held(cell), kwargs or {}
        # functional_call lends others, until it returns
        parts = self.held.parts if torch.is_grad_enabled() else []
        self.parameters = [(part, name, p) for part in parts for name, p in part._parameters.items() if p is not None]
        for part in self.held.parts if isinstance(cell, Cell) else ():
            for hook in computed(part) if part._forward_pre_hooks else ():
                hook(part, ())  # inject may read what it computes, as the weight of another solve
        if self.held.empty:
            self.injection = inject()
        else:
            with self.held.on(self.held.weights):
                self.injection = inject()

    @property
    def args(self) -> tuple:
        """What the map takes after z."""
        return self.injection, self.held.weights, *([self.kwargs] if self.kwargs else ())

    def copy(self, injection: Any) -> "HeldCell":
        """Returns the map for another injection, with copies of the masks."""
        other = copy.copy(self)
        other.injection, other.held = injection, self.held.copy()
        return other

    def __call__(self, z: Any, injection: Any, weights: tuple[Tensor, ...], kwargs: dict[str, Any] = _NONE) -> Any:
        if self.held.empty:
            return self.evaluate(z, injection, **kwargs)
        drawn = self.held.drawn
        with self.held.on(weights):  # a compiled cell finds the masks and has no branch that draws them
            return (self.evaluate if drawn else self.cell)(z, injection, **kwargs)

    def as_it_was(self, z: Any, injection: Any, weights: tuple[Tensor, ...], kwargs: dict[str, Any] = _NONE) -> Any:
        """Returns the same with the parameters that the cell had when the solve began, with gradients."""
        if parts_of((self.cell,)) != self.held.parts:
            raise RuntimeError("second derivatives need the modules of the forward pass, and the cell's have changed")
        if all(part._parameters.get(name) is parameter for part, name, parameter in self.parameters):
            return self(z, injection, weights, kwargs)
        path = {part: f"{path}." if path else "" for path, part in self.cell.named_modules()}
        names = {parameter: path[part] + name for part, name, parameter in self.parameters}  # one where some are tied
        lent: dict[str, Tensor] = {name: parameter for parameter, name in names.items()}
        with self.held.on(weights):
            return torch.func.functional_call(self.cell, lent, (z, injection), kwargs)

    def problem(self, layout: Layout, **known: Any) -> Problem:
        """Returns the problem, with what the cell declares of its forward."""
        if not isinstance(self.cell, Cell) or isinstance(layout, Ragged):
            return Problem(self, self.args, layout, opaque=self.opaque, cell=self, **known)
        tail = None if self.opaque else self._declared("tail")
        return Problem(
            *(self, self.args, layout, self._declared("whole_solve"), tail and (self._with_held(tail[0]), tail[1])),
            self._declared("splitting"),
            opaque=self.opaque,
            stateless=parametrize.type_before_parametrizations(self.cell).__module__.startswith(_OURS),
            cell=self,
            **known,
        )

    def _with_held(self, parts: Callable) -> Callable:
        def held(z: Any, injection: Any, weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
            with self.held.on(weights):
                return parts(z, injection)

        return held

    def _declared(self, name: str) -> Any:
        """Returns what the cell declares; None where its forward is another: a subclass or a hook has changed it."""
        known = "forward" not in vars(self.cell) and not hooked(self.cell)
        known = known and _is_about(type(self.cell), name)  # type: ignore[arg-type]  # a class has a hash
        return getattr(self.cell, name)(self.injection) if known else None


_OURS = Cell.__module__.rpartition(".")[0]


@functools.cache
def _is_about(kind: type[Cell], name: str) -> bool:
    """Returns whether the method of that name is of the class that defines `forward`, or of one that came after it."""
    depth = [next(i for i, c in enumerate(kind.__mro__) if n in vars(c)) for n in (name, "forward")]
    return depth[0] <= depth[1]


def modules_of(f: Any) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """Returns the modules that a callable reaches, and those that it may call, as far as its code shows.

    It reaches those in its closure, globals, arguments and object, and in these of the functions there that are of the
    same file. Of a module whose parts it names, as `self.block(z)` does, it may call these parts.
    """
    found: dict[int, Any] = {}
    names: set[str] = set()
    stack: list[Any] = [f]
    while stack:
        part = stack.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        if isinstance(part, functools.partial):
            stack += [part.func, *part.args, *part.keywords.values()]
        elif inspect.ismethod(part):
            stack += [part.__self__, part.__func__]
        elif isinstance(part, list | tuple):
            stack += [leaf for leaf in part if isinstance(leaf, nn.Module)]
        elif inspect.isfunction(part):
            names.update(part.__code__.co_names)
            for cell in part.__closure__ or ():
                with contextlib.suppress(ValueError):  # a variable that is not bound yet
                    stack.append(cell.cell_contents)
            others = [part.__globals__.get(name) for name in part.__code__.co_names]
            stack += [x for x in others if not inspect.isroutine(x) or x.__module__ == part.__module__]
    modules = [part for part in found.values() if isinstance(part, nn.Module)]
    called = [[m._modules[name] for name in names if m._modules.get(name)] or [m] for m in modules]
    return tuple(modules), tuple(sum(called, []))  # type: ignore[arg-type]


def leaves_that_require_grad(tree: Any, more: Iterable[Tensor] = ()) -> tuple[Tensor, ...]:
    """Returns the tensors of a tree, and more, that require grad, each once."""
    leaves = (*pytree.tree_leaves(tree), *more)
    return tuple({id(t): t for t in leaves if isinstance(t, Tensor) and t.requires_grad}.values())
