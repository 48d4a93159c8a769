"""f at one point, with its derivatives: a closure as a function of every tensor it uses.

A `TorchFunctionMode` around one evaluation of f sees each tensor that f uses and did not make, and replaces it by a
detached stand-in. The autograd graph that results ends at the state and the stand-ins, so it can be differentiated
again and again without touching, or being freed by, the graph around it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .layout import Layout, pytree


class _StandIns(TorchFunctionMode):
    """Replaces each tensor that requires grad and comes from outside: a leaf, or made before the state."""

    def __init__(self, state: list[Tensor]):
        super().__init__()
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._oldest = min(tensor.grad_fn._sequence_nr() for tensor in state if tensor.grad_fn is not None)

    def swap(self, tensor: Tensor) -> Tensor:
        inside = tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= self._oldest
        if inside or not tensor.requires_grad or id(tensor) in self._made:
            return tensor
        if id(tensor) not in self.pairs:
            stand_in = tensor.detach().requires_grad_()
            self._made.add(id(stand_in))
            self.pairs[id(tensor)] = (tensor, stand_in)
        return self.pairs[id(tensor)][1]

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.swap, (args, kwargs or {}))
        return func(*args, **kwargs)


class Linearised:
    """f at z, with J = df/dz and its derivatives by all that f depends on, from one evaluation.

    Attributes:
        inputs: The tensors that f captured and that require grad; explicit inputs where f is differentiated.
        differentiable: Whether anything outside f can have a gradient.
        seen_through: Whether all of them could be replaced by stand-ins. Where not (a compiled cell, a custom
            autograd.Function), the leaves behind f are the inputs, and only first derivatives can be taken.
    """

    def __init__(self, f: Callable[..., Any], layout: Layout, z: Tensor, args: tuple):
        with torch.enable_grad():
            self.z = z.detach().requires_grad_()
            state = layout.unpack(self.z)
            mode = _StandIns(pytree.tree_leaves(state))
            args = pytree.tree_map_only(Tensor, mode.swap, args)
            # a compiler drops the mode or fails at it, and what it compiled is not seen through anyway
            with contextlib.nullcontext() if getattr(f, "opaque", False) else mode:
                out = layout.pack(f(state, *args))
                self.out = out.view(out.shape)  # seen by the mode even where f returns a tensor that it captured
        if torch.is_autocast_enabled(z.device.type):
            torch.clear_autocast_cache()  # it holds casts of the stand-ins
        pairs = list(mode.pairs.values())
        known = {id(self.z), *(id(stand_in) for _, stand_in in pairs)}
        hidden = [leaf for leaf in _leaves(self.out) if id(leaf) not in known]
        self.seen_through = not hidden
        self.inputs = (*(tensor for tensor, _ in pairs), *hidden)
        self._points = (*(stand_in for _, stand_in in pairs), *hidden)
        self.differentiable = self.out.requires_grad and bool(self.inputs)
        self._tangent: tuple[Tensor, Tensor] | None = None

    def vjp(self, u: Tensor) -> Tensor:
        """Returns J' u."""
        return _grad(self.out, (self.z,), u)[0]

    def jvp(self, w: Tensor) -> Tensor:
        """Returns J w, by differentiating J' v by v."""
        if self._tangent is None:
            v = torch.zeros_like(self.out, requires_grad=True)
            with torch.enable_grad():
                self._tangent = v, _grad(self.out, (self.z,), v, create_graph=True)[0]
        v, product = self._tangent
        return _grad(product, (v,), w)[0]

    def input_vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Returns (df/d input)' u for each input."""
        return _grad(self.out, self._points, u)

    def bilinear(self, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """Returns the derivatives of u' J w by z and by each input."""
        with torch.enable_grad():
            product = _grad(self.out, (self.z,), u, create_graph=True)[0]
        return _grad(product, (self.z, *self._points), w)

    def input_bilinear(self, u: Tensor, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Returns the derivatives of sum_i <input_vjp(u)_i, cotangent_i> by u, by z and by each input."""
        with torch.enable_grad():
            v = u.detach().requires_grad_()
            products = _grad(self.out, self._points, v, create_graph=True)
            total: Any = sum((p * c).sum() for p, c in zip(products, cotangents, strict=True) if c is not None)
        return _grad(total, (v, self.z, *self._points), torch.ones_like(total))

    def require_seen_through(self) -> None:
        """Raises RuntimeError where second derivatives can't be taken."""
        if not self.seen_through:
            raise RuntimeError(
                "second derivatives need every tensor f uses to pass through a torch function, and here some did not "
                "(a compiled cell, or a custom autograd.Function): use the uncompiled cell, or Unrolled(steps)"
            )


def _grad(out: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    if not out.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(out, inputs, cotangent, **options)


def _leaves(out: Tensor) -> list[Tensor]:
    """Returns the leaf tensors at which the autograd graph of `out` ends."""
    stack: list[Any] = [out.grad_fn]
    leaves, seen = [], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves
