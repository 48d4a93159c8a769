"""What the kernels of row cells need to know beside the tensors: which op, in how many bfloat16 terms, which tanh."""

from typing import Any

import torch
from torch import Tensor

from .kernels.formulas import FAST
from .kernels.launch import FEATURES

FAST_TANH = 5e-3  # the tolerance from which the hardware's tanh is accurate enough


def affine_problem(w: Tensor, rows: int, activation: str, half: bool = False) -> dict[str, Any]:
    """Returns `op` and `problem` of the `WholeSolve` of act(W z + u); `half`: torch would multiply in 16 bits."""
    features = len(w)
    problem: dict[str, Any] = {"features": features, "dtype": w.dtype, "activation": activation}
    if features <= FEATURES:
        return {"op": "rows.affine", "problem": problem}
    exact = torch.get_float32_matmul_precision() == "highest"
    problem |= {"rows": rows, "cell": "bf16" if half else "fp32" if exact else "tf32"}
    return {"op": "steps.affine", "problem": problem}


def bf16_terms(tol: float, narrow: bool) -> int:
    """Returns how many bfloat16 terms of a weight a solve to this tolerance needs; one if weights are `narrow`."""
    return 1 if narrow else 2 if tol >= 1e-5 else 3


def kernel_options(activation: str, tol: float, narrow: bool) -> dict[str, Any]:
    """Returns the kernels' options for a solve to this tolerance.

    The hardware's tanh, and what is made of it, has a relative error of 5e-4. It is taken where weights are one
    bfloat16 term and `tol` is ten times that error.
    """
    terms = bf16_terms(tol, narrow)
    fast = terms == 1 and tol >= FAST_TANH
    return {"activation": FAST.get(activation, activation) if fast else activation, "terms": terms}
