"""What a cell is. Any nn.Module with `forward(z, x)` is one; this class adds what a cell may tell about itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import WholeSolve


class Cell(nn.Module):
    """f(z, u) with u = inject(x): one evaluation of the map whose fixed point a DEQ returns.

    Attributes:
        batch_dims: Leading dims of the state that index samples; -1 where each row is a sample of its own.
    """

    batch_dims = 1

    def inject(self, x: Any) -> Any:
        """All that does not depend on z, computed once per solve: a tensor or any nesting of them."""
        return x

    def initial(self, x: Any, injection: Any) -> Any:
        """Where a solve starts unless it is told: zeros like x."""
        return torch.zeros_like(x)

    def forward(self, z: Any, injection: Any) -> Any:
        """f(z, injection), of the structure, shapes and device of z."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, injection)")

    def whole_solve(self, injection: Any) -> WholeSolve | None:
        """The op whose kernels hold this cell, if there is one: they solve it in one launch, or in one a step."""
        return None

    def tail(self) -> tuple[Callable[[Any, Any], Any], str] | None:
        """(g, name) if forward(z, injection) is the activation of that name (kernels/affine.py lists them) of
        g(z, injection): a fused step applies it as it reads."""
        return None

    def default_tol(self) -> float | None:
        """Tolerance of a DEQ that is given none; None leaves it to the dtype of the state."""
        return None


def features_of(x: Any, features: int, cell: nn.Module) -> None:
    """Raises unless x is a floating-point tensor [..., features]."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.") + " tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor for {type(cell).__name__}, got {got}")
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features in its last dim for {type(cell).__name__}, got shape {tuple(x.shape)}"
        )
