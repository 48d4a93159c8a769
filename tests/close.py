"""How close is close: the one table of tolerances, and the assertions that read it."""

import torch
from torch import Tensor

FACTOR = 2.0  # a kernel may be this much less accurate than the eager loop at the same precision and tolerance
# Relative error that a kernel may have whatever the eager loop's, by the bf16 terms of W: what W's own rounding does to
# a fixed point at contraction 0.6, and a few roundings of fp32. With one term W must be bf16 for this to hold.
FLOOR = {1: 1e-6, 2: 1e-5, 3: 1e-6}
RESIDUAL = 0.05  # relative error of a reported residual, or of tol where that is larger
RESIDUAL_FLOOR = 5e-7  # its absolute error: a few roundings of fp32


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_as_eager(actual: Tensor, eager: Tensor, exact: Tensor, terms: int = 3) -> None:
    """`actual` is as close to `exact` (float64) as the eager loop's result, within FACTOR and FLOOR."""
    mine, theirs = error(actual, exact), error(eager, exact)
    assert mine <= FACTOR * theirs + FLOOR[terms], f"error {mine:.2e}, eager loop's {theirs:.2e}"


def assert_residual(reported: Tensor, true: Tensor, tol: float) -> None:
    """Reported residuals are those of the returned iterates, recomputed in float64."""
    off = (reported.double() - true).abs()
    bound = RESIDUAL * torch.clamp(true, min=tol) + RESIDUAL_FLOOR
    assert (off <= bound).all(), f"residuals off by {off.max():.2e}: {reported.tolist()} for {true.tolist()}"
