"""A stack of residual blocks as an equilibrium of one of them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..cells import Cell
from ..deq import DEQ
from ..dropout import FixedDropout
from ..layout import describe
from ..solvers import Picard, Solver
from ..solvers.base import count, number
from .blocks import BATCH_NORM, convolves, leading_dims, one_block, refuse_batch_norm

_NORMS = ("outer", "tokens", "sample")
_EPS = 1e-12  # of mean squares; embeddings at initialisation have some of 1e-4
_CACHED = ("DynamicLayer", "DynamicSlidingWindowLayer")  # of transformers: they replace their tensors


def to_equilibrium(
    stack: nn.Sequential | nn.ModuleList,
    *,
    cell: str | nn.Module = "mean",
    prelude: int = 0,
    coda: int = 0,
    injection: str | nn.Module = "add",
    norm: str | nn.Module | None = "outer",
    gain: float = 1.0,
    batch_norm: str | None = None,
    unroll: int | None = None,
    **options: Any,
) -> "EquilibriumStack":
    """A stack of residual blocks of one shape, with all but the first and last few replaced by one equilibrium layer.

    With F one block, x what enters the layer, r = rms(x) for each token (for an image: for each sample):

        z* = N(x + gain (F(y) - y)),   y = (x + z*) / 2,   N(v) = r v / rms(v)

    This is the implicit midpoint rule for the residual flow dh/dt = F(h) - h that the stack takes n explicit steps of;
    `gain` is the step, in blocks. A block by itself has no fixed point: its skip path is the identity, and z + g(z)
    only grows. Here z enters through the block's increment alone, and N bounds the state: whatever continuous F is, N
    maps a ball into itself, so an equilibrium exists (Brouwer), and what leaves has the scale of what entered, which
    is that which the blocks behind it take. The point is that of z = N(y + gain/2 (F(y) - y)), the familiar block with
    an outer norm, whose skip path is mere damping: it takes more steps. Iteration starts at x, by `Picard(0.8)`
    unless told: what a block erases comes back with a slope of -gain/2, which that damps.

    By `python -m tritondeq.bench.wirings` (MLPs, pre- and post-norm encoders, ResNet stages, ViT, GPT-2; 3 or 8 blocks
    with random weights): spectral radius 0.01 to 0.68, 2 to 15 undamped evaluations to 1e-3, and 1.1 to 3.0 times as
    many of the familiar block. With weights four times as large, up to 0.78 and 29 where all converge; of the encoders
    46 % (pre-norm) and 73 % (post-norm) do not in 200, by Anderson 10 % and 10 %. Watch `last.steps` as it trains,
    lower `gain`, or take Anderson. The layer does not compute what the stack did: a converted net has to be trained.

    The container that is returned takes the stack's place, called or looped over: blocks before, the layer, blocks
    behind. Further arguments of a call (masks, positions) go to the block unchanged at every evaluation; their tensors
    get gradients. Further outputs of the block are those at z*. A `DynamicCache` of transformers is filled with keys
    and values at z*, so that generation token by token is right; other caches raise.

    A sample is an index of the first dim; nn.MultiheadAttention without batch_first makes one of the whole batch. In
    the cell, dropout and stochastic depth become `FixedDropout`, and weights of attention are not dropped.

    Args:
        stack: Blocks `forward(x, ...)` that return x's successor, or a tuple that begins with it. It stays as it is,
            and the blocks before and behind are its own, not copies.
        cell: "mean": F's parameters and floating-point buffers are the means over the blocks replaced; "first": those
            of the first of them. Or a module of your own with a block's signature, taken as it is.
        prelude: Blocks kept before the layer.
        coda: Blocks kept behind it.
        injection: "add": y = (x + z) / 2; or a module that returns y for (z, x), of x's shape.
        norm: N. "outer" is "sample" where x has four dims or more and the block a convolution, else "tokens": rms over
            the last dim. "sample": rms over all dims but the first, a GroupNorm of one group without its mean; say so
            for [B, C, L]. A module is called in place of N. None: no N; an equilibrium then needs a block that bounds
            its increments.
        gain: Scale of the block's increment, above 0: a LayerScale that is not trained.
        batch_norm: BatchNorm in a cell would mix samples and count evaluations, so it raises, unless told: "group", a
            GroupNorm with its weight and bias takes its place (to train from scratch), or "frozen", its running
            statistics stay as they are (to keep trained features).
        unroll: Begin as the weight-tied explicit net of so many evaluations; `unrolled(None)` ends it.
        options: Of `DEQ`: solver, adjoint, tol, max_steps, ...

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; blocks to be replaced differ in shape,
            kind or settings. The message names the block and what differs.
    """
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        raise TypeError(f"stack must be an nn.Sequential or nn.ModuleList of blocks, got {describe(stack)}")
    for name, value in (("prelude", prelude), ("coda", coda)):
        count(name, value, least=0)
    blocks = list(stack)
    if prelude + coda >= len(blocks):
        raise ValueError(
            f"prelude={prelude} and coda={coda} leave nothing to replace in a stack of {len(blocks)} blocks"
        )
    if batch_norm is not None and batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be None, 'group' or 'frozen', got {batch_norm!r}")
    number("gain", gain, 0)
    _choice("norm", norm, _NORMS, none=True)
    _choice("injection", injection, ("add",))
    replaced = blocks[prelude : len(blocks) - coda]
    if isinstance(cell, nn.Module):
        if isinstance(cell, Cell):
            raise TypeError(f"cell must have the blocks' signature forward(x, ...), got the cell {type(cell).__name__}")
        refuse_batch_norm(cell, "cell")
    else:
        _choice("cell", cell, ("mean", "first"))
        cell = one_block(replaced, cell, prelude, batch_norm)
    layer = EquilibriumLayer(ImplicitMidpoint(cell, injection, norm, gain, prelude), **options)
    layer.train(stack.training)
    return EquilibriumStack(*blocks[:prelude], layer.unrolled(unroll), *blocks[len(blocks) - coda :])


def _choice(name: str, value: Any, names: tuple[str, ...], none: bool = False) -> None:
    if isinstance(value, nn.Module) or value in names or (none and value is None):
        return
    said = ", ".join(map(repr, names)) + (", None" if none else "")
    raise ValueError(f"{name} must be {said} or a module, got {value!r}")


class EquilibriumStack(nn.Sequential):
    """Blocks, one `DEQ`, blocks: called with the arguments of a block, or looped over by whoever owns it."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the last of them returns; each gets the first output of the one before, and the same arguments."""
        out = x
        for block in self:
            out = block(out[0] if isinstance(out, tuple) else out, *args, **kwargs)
        return out

    @property
    def deq(self) -> DEQ:
        """The layer."""
        return next(block for block in self if isinstance(block, DEQ))

    @property
    def last(self) -> Any:
        """`last` of the layer: status, steps and residual of its last call."""
        return self.deq.last

    def unrolled(self, steps: int | None, checkpoint: bool = False) -> "EquilibriumStack":
        """`DEQ.unrolled` of the layer; returns self."""
        self.deq.unrolled(steps, checkpoint)
        return self


