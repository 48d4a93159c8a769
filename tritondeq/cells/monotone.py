"""z = act(W z + U x + b) with W so parametrised that there is one solution, whatever the parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import number
from ..solvers import PeacemanRachford, Solver
from ..solvers.splitting import Splitting
from .affine import GAIN, Affine
from .base import is_linear, one_of
from .contraction import norm_bound


class MonotoneForm(nn.Module):
    """Parametrization W = (1 - m) I - A'A + B - B', for torch.nn.utils.parametrize; always in W's precision."""

    def __init__(self, margin: float, drawn: bool = True):
        super().__init__()
        self.margin, self.drawn = margin, drawn  # else `draw` comes after torch has registered this

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
            return (1 - self.margin) * eye - a.mT @ a + b - b.mT

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (A, B) of the nearest W in this set: the excess of its symmetric part over 1 - m is cut off."""
        if not self.drawn:  # to decompose a wide matrix would take a second
            return w, w.clone()
        values, vectors = torch.linalg.eigh((w + w.mT) / 2)
        least = torch.finfo(w.dtype).eps  # a row of A that is zero would have a gradient of zero for ever
        a = (1 - self.margin - values).clamp_min(least).sqrt().unsqueeze(1) * vectors.mT
        return a, (w - w.mT) / 4

    @torch.no_grad()
    def draw(self, a: Tensor, b: Tensor) -> None:
        """Draws A and B such that W is about as large as a normal matrix of norm GAIN.

        The parts of that have norm g = GAIN / sqrt 2. Here B - B' has it, and for m at most 1 the eigenvalues of the
        symmetric part are between -g and min(g, 1 - m): A = s I + X + X', and has its own between the roots of
        1 - m - g (or 0) and of 1 - m + g.
        """
        self.drawn = True
        n, g = len(a), GAIN / 2**0.5
        low, high = max(1 - self.margin - g, 0.0) ** 0.5, (max(1 - self.margin, 0.0) + g) ** 0.5
        x = torch.empty_like(a).normal_(std=(high - low) / (32 * n) ** 0.5)
        torch.add(x, x.mT, out=a).diagonal().add_((high + low) / 2)
        b.normal_(std=GAIN / (4 * n**0.5))


class Monotone(Affine):
    """z = act(W z + U x + b),  W = (1 - m) I - A'A + B - B', on each row by itself (Winston and Kolter 2020).

    The symmetric part of I - W is m I + A'A, so the equilibrium exists and is unique for every value of the parameters,
    also where ||W|| > 1 and plain iteration diverges. `PeacemanRachford`, this cell's default solver in a DEQ, always
    reaches it. At initialisation with m at most 1, W is about as large as `Affine`'s.

    Up to 256 features, and on a GPU, a solve is one Triton launch, and so is its adjoint: by PeacemanRachford or
    ForwardBackward (with tanh at alpha = 1 only), Picard or Anderson(memory <= 4).

    Args:
        activation: "relu" or "tanh", which are proximal operators.
        margin: m, above 0. A small one allows more, and takes more steps.
        features, inputs, operands, bias: As for `Affine`.
    """

    def __init__(
        self,
        features: int,
        inputs: int | None = None,
        *,
        activation: str = "relu",
        margin: float = 1.0,
        operands: str = "fp32",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        one_of("activation", activation, ("relu", "tanh"))
        number("margin", margin, 0)
        super().__init__(
            features, inputs, activation=activation, operands=operands, bias=bias, device=device, dtype=dtype
        )
        self.margin = float(margin)
        parametrize.register_parametrization(self, "weight", MonotoneForm(self.margin, drawn=False), unsafe=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A and B anew, normal around a multiple of I and around 0, and U and b as nn.Linear does."""
        if not parametrize.is_parametrized(self, "weight"):
            self.weight.zero_()
            return
        made: Any = self.parametrizations
        made.weight[0].draw(made.weight.original0, made.weight.original1)
        self.input.reset_parameters()

    def splitting(self, injection: tuple[Tensor, Tensor]) -> Splitting:
        w, u, narrow = self._operands(injection)

        def bound() -> float:
            return norm_bound(torch.eye(len(w), dtype=w.dtype, device=w.device) - w).item()

        return Splitting(w, u, self.activation, self.margin, bound, narrow)

    def default_solver(self) -> Solver:
        return PeacemanRachford()

    @torch.no_grad()
    def monotonicity(self) -> Tensor:
        """Returns the least eigenvalue of the symmetric part of I - W, in float64: `margin` or more, up to rounding."""
        w = self.weight.double()
        return 1 - torch.linalg.eigvalsh((w + w.mT) / 2)[-1]

    @torch.no_grad()
    def lipschitz(self) -> Tensor:
        """Returns a bound of ||z*(x) - z*(y)|| / ||x - y||, a scalar: ||U|| / m (Pabbaraju et al. 2021, theorem 1).

        Raises:
            ValueError: `input` is another module or has a hook, such as a LoRA adapter, so that U is not known.
        """
        if not is_linear(self.input):
            raise ValueError(
                f"the norm of input is not known: it is no plain nn.Linear, but {type(self.input).__name__}"
            )
        return norm_bound(self.input.weight) / self.margin
