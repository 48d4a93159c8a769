"""How a gradient is attached to a solution: by the last evaluation of f, on autograd's graph.

y = f(z) is evaluated once at the solution z*, with z a fresh leaf and everything else as it is. A Function of y has z*
as its value. Its backward solves u = J' u + g by products with that graph and returns u for y, and autograd carries u
on, to parameters and inputs, through hooks and solves within f. Nothing that it needs lies in a thread.

Only where a graph is made of the backward pass, the tensors that f depends on are needed as inputs of the Function:
then f is evaluated once more, with stand-ins for them (capture.py), and second derivatives take further solves.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .adjoints import Adjoint, BackwardSolves
from .capture import Linearised, leaves_of, nodes_of, stand_in, state, vjp
from .kernels import dispatch
from .layout import pytree
from .problem import Problem

CHANGE = 1e-2  # of f(z), relative: above what rounding in bfloat16 and atomic sums may do


class _Recorder(TorchFunctionMode):
    """Notes the tensors that require grad and that f takes from outside: the inputs of a map whose are not known."""

    def __init__(self, made: Any):
        super().__init__()
        self._made = {id(leaf) for leaf in pytree.tree_leaves(made)}
        self.inputs: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is None:  # transforms wrap tensors, and the wrappers die
            for leaf in _tensors(args, kwargs):
                if leaf.requires_grad and id(leaf) not in self._made:
                    self.inputs[id(leaf)] = leaf
        out = func(*args, **kwargs)
        self._made.update(map(id, _tensors(out)))
        return out


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


class Point:
    """f at the solution z [B, N], on autograd's graph.

    Attributes:
        z: The leaf.
        out: f(z), [B, N].
        inputs: The tensors that f depends on and that require grad, as far as they are known or could be seen.
        differentiable: Whether anything but z can have a gradient.

    Args:
        products: Whether `vjp` will be asked for. If not, backward passes don't make J' u either.
    """

    def __init__(self, problem: Problem, z: Tensor, products: bool = True):
        self.problem, self.z = problem, state(z) if products else z.detach()
        kind = z.device.type
        self._backend = dispatch.chosen()
        self._autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.enable_grad():
            recorder = _Recorder((self.z, problem.args)) if problem.inputs is None else None
            with recorder or contextlib.nullcontext():
                self.out = _evaluated(problem, self.z)
        if recorder:
            arguments = {id(leaf): leaf for leaf in _tensors(problem.args) if leaf.requires_grad}
            self.inputs = tuple((arguments | recorder.inputs).values())
        else:
            self.inputs = problem.inputs or ()
        self.differentiable = self.out.requires_grad and (bool(self.inputs) or bool(leaves_of(self.out)))

    def vjp(self, u: Tensor) -> Tensor:
        """Returns J' u."""
        return vjp(self.out, (self.z,), u)[0]

    def refuse_reentrant_checkpoints(self) -> None:
        """Raises RuntimeError where f uses one, which without products with J gives no gradient, in silence."""
        if any("CheckpointFunctionBackward" in node.name() for node in nodes_of(self.out, self.inputs)):
            raise RuntimeError(
                "f uses a checkpoint with use_reentrant=True, whose weights may get no gradient: use_reentrant=False"
            )

    def with_stand_ins(self) -> Linearised | None:
        """Returns f at z for second derivatives, or None where some tensor that f depends on can't be seen."""
        if self.problem.opaque:
            return None
        kind, enabled, dtype = self._autocast
        problem = replace(self.problem, f=self.problem.cell.as_it_was) if self.problem.cell else self.problem
        with torch.autocast(kind, dtype=dtype, enabled=enabled), dispatch.backend(self._backend):
            at = Linearised(problem, self.z, self.inputs)
        change = torch.linalg.vector_norm(at.out.detach() - self.out.detach())
        if change > CHANGE * torch.linalg.vector_norm(self.out.detach()):
            raise RuntimeError(
                "second derivatives evaluate f once more, and its value has changed since the forward pass: weights "
                "were changed in the meantime, or it is not a function of its state"
            )
        return None if at.hidden else at


