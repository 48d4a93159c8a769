"""A residual MLP block with a norm or a decay that bounds its state."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import integer
from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import RMS_EPS, hidden_slopes, mlp, mlp_inner, mlp_outer, rms_norm
from ..kernels.formulas import hidden as hidden_layer
from ..kernels.tails import Tail
from ..row_kernels import kernel_options
from .base import features_of, is_linear, one_of
from .rows import RowCell

_SMALL = 0.3  # of nn.Linear's usual scale, for the last one at initialisation
_DECAY = 0.45


class MLP(RowCell):
    """A residual MLP block on each row by itself, with u = rms(U x + b) injected once per solve.

        post   z = n * rms(z + u + W2 h + b2),  h = act(W1 (z + u) + b1)
        pre    z = a * z + u + W2 h + b2,       h = act(W1 rms(z) + b1),  0 < a < 1 for each feature

    rms(x) is x over its root mean square; "swiglu" is h = silu(W3 . + b3) * (W1 . + b1) (Shazeer 2020). The norm around
    the block, or the decay a (0.45 at initialisation), makes it contractive as long as W2 is small, which begins at 0.3
    of the usual scale. A pre-norm block with neither has no equilibrium (Bai et al. 2021, section 4).

    On a GPU a solve by Picard or Anderson(memory <= 4) is one Triton launch, and so is its adjoint, as long as the
    bfloat16 terms of the weights, of which `Gated` gives the number, fit in a multiprocessor's shared memory. That is
    some 100,000 weights in one term on an H100, D and H rounded up to powers of two. Beyond that a solve takes the
    loop, whose fused steps do the last sum, with its norm or decay, as they read. So does one whose `up`, `down` or
    `gate` has a hook or is another module, such as a LoRA adapter: these are called, and not rounded to `operands`.

    Args:
        hidden: Width H of the hidden layer; None is 2 D.
        form: "post" or "pre".
        activation: "relu", "gelu" (exact), "silu" or "swiglu".
        features, inputs, operands, bias: As for `Affine`; the hardware's tanh makes gelu and silu, with errors up to
            5e-4 (1 + |x|).
    """

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
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(features, inputs, operands, features, bias, like)
        hidden = 2 * features if hidden is None else hidden
        integer("hidden", hidden)
        one_of("form", form, ("post", "pre"))
        one_of("activation", activation, ("relu", "gelu", "silu", "swiglu"))
        self.hidden, self.form, self.activation = hidden, form, activation
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
        """The weight n, or the decay a where the form is "pre", [D]."""
        return self.outer if self.form == "post" else self.decay.sigmoid()

    def inject(self, x: Tensor) -> tuple[Tensor, tuple, tuple, Tensor]:
        features_of(x, self.inputs, self)
        layers = [layer for layer in (self.up, self.down, self.gate) if layer is not None]
        u = self.norm(self.input(x).to(self.norm.weight.dtype))  # autocast made it bfloat16
        if not all(map(is_linear, layers)):
            return u, (), (), self.scale
        weights, biases = (tuple(getattr(layer, name) for layer in layers) for name in ("weight", "bias"))
        return u, tuple(map(self.rounded, weights)), biases, self.scale

    def forward(self, z: Tensor, injection: tuple) -> Tensor:
        u, weights, biases, scale = injection
        if weights:
            return mlp(self.form, self._act, weights, biases, scale, u, z)
        u, last, z = self._parts(z, injection)
        return rms_norm(z + (u + last), scale) if self.form == "post" else scale * z + (u + last)

    def tail(self, injection: tuple) -> tuple[Callable, Tail]:
        scale = injection[3]
        return self._parts, Tail("rms", weight=scale, eps=RMS_EPS) if self.form == "post" else Tail(gains=(None, scale))

    def _parts(self, z: Tensor, injection: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the summands of f, with a z where the form is "pre", before the norm where it is "post"."""
        u, weights, biases, _ = injection
        if weights:
            pre = mlp_inner(self.form, weights, biases, u, z)
            return u, F.linear(hidden_layer(self._act, pre), weights[1], biases[1]), z
        x = z + u if self.form == "post" else rms_norm(z)
        pre = tuple(layer(x) for layer in (self.up, self.gate) if layer is not None)
        return u, self.down(hidden_layer(self._act, pre)), z

    @property
    def _act(self) -> str:
        return "silu" if self.activation == "swiglu" else self.activation

    def whole_solve(self, injection: tuple) -> WholeSolve | None:
        u, weights, biases, scale = injection
        if not weights:
            return None
        dtype, narrow = self.precision(u, *weights)
        u, scale = u.detach().reshape(-1, self.features).to(dtype), scale.detach().to(dtype)
        biases = tuple(w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True))
        weights, biases = (tuple(t.detach().to(dtype) for t in tensors) for tensors in (weights, biases))

        def at(z: Tensor) -> tuple:
            pre = mlp_inner(self.form, weights, biases, u, z)
            normed = mlp_outer(self.form, self._act, weights, biases, u, z, pre) if self.form == "post" else z
            return weights, scale, (normed, *hidden_slopes(self._act, pre))

        return WholeSolve(
            op="rows.mlp",
            problem={"shapes": [tuple(w.shape) for w in weights], "dtype": dtype, "activation": self._act},
            operands=(weights, biases, scale, u),
            at=at,
            options=lambda tol: {"form": self.form, **kernel_options(self._act, tol, narrow)},
        )
