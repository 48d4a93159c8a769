"""A gated recurrent unit, run to its equilibrium."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import number
from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import gru, gru_slopes
from ..row_kernels import kernel_options
from .base import features_of
from .contraction import SpectralBound, draw
from .rows import RowCell

_NORM = 0.5  # of each W at initialisation
_SHARE = 0.8  # c moves by at most ||Wc|| (1 + ||Wr|| / 4) times what z does
_WEIGHTS = ("weight_r", "weight_s", "weight_c")


class Gated(RowCell):
    """A gated recurrent unit (Cho et al. 2014) on each row by itself, run to its equilibrium.

        r = sigmoid(Wr z + ur),  s = (1 + sigmoid(Ws z + us)) / 2,  c = tanh(Wc (r * z) + uc),  (ur, us, uc) = U x + b
        z = (1 - s) * z + s * c

    |z| stays below 1. Equilibria are those of z = c, as of the usual unit; s, a damping of each element, only decides
    how they are reached. Its gradient at one is zero up to the tolerance, and what is left is noise, which Adam would
    follow: that is why s is above a half. At initialisation ||W||_2 = 0.5 for each W, which makes the map contractive;
    large steps of training can take that away, unless `contraction` is given.

    On a GPU a solve by Picard or Anderson(memory <= 4) is one Triton launch, and so is its adjoint, as long as the
    bfloat16 terms of the weights fit in a multiprocessor's shared memory: two terms each, one with bfloat16 operands or
    under autocast to bfloat16, three below a tolerance of 1e-5. That is up to 128 features on an H100.

    Args:
        contraction: Bounds ||Wr||_2 by 1 and ||Wc||_2 by 0.8 times this during training, with a parametrization;
            below 1, c contracts in z by this much, so there is one equilibrium and plain iteration reaches it. None
            leaves them free.
        features, inputs, operands, bias: As for `Affine`.
    """

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
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(features, inputs, operands, 3 * features, bias, like)
        for name in _WEIGHTS:
            self.register_parameter(name, nn.Parameter(torch.empty(features, features, **like)))
        self.reset_parameters()
        if contraction is not None:
            number("contraction", contraction, 0)
            parametrize.register_parametrization(self, "weight_r", SpectralBound(1.0), unsafe=True)
            bound = SpectralBound(_SHARE * float(contraction))
            parametrize.register_parametrization(self, "weight_c", bound, unsafe=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws Wr, Ws and Wc anew, normal and scaled to their norm, and U and b as nn.Linear does."""
        self.input.reset_parameters()
        for name in _WEIGHTS:
            old = getattr(self, name)
            w = torch.empty_like(old) if parametrize.is_parametrized(self, name) else old
            draw(w, _NORM)
            if w is not old:
                setattr(self, name, w)

    def inject(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ((ur, us, uc) side by side, (Wr, Ws, Wc) stacked), as the iteration uses them."""
        features_of(x, self.inputs, self)
        return self.input(x), self.rounded(torch.stack([getattr(self, name) for name in _WEIGHTS]))

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        u, w = injection
        rows = z.reshape(-1, self.features)
        _, s, c = gru(w.unbind(), u.reshape(-1, 3 * self.features).chunk(3, 1), rows)
        return torch.lerp(rows.to(c.dtype), c, s).view(z.shape)

    def whole_solve(self, injection: tuple[Tensor, Tensor]) -> WholeSolve:
        u, w = (t.detach() for t in injection)
        dtype, narrow = self.precision(u, w)
        inputs, weights = u.reshape(-1, 3 * self.features).to(dtype).chunk(3, 1), w.to(dtype).unbind()
        return WholeSolve(
            op="rows.gated",
            problem={"shapes": [tuple(w.shape) for w in weights], "dtype": dtype},
            operands=(weights, inputs),
            at=lambda z: (weights, gru_slopes(z, *gru(weights, inputs, z))),
            options=lambda tol: kernel_options("tanh", tol, narrow),
        )
