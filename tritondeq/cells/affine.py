"""z = act(W z + U x + b)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import number
from ..kernels.dispatch import WholeSolve
from ..kernels.formulas import ACTIVATIONS
from ..kernels.tails import Tail
from ..row_kernels import affine_problem, kernel_options
from .base import features_of, one_of
from .contraction import SpectralBound, draw
from .rows import RowCell

_SLOPES = {"gelu": 1.1289}  # largest |act'|, where it is not 1
GAIN = 0.9  # of the Lipschitz bound at initialisation


class Affine(RowCell):
    """z = act(W z + U x + b), on each row by itself: every row stops alone.

    Contractive at initialisation: ||W||_2 max|act'| = 0.9. Up to 256 features, and on a GPU, a solve by Picard or
    Anderson(memory <= 4) is one Triton launch, and so is its adjoint. Wider cells take the loop: up to 4096 features,
    and by Picard, a step is one launch, the product with W included (except where torch multiplies in TF32 or bf16 and
    the state has more than 2^20 elements); else the steps apply the activation as they read W z + u.

    Args:
        features: Width D of the state; z is [..., D].
        inputs: Width of x; None is D.
        activation: "tanh", "relu", "gelu" (exact), "sin" or "identity".
        operands: What W is rounded to inside the iteration: "fp32", or "bf16" for speed (the state stays float32). With
            "bf16", and under autocast to bfloat16, kernels use the hardware's tanh (relative error 5e-4) where `tol` is
            at least 5e-3.
        contraction: Bounds ||W||_2 by this during training, with a parametrization; below 1 / max|act'| the
            equilibrium exists and is unique. None leaves W free.
        bias: Whether there is a b.
    """

    def __init__(
        self,
        features: int,
        inputs: int | None = None,
        *,
        activation: str = "tanh",
        operands: str = "fp32",
        contraction: float | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(features, inputs, operands, features, bias, like)
        one_of("activation", activation, ("tanh", "relu", "gelu", "sin", "identity"))
        self.activation = activation
        self.weight: Tensor = nn.Parameter(torch.empty(features, features, **like))
        self.reset_parameters()
        if contraction is not None:
            number("contraction", contraction, 0)
            parametrize.register_parametrization(self, "weight", SpectralBound(float(contraction)), unsafe=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws W anew, normal and scaled to its norm, and U and b as nn.Linear does."""
        norm = GAIN / _SLOPES.get(self.activation, 1.0)
        if parametrize.is_parametrized(self, "weight"):
            w = torch.empty_like(self.weight)
            draw(w, norm)
            self.weight = w
        else:
            draw(self.weight, norm)
        self.input.reset_parameters()

    def inject(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_of(x, self.inputs, self)
        return self.input(x), self.rounded(self.weight)

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        return ACTIVATIONS[self.activation](self._linear(z, injection))

    def _linear(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        u, w = injection
        return torch.addmm(u.reshape(-1, self.features), z.reshape(-1, self.features), w.mT).view(z.shape)

    def tail(self, injection: tuple[Tensor, Tensor]) -> tuple[Callable, Tail]:
        return lambda z, injection: (self._linear(z, injection),), Tail(self.activation)

    def whole_solve(self, injection: tuple[Tensor, Tensor]) -> WholeSolve:
        w, u, narrow = self._operands(injection)
        half = injection[1].dtype.itemsize < 4 or torch.is_autocast_enabled(w.device.type)
        return WholeSolve(
            **affine_problem(w, u.shape[0], self.activation, half),
            operands=(w, u),
            at=lambda z: (w, torch.addmm(u, z, w.mT)),
            options=lambda tol: kernel_options(self.activation, tol, narrow),
        )

    def _operands(self, injection: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Returns (W, u as rows, whether kernels may round W to bfloat16), detached, in the dtype of the state."""
        u, w = (t.detach() for t in injection)
        dtype, narrow = self.precision(u, w)
        return w.to(dtype), u.reshape(-1, self.features).to(dtype), narrow
