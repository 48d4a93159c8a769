"""The rules by which a sample stops, and its outcome: for the torch loop here, and for the kernels by the constants.

Evaluation k = 1, 2, ... of one sample gives f = f(z), the defect g = f - z, r = ||g||, s = ||f||, and

    rel = r / (s + EPS)                    the residual of z
    rel < best:  best = rel, z is best     false for NaN, so a non-finite value never becomes the best
    active = best > bar                    bar is tol until a window stops the sample

At the end of every WINDOW evaluations bar becomes infinite, which stops the sample, where rel is not finite, or where
best did not fall below PROGRESS times its value a window ago while best <= FLOOR: that low, standing still is the
precision's doing; higher up it may be a transient. `peak` is the largest r seen at k = 1 and at window ends.

A sample that has stopped is frozen, so its last r and s are those of the z it stopped at. Then, in this order:

    rel not finite                         NONFINITE
    s > GROWTH * s_1 and r > STEADY * peak GROWING: the norm runs away, and takes the relative residual down with it
    best <= tol                            CONVERGED
    bar infinite                           PLATEAU
    otherwise                              MAX_STEPS

Norms are plain sums of squares: magnitudes between 1e-15 and 1e15 are safe in fp32.
"""

import math

import torch
from torch import Tensor

EPS = 1e-30
WINDOW = 12
PROGRESS = 0.999
FLOOR = 1e-2
FLOOR_FP64 = 1e-8
GROWTH = 8.0
STEADY = 0.5
SAFEGUARD = 100.0  # an accelerated solver takes a plain step where rel > SAFEGUARD * best: it has been thrown off

CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE = range(5)


class Rules:
    """Holds the state of these rules for a batch.

    Attributes:
        best, bar, first, peak, mark: What is known of each sample, [B]: `first` is s_1, and `mark` is the best of
            a window ago. The last three exist from the first `update` on.
        r, s, rel: Norms and residual of the last evaluation, [B]; they exist from the first `update` on.
        active: Whether a sample goes on, bool [B].
        all_improved: Whether the last evaluation is known to be the best of every sample; asked on a CPU only.

    Args:
        batch: Number of samples B.
        dtype: float32 or float64, the dtype of norms.
        device: Where the vectors live.
        tol: Relative residual at which a sample has converged.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, tol: float):
        self.tol = tol
        self.floor = FLOOR_FP64 if dtype == torch.float64 else FLOOR
        self.best = torch.full((batch,), math.inf, dtype=dtype, device=device)
        self.bar = torch.full_like(self.best, tol)
        # Tensors: Python numbers cost a conversion a step.
        self.eps, self.safeguard = (torch.full((), value, dtype=dtype, device=device) for value in (EPS, SAFEGUARD))
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self._asks = self.best.device.type == "cpu"
        self._evaluated: list[Tensor] = []  # `active` before each evaluation

    def update(self, k: int, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the norms r, s [B] of evaluation k; returns (rel, whether it is the best so far), both [B]."""
        rel = r / (s + self.eps)
        self.r, self.s, self.rel = r, s, rel
        self._evaluated.append(self.active)
        improved = rel < self.best
        self.all_improved = self._asks and bool(improved.all())
        self.best = rel if self.all_improved else torch.where(improved, rel, self.best)
        if k == 1:
            self.first, self.peak, self.mark = s, r, self.best
        if k % WINDOW == 0:
            stalled = (self.best > PROGRESS * self.mark) & (self.best <= self.floor)
            self.bar = torch.where(stalled | ~rel.isfinite(), math.inf, self.bar)
            self.peak = torch.maximum(self.peak, r)
            self.mark = self.best
        self.active = self.best > self.bar
        return rel, improved

    def safe(self) -> Tensor:
        """Returns where an accelerated step may be taken, bool [B]."""
        return self.rel <= self.safeguard * self.best

    @property
    def steps(self) -> Tensor:
        """Evaluations of each sample while it was active, int32 [B]."""
        return torch.stack(self._evaluated).sum(0, dtype=torch.int32)

    def status(self) -> Tensor:
        """Returns the outcome of each sample, int32 [B]."""
        outcome = torch.where(self.best <= self.tol, CONVERGED, torch.where(self.bar.isinf(), PLATEAU, MAX_STEPS))
        growing = (self.s > GROWTH * self.first) & (self.r > STEADY * self.peak)
        outcome = torch.where(growing, GROWING, outcome)
        return torch.where(self.rel.isfinite(), outcome, NONFINITE).int()
