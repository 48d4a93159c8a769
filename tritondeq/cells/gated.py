"""A gated recurrent unit, run to its equilibrium."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import number
from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import gru, gru_slopes
from ..solvers.splitting import kernel_options
from .base import Cell, features_of, row_options
from .contraction import SpectralBound

_NORM = 0.5  # of each W at initialisation
_SHARE = 0.8  # c moves by at most ||Wc|| (1 + ||Wr|| / 4) times what z does
_WEIGHTS = ("weight_r", "weight_s", "weight_c")


class Gated(Cell):
    """A gated recurrent unit (Cho et al. 2014) on each row by itself, run to its equilibrium.

        r = sigmoid(Wr z + ur),  s = (1 + sigmoid(Ws z + us)) / 2,  c = tanh(Wc (r * z) + uc),  (ur, us, uc) = U x + b
        z = (1 - s) * z + s * c

    |z| stays below 1. Equilibria are those of z = c, as of the usual unit; s, a damping of each element, only says how
    they are reached. Its gradient at one is zero up to the tolerance, and what is left is noise, which Adam would
    follow: that is why s is kept above a half. At initialisation ||W||_2 = 0.5 for each W, which makes the map
    contractive; large steps of training can take that away, unless `contraction` is given.

    On a GPU a solve by Picard or Anderson(memory <= 4) is one Triton launch, and so is its adjoint, as long as the
    bfloat16 terms of the weights fit in a multiprocessor's shared memory: two terms each, one with bfloat16 operands or
    under autocast, three below a tolerance of 1e-5. That is up to 128 features on an H100.

    Args:
        features: Width D of the state; z is [..., D].
        inputs: Width of x; None is D.
        contraction: Keeps ||Wr||_2 at most 1 and ||Wc||_2 at most 0.8 times this during training, by a parametrization;
            below 1, c contracts in z by this much, so there is one equilibrium and plain iteration reaches it. None
            leaves them free.
        operands: What weights are rounded to inside the iteration: "fp32", or "bf16" for speed (the state stays
            float32). With "bf16", and under autocast, kernels take the hardware's tanh (relative error 5e-4) to a `tol`
            of 5e-3 and above.
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
        contraction: float | None = None,
        operands: str = "fp32",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        inputs = row_options(features, inputs, operands)
        if contraction is not None:
            number("contraction", contraction, 0)
        self.features, self.inputs, self.operands = features, inputs, operands
        for name in _WEIGHTS:
            self.register_parameter(name, nn.Parameter(torch.empty(features, features, device=device, dtype=dtype)))
        self.input = nn.Linear(inputs, 3 * features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        if contraction is not None:
            parametrize.register_parametrization(self, "weight_r", SpectralBound(1.0))
            parametrize.register_parametrization(self, "weight_c", SpectralBound(_SHARE * float(contraction)))

    def reset_parameters(self) -> None:
        """Draws Wr, Ws and Wc anew, normal and scaled to their norm, and U and b as nn.Linear does."""
        self.input.reset_parameters()
        with torch.no_grad():
            for name in _WEIGHTS:
                w = torch.randn(self.features, self.features)
                w = (w * (_NORM / torch.linalg.matrix_norm(w, 2))).to(getattr(self, name))
                setattr(self, name, w if parametrize.is_parametrized(self, name) else getattr(self, name).copy_(w))

    def inject(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """((ur, us, uc) side by side, (Wr, Ws, Wc)), as the iteration uses them."""
        features_of(x, self.inputs, self)
        w = torch.stack([getattr(self, name) for name in _WEIGHTS])
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
            op="rows.gated",
            problem={"shapes": [tuple(w.shape) for w in weights], "dtype": wide},
            operands=(weights, inputs),
            at=lambda z: (weights, gru_slopes(z, *gru(weights, inputs, z))),
            options=lambda tol: kernel_options("tanh", tol, narrow),
        )

    def default_tol(self) -> float | None:
        return 1e-2 if self.operands == "bf16" else None

    def extra_repr(self) -> str:
        return f"{self.features}, inputs={self.inputs}, operands={self.operands!r}"
