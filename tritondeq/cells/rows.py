"""What the cells that map each row of the state by itself have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import integer
from .base import Cell, one_of


class RowCell(Cell):
    """A cell that maps each row of a state [..., D] by itself, so that every row stops alone.

    Its injection is a tuple that begins with a tensor [..., n D], made of U x + b. The constructor takes the options of
    `Affine`, the width of U x + b, and the device and dtype of parameters.
    """

    batch_dims = -1

    def __init__(self, features: int, inputs: int | None, operands: str, width: int, bias: bool, like: dict[str, Any]):
        super().__init__()
        self.features, self.inputs, self.operands = features, features if inputs is None else inputs, operands
        integer("features", features)
        integer("inputs", self.inputs)
        one_of("operands", operands, ("fp32", "bf16"))
        self.input = nn.Linear(self.inputs, width, bias=bias, **like)

    def initial(self, x: Tensor, injection: tuple[Any, ...]) -> Tensor:
        return x.new_zeros(*injection[0].shape[:-1], self.features)

    def default_tol(self) -> float | None:
        return 1e-2 if self.operands == "bf16" else None

    def rounded(self, w: Tensor) -> Tensor:
        """Returns a weight as the iteration uses it."""
        return w.bfloat16().to(w.dtype) if self.operands == "bf16" else w

    def precision(self, *tensors: Tensor) -> tuple[torch.dtype, bool]:
        """Returns the dtype in which kernels take these operands, and whether they may round weights to bfloat16.

        They may where torch would: float16 has three bits more.
        """
        dtypes, kind = [t.dtype for t in tensors], tensors[0].device.type
        narrow = self.operands == "bf16" or torch.bfloat16 in dtypes
        narrow |= torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        return torch.float64 if torch.float64 in dtypes else torch.float32, narrow
