"""A gated recurrent unit, run to its equilibrium."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import gru, gru_slopes
from ..solvers.base import count
from ..solvers.splitting import bf16_terms
from .base import Cell, features_of

_NORM = 0.5  # of each W at initialisation
_OPEN = 1.0  # bias of s at initialisation


class Gated(Cell):
    """A gated recurrent unit (Cho et al. 2014) on each row by itself, run to its equilibrium.

        r = sigmoid(Wr z + ur),  s = sigmoid(Ws z + us),  c = tanh(Wc (r * z) + uc),  (ur, us, uc) = U x + b
        z = (1 - s) * z + s * c

    The gate s is a damping of each element that the layer learns; |z| stays below 1. Equilibria are those of z = c, and
    s only says how they are reached: the gradient of s at one is zero. At initialisation ||W||_2 = 0.5 for each W, and
    s is biased towards 0.73, which makes the map contractive.

    On a GPU a solve by Picard or Anderson(memory <= 4) is one Triton launch, and so is its adjoint, as long as the
    bfloat16 terms of the weights fit in a multiprocessor's shared memory: two terms each, one with bfloat16 operands or
    under autocast, three below a tolerance of 1e-5. On an H100 that is up to 128 features.

    Args:
        features: Width D of the state; z is [..., D].
        inputs: Width of x; None is D.
        operands: What weights are rounded to inside the iteration: "fp32", or "bf16" for speed (the state stays
            float32).
        bias: Whether there is a b.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    batch_dims = -1

    def __init__(
        self,
        features: int,
        inputs: int | None = None,
        *,
        operands: str = "fp32",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        count("features", features)
        inputs = features if inputs is None else inputs
        count("inputs", inputs)
        if operands not in ("fp32", "bf16"):
            raise ValueError(f"operands must be 'fp32' or 'bf16', got {operands!r}")
        self.features, self.inputs, self.operands = features, inputs, operands
        self.weight = nn.Parameter(torch.empty(3, features, features, device=device, dtype=dtype))
        self.input = nn.Linear(inputs, 3 * features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Wr, Ws and Wc anew, normal and scaled to their norm, and U and b as nn.Linear does, s biased."""
        w = torch.randn(3, self.features, self.features)
        w *= _NORM / torch.linalg.matrix_norm(w, 2)[:, None, None]
        self.input.reset_parameters()
        with torch.no_grad():
            self.weight.copy_(w)
            if self.input.bias is not None:
                self.input.bias[self.features : 2 * self.features] += _OPEN

    def inject(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """((ur, us, uc) side by side, (Wr, Ws, Wc)), as the iteration uses them."""
        features_of(x, self.inputs, self)
        w = self.weight
        return self.input(x), w.bfloat16().to(w.dtype) if self.operands == "bf16" else w

    def initial(self, x: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        return x.new_zeros(*injection[0].shape[:-1], self.features)

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        u, w = injection
        rows = z.reshape(-1, self.features)
        _, s, c = gru(w.unbind(), u.reshape(-1, 3 * self.features).chunk(3, 1), rows)
        return torch.lerp(rows.to(c.dtype), c, s).view(z.shape)

    def whole_solve(self, injection: tuple[Tensor, Tensor]) -> WholeSolve:
        u, w = (t.detach() for t in injection)
        narrow = self.operands == "bf16" or torch.is_autocast_enabled(u.device.type) or w.dtype.itemsize < 4
        wide = torch.float64 if torch.float64 in (u.dtype, w.dtype) else torch.float32
        inputs, weights = u.reshape(-1, 3 * self.features).to(wide).chunk(3, 1), w.to(wide).unbind()
        return WholeSolve(
            op="gated",
            problem={"shapes": [tuple(w.shape) for w in weights], "dtype": wide},
            operands=(weights, inputs),
            at=lambda z: (weights, gru_slopes(z, *gru(weights, inputs, z))),
            options=lambda tol: {"terms": bf16_terms(tol, narrow)},
        )

    def default_tol(self) -> float | None:
        return 1e-2 if self.operands == "bf16" else None

    def extra_repr(self) -> str:
        return f"{self.features}, inputs={self.inputs}, operands={self.operands!r}"