class EquilibriumLayer(DEQ):
    """A `DEQ` that is called as the blocks it stands for: `layer(x, *args, **kwargs)`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = _Call(x, args, kwargs)
        if call.caches and self.graph:
            raise ValueError("graph=True takes no cache, which a replay would not fill: pass use_cache=False")
        f = self._map(call)
        z = self._solve(f, call, None, None).value
        if not self.cell.more and not call.caches:
            return z
        with f.held(f.weights.values):
            out = self.cell.at_solution(z, f.injection)
        return (z, *out[1:]) if isinstance(out, tuple) else z


class _Call:
    """One call of the layer: the arguments of the block."""

    def __init__(self, x: Any, args: tuple, kwargs: dict[str, Any]):
        self.x = x
        found = [v for v in (*args, *kwargs.values()) if hasattr(v, "update") and hasattr(v, "get_seq_length")]
        self.caches = {id(cache): cache for cache in found}
        for cache in found:
            _twin(cache)  # raises now where it can't
        self.args = tuple(_Hidden(v) if id(v) in self.caches else v for v in args)
        self.kwargs = {k: _Hidden(v) if id(v) in self.caches else v for k, v in kwargs.items()}


class _Hidden:
    """A cache, from whoever takes nestings apart."""

    def __init__(self, cache: Any):
        self.cache = cache


def _twin(cache: Any) -> Any:
    """A cache of the same tensors, whose updates the other does not see."""
    layers = getattr(cache, "layers", None)
    kinds = {type(layer).__name__ for layer in layers} if isinstance(layers, list) else {"no list of layers"}
    if not kinds <= {*_CACHED} or getattr(cache, "offloading", False):
        raise ValueError(
            f"a cache that a block changes must be a DynamicCache of transformers, got {type(cache).__name__} with "
            f"{', '.join(sorted(kinds))}: every evaluation of the solve would write to it; pass use_cache=False"
        )
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in layers]
    return twin


class _Injection(NamedTuple):
    """What does not depend on z."""

    x: Tensor
    scale: Tensor | None  # rms(x)
    args: tuple
    kwargs: dict[str, Any]


class ImplicitMidpoint(Cell):
    """f(z) = N(x + gain (F(y) - y)), y = (x + z) / 2: see `to_equilibrium`.

    Args:
        block: F.
        injection: "add", or a module that returns y for (z, x).
        norm: "outer", "tokens", "sample", a module or None.
        gain: Of the increment.
        place: Index of the block in its stack, for errors.
    """

    def __init__(
        self, block: nn.Module, injection: str | nn.Module, norm: str | nn.Module | None, gain: float, place: int
    ):
        super().__init__()
        self.block, self.injection, self.norm, self.gain, self.place = block, injection, norm, gain, place
        self.images = convolves(block)
        self.more = False  # whether the block returns more than the state
        self.checked = False  # that it draws no mask a step

    def train(self, mode: bool = True) -> "ImplicitMidpoint":
        self.checked = False
        return super().train(mode)

    def inject(self, x: Any) -> _Injection:
        call = x if isinstance(x, _Call) else _Call(x, (), {})
        x = call.x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the state that enters an equilibrium must be a floating-point tensor, got {describe(x)}")
        if x.is_nested:
            raise ValueError(
                "x must not be a nested tensor: set use_nested_tensor = False on the nn.TransformerEncoder"
            )
        self.batch_dims = leading_dims(self.block, x.ndim)
        scale = _mean_square(x, self._dims(x)).add(_EPS).sqrt() if isinstance(self.norm, str) else None
        return _Injection(x, scale, call.args, call.kwargs)

    def initial(self, x: Any, injection: _Injection) -> Tensor:
        return injection.x

    def default_solver(self) -> Solver:
        return Picard(0.8)

    def forward(self, z: Tensor, injection: _Injection) -> Tensor:
        x, y = injection.x, self._enter(z, injection.x)
        version = None if torch.compiler.is_compiling() or y.is_inference() else y._version
        out = self._evaluate(y, injection, lambda hidden: _twin(hidden.cache))
        self.more = isinstance(out, tuple)
        out = out[0] if self.more else out
        if not isinstance(out, Tensor) or out.shape != y.shape:
            raise ValueError(
                f"block {self.place} can't be replaced: it made of a state of shape {tuple(y.shape)} "
                f"{describe(out)}; keep blocks that change the shape explicit, by prelude= and coda="
            )
        if version is not None and y._version != version:
            raise RuntimeError(f"block {self.place} changes its input in place, which a residual block can't")
        v = x + self.gain * (out - y)
        if injection.scale is None:
            return v if self.norm is None else self.norm(v)
        return v * (injection.scale * torch.rsqrt(_mean_square(v, self._dims(v)) + _EPS)).to(v.dtype)

    def at_solution(self, z: Tensor, injection: _Injection) -> Any:
        """All that the block returns at the fixed point; it is this evaluation that fills caches."""
        return self._evaluate(self._enter(z, injection.x), injection, lambda hidden: hidden.cache)

    def _enter(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(x, z, 0.5) if self.injection == "add" else self.injection(z, x)

    def _evaluate(self, y: Tensor, injection: _Injection, cache: Callable[[_Hidden], Any]) -> Any:
        args = [cache(v) if isinstance(v, _Hidden) else v for v in injection.args]
        kwargs = {k: cache(v) if isinstance(v, _Hidden) else v for k, v in injection.kwargs.items()}
        if not self.training or self.checked or torch.compiler.is_compiling() or not self._masks_are_drawn():
            return self.block(y, *args, **kwargs)
        with _NoNewMasks():
            out = self.block(y, *args, **kwargs)
        self.checked = True
        return out

    def _masks_are_drawn(self) -> bool:
        fixed = [module for module in self.block.modules() if isinstance(module, FixedDropout)]
        return all(module.mask is not None for module in fixed if module.training and module.p > 0)

    def _dims(self, x: Tensor) -> tuple[int, ...]:
        whole = self.norm == "sample" or (self.norm == "outer" and self.images and x.ndim >= 4)
        return tuple(range(1, x.ndim)) if whole else (-1,)

    def extra_repr(self) -> str:
        said = [f"{name}={getattr(self, name)!r}" for name in ("injection", "norm") if name not in self._modules]
        return ", ".join([*said, f"gain={self.gain}"])


def _mean_square(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dims, keepdim=True)


class _NoNewMasks(TorchFunctionMode):
    """Raises where the block drops by a function of its own, which no module shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        share = 0.0
        if func is F.scaled_dot_product_attention:
            share = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        elif func is F.dropout and kwargs.get("training", args[2] if len(args) > 2 else True):
            share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if share > 0:
            raise RuntimeError(
                f"the block calls {func.__name__} with a dropout of {share}, which draws another mask at every step, "
                "so that there is no fixed point: set it to 0 (in attention: attn_drop, attn_pdrop, attention_dropout)"
            )
        return func(*args, **kwargs)
