"""A residual MLP block with a norm that keeps it in bounds."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import integer
from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import RMS_EPS, hidden, hidden_slopes, mlp, mlp_inner, mlp_outer
from ..kernels.tails import Tail
from ..solvers.splitting import kernel_options
from .base import Cell, features_of, row_options

_ACTIVATIONS = ("relu", "gelu", "silu", "swiglu")
_FORMS = ("post", "pre")
_SMALL = 0.3  # of nn.Linear's usual scale, for the last one at initialisation
_DECAY = 0.45


class MLP(Cell):
    """A residual MLP block on each row by itself, with u = rms(U x + b) injected once per solve.

        post   z = n * rms(z + u + W2 h + b2),  h = act(W1 (z + u) + b1)
        pre    z = a * z + u + W2 h + b2,       h = act(W1 rms(z) + b1),  0 < a < 1 for each feature

    rms(x) is x over its root mean square; "swiglu" is h = silu(W3 . + b3) * (W1 . + b1) (Shazeer 2020). The norm around
    the block, or the decay a (0.45 at initialisation), keeps it contractive as long as W2 is small, which begins at 0.3
    of the usual scale. A pre-norm block with neither has no equilibrium (Bai et al. 2021, section 4).

    On a GPU a solve by Picard or Anderson(memory <= 4) is one Triton launch, and so is its adjoint, as long as the
    bfloat16 terms of the weights fit in a multiprocessor's shared memory: two terms each, one with bfloat16 operands or
    under autocast, three below a tolerance of 1e-5. That is some 100,000 weights in one term on an H100, D and H
    rounded up to powers of two. Beyond that a solve takes the loop, whose fused steps do the last sum, with its norm or
    decay, as they read.

    Args:
        features: Width D of the state; z is [..., D].
        inputs: Width of x; None is D.
        hidden: Width H of the hidden layer; None is 2 D.
        form: "post" or "pre".
        activation: "relu", "gelu" (exact), "silu" or "swiglu".
        operands: What weights are rounded to inside the iteration: "fp32", or "bf16" for speed (the state stays
            float32). With "bf16", and under autocast, kernels make gelu and silu of the hardware's tanh (errors up to
            5e-4 (1 + |x|)) to a `tol` of 5e-3 and above.
        bias: Whether there are biases.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    batch_dims = -1

    def __init__(
        self,
        features: int,
        inputs: int | None = None,
        *,
        hidden: int | None = None,
        form: str = "post",
        activation: str = "gelu",
        operands: str = "fp32",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        inputs = row_options(features, inputs, operands)
        hidden = 2 * features if hidden is None else hidden
        integer("hidden", hidden)
        for name, value, among in (("form", form, _FORMS), ("activation", activation, _ACTIVATIONS)):
            if value not in among:
                raise ValueError(f"{name} must be one of {', '.join(among)}, got {value!r}")
        self.features, self.inputs, self.hidden = features, inputs, hidden
        self.form, self.activation, self.operands = form, activation, operands
        like = {"device": device, "dtype": dtype}
        self.input = nn.Linear(inputs, features, bias=bias, **like)
        self.norm = nn.RMSNorm(features, eps=RMS_EPS, **like)
        self.up = nn.Linear(features, hidden, bias=bias, **like)
        self.gate = nn.Linear(features, hidden, bias=bias, **like) if activation == "swiglu" else None
        self.down = nn.Linear(hidden, features, bias=bias, **like)
        if form == "post":
            self.outer = nn.Parameter(torch.ones(features, **like))
        else:
            self.decay = nn.Parameter(torch.full((features,), _DECAY, **like).logit())
        with torch.no_grad():
            self.down.weight.mul_(_SMALL)

    @property
    def scale(self) -> Tensor:
        """n, or a where the form is "pre", [D]."""
        return self.outer if self.form == "post" else self.decay.sigmoid()

    def inject(self, x: Tensor) -> tuple[Tensor, tuple, tuple, Tensor]:
        """(u, weights, biases, n or a), as the iteration uses them."""
        features_of(x, self.inputs, self)
        layers = [layer for layer in (self.up, self.down, self.gate) if layer is not None]
        weights = tuple(layer.weight for layer in layers)
        if self.operands == "bf16":
            weights = tuple(w.bfloat16().to(w.dtype) for w in weights)
        u = self.norm(self.input(x).to(self.norm.weight.dtype))  # autocast made it bfloat16
        return u, weights, tuple(layer.bias for layer in layers), self.scale

    def initial(self, x: Tensor, injection: tuple) -> Tensor:
        return x.new_zeros(injection[0].shape)

    def forward(self, z: Tensor, injection: tuple) -> Tensor:
        u, weights, biases, scale = injection
        return mlp(self.form, self._activation, weights, biases, scale, u, z)

    def tail(self, injection: tuple) -> tuple[Callable, Tail]:
        scale = injection[3]
        if self.form == "post":
            return self._parts, Tail("rms", weight=scale, eps=RMS_EPS)
        return self._parts, Tail(gains=(None, scale))

    def _parts(self, z: Tensor, injection: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """What f is the sum of, with a z where the form is "pre", before the norm where it is "post"."""
        u, weights, biases, _ = injection
        pre = mlp_inner(self.form, weights, biases, u, z)
        return u, F.linear(hidden(self._activation, pre), weights[1], biases[1]), z

    @property
    def _activation(self) -> str:
        return "silu" if self.activation == "swiglu" else self.activation

    def whole_solve(self, injection: tuple) -> WholeSolve:
        u, weights, biases, scale = injection
        dtypes = {u.dtype, *(w.dtype for w in weights)}
        narrow = self.operands == "bf16" or torch.is_autocast_enabled(u.device.type)
        narrow = narrow or any(dtype.itemsize < 4 for dtype in dtypes)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        u, scale = u.detach().reshape(-1, self.features).to(wide), scale.detach().to(wide)
        weights = tuple(w.detach().to(wide) for w in weights)
        pairs = zip(weights, biases, strict=True)
        biases = tuple(w.new_zeros(len(w)) if b is None else b.detach().to(wide) for w, b in pairs)

        def at(z: Tensor) -> tuple:
            pre = mlp_inner(self.form, weights, biases, u, z)
            normed = mlp_outer(self.form, self._activation, weights, biases, u, z, pre) if self.form == "post" else z
            return weights, scale, (normed, *hidden_slopes(self._activation, pre))

        return WholeSolve(
            op="rows.mlp",
            problem={"shapes": [tuple(w.shape) for w in weights], "dtype": wide, "activation": self._activation},
            operands=(weights, biases, scale, u),
            at=at,
            options=lambda tol: {"form": self.form, **kernel_options(self._activation, tol, narrow)},
        )

    def default_tol(self) -> float | None:
        return 1e-2 if self.operands == "bf16" else None

    def extra_repr(self) -> str:
        return (
            f"{self.features}, inputs={self.inputs}, hidden={self.hidden}, form={self.form!r}, "
            f"activation={self.activation!r}, operands={self.operands!r}"
        )
