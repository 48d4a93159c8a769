"""f at one point as a function of every tensor that it depends on, for second derivatives.

A `TorchFunctionMode` around one evaluation of f replaces each of those tensors by a detached stand-in. The autograd
graph that results ends at the state and the stand-ins, so it can be differentiated again and again without touching,
or being freed by, the graph around it.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .layout import pytree
from .problem import Problem

_thread = threading.local()  # `swap`: of the evaluation with stand-ins that is going on in this thread


class _StandIns(TorchFunctionMode):
    """Replaces these tensors wherever an operation takes them."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        super().__init__()
        self.points = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        self._points = {id(tensor): point for tensor, point in zip(tensors, self.points, strict=True)}

    def swap(self, tensor: Tensor) -> Tensor:
        return self._points.get(id(tensor), tensor)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.swap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __enter__(self) -> "_StandIns":
        self._before, _thread.swap = getattr(_thread, "swap", None), self.swap
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.swap = self._before
        super().__exit__(*error)


def stand_in(tensor: Tensor) -> Tensor:
    """Returns the stand-in of a tensor where this thread evaluates an outer map with stand-ins, else the tensor."""
    swap = getattr(_thread, "swap", None)
    return tensor if swap is None else swap(tensor)


class Linearised:
    """f at z, with J = df/dz and its derivatives by `inputs`, from one evaluation with stand-ins.

    Attributes:
        hidden: The leaves that f depends on beside z and the inputs, where some pass through no torch function (in a
            custom autograd.Function, or compiled) or are no inputs.
    """

    def __init__(self, problem: Problem, z: Tensor, inputs: tuple[Tensor, ...]):
        mode = _StandIns(inputs)
        with torch.enable_grad():
            self.z = state(z)
            args = pytree.tree_map_only(Tensor, mode.swap, problem.args)
            with mode:
                image = problem.evaluate(self.z, args)[0]
                # a torch function, so that the mode sees it even where f returns one of the inputs
                self.out = problem.layout.pack(pytree.tree_map_only(Tensor, lambda x: x.view(x.shape), image))
        if torch.is_autocast_enabled(z.device.type):
            torch.clear_autocast_cache()  # it holds casts of the stand-ins
        self._points = mode.points
        known = {*map(id, mode.points)}
        self.hidden = [leaf for leaf in leaves_of(self.out) if id(leaf) not in known]
        self._tangent: tuple[Tensor, Tensor] | None = None

    def vjp(self, u: Tensor) -> Tensor:
        """Returns J' u."""
        return vjp(self.out, (self.z,), u)[0]

    def jvp(self, w: Tensor) -> Tensor:
        """Returns J w, by differentiating J' v by v."""
        if self._tangent is None:
            v = torch.zeros_like(self.out, requires_grad=True)
            with torch.enable_grad():
                self._tangent = v, vjp(self.out, (self.z,), v, create_graph=True)[0]
        v, product = self._tangent
        return vjp(product, (v,), w)[0]

    def input_vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Returns (df/d input)' u for each input."""
        return vjp(self.out, self._points, u)

    def bilinear(self, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """Returns the derivatives of u' J w by z and by each input."""
        with torch.enable_grad():
            product = vjp(self.out, (self.z,), u, create_graph=True)[0]
        return vjp(product, (self.z, *self._points), w)

    def input_bilinear(self, u: Tensor, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Returns the derivatives of sum_i <input_vjp(u)_i, cotangent_i> by u, by z and by each input."""
        with torch.enable_grad():
            v = u.detach().requires_grad_()
            products = vjp(self.out, self._points, v, create_graph=True)
            total: Any = sum((p * c).sum() for p, c in zip(products, cotangents, strict=True) if c is not None)
        return vjp(total, (v, self.z, *self._points), torch.ones_like(total))


def vjp(out: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Returns the vector-Jacobian product for each input, zeros where `out` does not depend on it; keeps the graph."""
    if not out.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(out, inputs, cotangent, **options)


def nodes_of(out: Tensor, inputs: tuple[Tensor, ...] = ()) -> set[Any]:
    """Returns the nodes of the autograd graph of `out`, down to those that made the inputs."""
    stack: list[Any] = [out.grad_fn]
    seen, made = set(), {tensor.grad_fn for tensor in inputs}
    while stack:
        node = stack.pop()
        if node is not None and node not in seen and node not in made:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return seen


def leaves_of(out: Tensor) -> list[Tensor]:
    """Returns the leaf tensors at which the autograd graph of `out` ends, but for the states of solves."""
    if out.grad_fn is None:
        return [out] if out.requires_grad else []
    leaves = [node.variable for node in nodes_of(out) if node.name() == "torch::autograd::AccumulateGrad"]
    return [leaf for leaf in leaves if not hasattr(leaf, "is_state")]


def state(z: Tensor) -> Tensor:
    """Returns z as a leaf at which an evaluation of f begins."""
    leaf: Any = z.detach().requires_grad_()
    leaf.is_state = True
    leaf.register_post_accumulate_grad_hook(_drop)
    return leaf


def _drop(leaf: Tensor) -> None:
    """Drops J' u, which autograd leaves there at the end of a backward pass."""
    leaf.grad = None
