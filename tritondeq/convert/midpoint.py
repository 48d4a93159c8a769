"""The cell that iterates a residual block: the implicit midpoint rule, and the arguments of a block on their way."""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cells import Cell
from ..layout import describe
from ..solvers import Picard, Solver
from .hooks import HERE, Shown, showing, watched

_EPS = 1e-12  # of mean squares; embeddings at initialisation have some of 1e-4
_CACHED = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # of transformers: they replace their tensors


class Call:
    """One call of the layer: the arguments of the block, with caches in a wrapper that pytrees do not open."""

    def __init__(self, x: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        self.x = x
        self.args = tuple(map(_wrapped, args))
        self.kwargs = {name: _wrapped(value) for name, value in (kwargs or {}).items()}
        self.cached = any(isinstance(value, _Cache) for value in (*self.args, *self.kwargs.values()))
        self.further: tuple | None = None  # what the block returns beside the state, at the fixed point


class _Cache:
    """A cache of transformers; ValueError where its layers change their tensors in place."""

    def __init__(self, cache: Any):
        layers = getattr(cache, "layers", None)
        kinds = {type(layer).__name__ for layer in layers} if isinstance(layers, list) else {"no list of layers"}
        if not kinds <= _CACHED or getattr(cache, "offloading", False):
            raise ValueError(
                f"a cache that a block changes must be a DynamicCache of transformers, got {type(cache).__name__} with "
                f"{', '.join(sorted(kinds))}: every evaluation of the solve would write to it; pass use_cache=False"
            )
        self.cache = cache

    def twin(self) -> Any:
        """Returns a cache of the same tensors, whose updates the other does not see."""
        twin = copy.copy(self.cache)
        twin.layers = [copy.copy(layer) for layer in self.cache.layers]
        return twin


def _wrapped(value: Any) -> Any:
    return _Cache(value) if hasattr(value, "update") and hasattr(value, "get_seq_length") else value


@dataclass(unsafe_hash=True)
class _Notes:
    """What one solve notes of its block; all are equal, for a captured solve serves any."""

    watched: bool = field(compare=False)  # by hooks
    more: bool | None = field(default=None, compare=False)  # whether the block returns more than the state


class _Injection(NamedTuple):
    """What does not depend on z."""

    x: Tensor
    scale: Tensor | None  # rms(x)
    args: tuple
    kwargs: dict[str, Any]
    notes: _Notes


class ImplicitMidpoint(Cell):
    """f(z) = N(x + gain (F(y) - y)), y = (x + z) / 2: see `to_equilibrium`. `place` is the block's index."""

    def __init__(
        self, block: nn.Module, injection: str | nn.Module, norm: str | nn.Module | None, gain: float, place: int
    ):
        super().__init__()
        self.block, self.gain, self.place = block, gain, place
        self.injection: Any = injection
        self.norm: Any = norm
        self.images = any(isinstance(module, nn.modules.conv._ConvNd) for module in block.modules())

    @property
    def batch_dims(self) -> int:  # type: ignore[override]
        """Those of this thread's last injection."""
        return HERE.batch_dims.get(self, 1)

    def inject(self, x: Any) -> _Injection:
        call = x if isinstance(x, Call) else Call(x)
        x = call.x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the state that enters an equilibrium must be a floating-point tensor, got {describe(x)}")
        if x.is_nested:
            raise ValueError("x must not be nested: set use_nested_tensor = False on the nn.TransformerEncoder")
        attention = [module for module in self.block.modules() if isinstance(module, nn.MultiheadAttention)]
        tokens_first = any(x.ndim == 2 or not module.batch_first for module in attention)  # or there is no batch
        HERE.batch_dims[self] = 0 if tokens_first else 1
        scale = _mean_square(x, self._dims(x)).add(_EPS).sqrt() if isinstance(self.norm, str) else None
        return _Injection(x, scale, call.args, call.kwargs, _Notes(watched(self.block)))

    def initial(self, x: Any, injection: _Injection) -> Tensor:
        return injection.x

    def default_solver(self) -> Solver:
        return Picard(0.8)

    def forward(self, z: Tensor, injection: _Injection) -> Tensor:
        x, y = injection.x, self._enter(z, injection.x)
        version = None if torch.compiler.is_compiling() or y.is_inference() else y._version
        out = self._evaluate(y, injection)
        injection.notes.more = isinstance(out, tuple)
        out = out[0] if injection.notes.more else out
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
        """Returns all that the block returns at the fixed point; this evaluation fills caches, and hooks see it.

        None, and caches stay as they were, where one of the hooks turns out to change what the block computes.
        """
        caches = [value for value in (*injection.args, *injection.kwargs.values()) if isinstance(value, _Cache)]
        before, shown = [cache.twin() for cache in caches], Shown(self.block, injection.x, z)
        out = self._evaluate(self._enter(z, injection.x), injection, shown)
        for cache, twin in zip(caches, before, strict=True) if shown.changed else ():
            vars(cache.cache).update(vars(twin))
        return None if shown.changed else out

    def _enter(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(x, z, 0.5) if self.injection == "add" else self.injection(z, x)

    def _evaluate(self, y: Tensor, injection: _Injection, shown: Shown | bool = False) -> Any:
        def unwrapped(value: Any) -> Any:
            return (value.cache if shown else value.twin()) if isinstance(value, _Cache) else value

        args, kwargs = map(unwrapped, injection.args), {k: unwrapped(v) for k, v in injection.kwargs.items()}
        with showing(shown) if injection.notes.watched else contextlib.nullcontext():
            return self.block(y, *args, **kwargs)

    def _dims(self, x: Tensor) -> tuple[int, ...]:
        whole = self.norm == "sample" or (self.norm == "outer" and self.images and x.ndim >= 4)
        return tuple(range(1, x.ndim)) if whole else (-1,)

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("injection", "norm", "gain") if name not in self._modules}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _mean_square(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dims, keepdim=True)