def _evaluated(problem: Problem, z: Tensor) -> Tensor:
    """Returns f(z), whose graph keeps what it saves where a checkpoint around the solve would not: products need it."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(False) is None:
        return problem(z)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return problem(z)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # which transforms of torch.func in f refuse
            raise
        return problem(z)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    saved = tensor.detach()  # an output of its node, saved as it is, would be a cycle that nothing collects
    return saved, saved._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:
        raise RuntimeError("a tensor that the evaluation of f at the solution needs was changed in place since then")
    return saved


def attach(adjoint: Adjoint, at: Any, z: Tensor, solves: BackwardSolves) -> Tensor:
    """Returns z [B, N] with the gradient that the adjoint takes at this `Point`, or `cuda_graphs.CapturedPoint`."""
    if not adjoint.products and isinstance(at, Point):
        at.refuse_reentrant_checkpoints()
    inputs = tuple(stand_in(tensor) for tensor in at.inputs if not hasattr(tensor, "device_mesh"))
    return _Attached.apply(adjoint, at, solves, z, at.out, *inputs)


class _Attached(torch.autograd.Function):
    """z; its backward is the adjoint's u for y = f(z), or (df/d input)' u for the inputs, each a Function of them."""

    @staticmethod
    def forward(
        ctx: Any, adjoint: Adjoint, at: Any, solves: BackwardSolves, z: Tensor, y: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.adjoint, ctx.at, ctx.solves = adjoint, at, solves
        value = z.clone()
        ctx.save_for_backward(value, *inputs)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        adjoint, at, solves = ctx.adjoint, ctx.at, ctx.solves
        graph = torch.is_grad_enabled()
        if graph and adjoint.exact and (linear := at.with_stand_ins()) is not None:
            z, *inputs = ctx.saved_tensors
            u = _Adjoint.apply(linear, solves, g, z, *inputs)
            return None, None, None, None, None, *_InputVjp.apply(linear, u, z, *inputs)
        with torch.no_grad():
            u = adjoint.cotangent(at, g, solves)
            grads = (u,) if at.out is not None else at.input_vjp(u)
        if graph:
            grads = _Refused.apply(
                _NOT_SEEN if adjoint.exact else _approximate(adjoint), len(grads), *grads, g, *ctx.saved_tensors[:1]
            )
        if at.out is None:
            return None, None, None, None, None, *grads
        return None, None, None, None, grads[0], *(None for _ in ctx.needs_input_grad[5:])


_NOT_SEEN = (
    "second derivatives need every tensor that f uses to be one of its arguments, a parameter of its cell or captured "
    "by the function, and to pass through a torch function; here some did not (a compiled or captured cell, a sharded "
    "one, or a custom autograd.Function): use the plain cell with graph=False, or Unrolled(steps)"
)
_NO_THIRD = (
    "Implicit() is twice differentiable, and this is a third derivative, or one by the cotangent of a second (as hvp "
    "takes; vhp does not): use Unrolled(steps)"
)


def _approximate(adjoint: Adjoint) -> str:
    return (
        f"the gradient of {type(adjoint).__name__} is an approximation whose derivative would be wrong: "
        "for second derivatives use Implicit(), or Unrolled(steps)"
    )


class _Adjoint(torch.autograd.Function):
    """u = J' u + g as a function of g, z and the inputs: g gets v = J v + du, z and the inputs d(u' J v)."""

    @staticmethod
    def forward(ctx: Any, at: Linearised, solves: BackwardSolves, g: Tensor, z: Tensor, *inputs: Tensor) -> Any:
        ctx.at, ctx.solves = at, solves
        u = solves.adjoint(at, g)
        ctx.save_for_backward(u, z)
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Any:
        u, z = ctx.saved_tensors
        with torch.no_grad():
            v = ctx.solves.tangent(ctx.at, du)
            grads = (v, *ctx.at.bilinear(u, v))
        return None, None, *_no_third(grads, z, u, du)


class _InputVjp(torch.autograd.Function):
    """(df/d input)' u as a function of u, z and the inputs."""

    @staticmethod
    def forward(ctx: Any, at: Linearised, u: Tensor, z: Tensor, *inputs: Tensor) -> Any:
        ctx.at = at
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, z)
        return at.input_vjp(u)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        u, z = ctx.saved_tensors
        if all(c is None for c in cotangents):
            return None, *(None for _ in range(2 + len(cotangents)))
        with torch.no_grad():
            grads = ctx.at.input_bilinear(u, cotangents)
        return None, *_no_third(grads, z, u, *(c for c in cotangents if c is not None))


def _no_third(grads: tuple[Tensor, ...], *made_of: Tensor) -> tuple[Tensor, ...]:
    """Returns `grads`, and if a graph is being made, such that differentiating them raises."""
    return _Refused.apply(_NO_THIRD, len(grads), *grads, *made_of) if torch.is_grad_enabled() else grads


class _Refused(torch.autograd.Function):
    """Identity of the first tensors, as functions of the others; its derivative raises."""

    @staticmethod
    def forward(ctx: Any, why: str, count: int, *tensors: Tensor) -> Any:
        ctx.why = why
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.why)
