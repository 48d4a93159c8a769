"""The rules by which a sample stops, and its outcome: for the torch loop here, and for the kernels by the constants.

Evaluation k = 1, 2, ... of one sample gives f = f(z), the defect g = f - z, r = ||g||, s = ||f||, and

    size = max(relative * max(s, SHARE * s_1), scale, EPS)
    rel = r / size                         the residual of z; NaN where s is not finite
    rel < best:  best = rel, z is best     false for NaN, so a non-finite value never becomes the best
    active = best > bar                    bar is tol until a window stops the sample

`relative` and `scale` belong to a solve. In a forward one they are 1 and atol / tol: r is relative to s, and where s
has fallen below SHARE of s_1 to that, or a fixed point at 0 would never be reached; an s_1 that is not finite counts as
0. In a linear one, whose right-hand side has norm 1, they are 0 and 1: r is relative to that, and not to the solution,
which a map that hardly contracts makes large.

At the end of every WINDOW evaluations bar becomes infinite, which stops the sample, where rel is not finite. At
k = WINDOW * 2, 4, 8, ... it becomes so where the sample has stood still for as many evaluations as it had before:

    PROGRESS * mark < best <= FLOOR and s >= PROGRESS * low        FLOOR_FP64 in float64

with `mark` the best at the test before, the first of which is at k = WINDOW and only sets it, and `low` the least s at
these. A decay to 0 lowers s, and not rel. Above FLOOR a residual that stands still may be a transient: in a chain of
tokens, each of which waits for the one before, it falls when the last is reached.

A sample that has stopped is frozen, so its last r and s are those of the z it stopped at. `peak` is the largest r seen
at k = 1 and at window ends. Then, in this order:

    rel not finite                         NONFINITE
    s > GROWTH * s_1 and r > STEADY * peak GROWING: the norm runs away, and takes the relative residual down with it
    best <= tol                            CONVERGED
    bar infinite                           PLATEAU
    otherwise                              MAX_STEPS

Norms are plain sums of squares: magnitudes between 1e-15 and 1e15 are safe in fp32.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

EPS = 1e-30
WINDOW = 12
PROGRESS = 0.999
FLOOR = 1e-2
FLOOR_FP64 = 1e-8
SHARE = 1e-2
GROWTH = 8.0
STEADY = 0.5
SAFEGUARD = 100.0  # an accelerated solver takes a plain step where rel > SAFEGUARD * best: it has been thrown off

CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE = range(5)
_IN_NUMPY = {torch.float32: numpy.float32, torch.float64: numpy.float64}


def residual(y: Tensor, z: Tensor, base: Tensor | None, start: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Returns the residual [B] of z [B, N] whose image is y, with `relative` 1.

    Without `base`, the least of what it is relative to, that is found from the start in place of its image.
    """
    g = y - z
    if mask is not None:
        g, y, start = (torch.where(mask, x, 0.0) for x in (g, y, start))
    r, s = (torch.linalg.vector_norm(x, dim=1) for x in (g, y))
    if base is None:
        base = (SHARE * torch.linalg.vector_norm(start, dim=1)).clamp_(min=max(scale, EPS))
    return r / torch.maximum(s, base)


@numpy.errstate(all="ignore")
def _quietly(update: Callable, k: int, r: Any, s: Any) -> Any:
    return update(k, r, s)  # norms may overflow, and residuals be NaN


class Rules:
    """Holds the state of these rules for a batch: on a CPU in NumPy's arrays, whose operations cost less.

    Attributes:
        best, bar, base, first, peak, mark, low: What the rules store of each sample, [B]. `base` is the least size,
            `first` s_1, which exists from the first `update` on, as `peak` does; `mark` and `low` from WINDOW on.
        r, s, rel: Norms and residual of the last evaluation, [B]; they exist from the first `update` on.
        active: Whether a sample goes on, bool [B].
        all_improved: Whether the last evaluation is known to be the best of every sample; not asked on a GPU.

    Args:
        batch: Number of samples B.
        dtype: float32 or float64, the dtype of norms.
        device: Where the vectors live.
        tol: Residual at which a sample has converged.
        relative, scale: What the residual is relative to.
        plain: Whether norms will be plain tensors, which NumPy can read on a CPU.
    """

    def __init__(
        self, batch: int, dtype: torch.dtype, device: torch.device, tol: float,
        relative: float = 1.0, scale: float = 0.0, plain: bool = True,
    ):  # fmt: skip
        self.tol, self.relative = tol, relative
        self.floor = FLOOR_FP64 if dtype == torch.float64 else FLOOR
        self._host = plain and device.type == "cpu" and dtype in _IN_NUMPY
        self._xp: Any = numpy if self._host else torch
        like = {"dtype": _IN_NUMPY[dtype]} if self._host else {"dtype": dtype, "device": device}
        empty = self._xp.empty
        self._best, self._bar, self._base = empty(batch, **like), empty(batch, **like), empty(batch, **like)
        for vector, value in ((self._best, math.inf), (self._bar, tol), (self._base, max(scale, EPS))):
            vector.fill(value) if self._host else vector.fill_(value)
        self._active = self._best > 0
        self._together = 0  # evaluations of all samples, before those in `_evaluated`
        self._evaluated: list[Any] = []  # which samples were active, before each evaluation after these
        self.left: int | None = batch if self._host else None

    def update(self, k: int, r: Tensor, s: Tensor) -> Tensor | None:
        """Takes the norms r, s [B] of evaluation k, from which on `rel` is that of this one.

        Returns:
            Where the evaluation is the best so far, bool [B]; None where it is known to be that of every sample.
        """
        if not self._host:
            return self._update(k, r, s)
        improved = _quietly(self._update, k, r.numpy(), s.numpy())
        self.left = int(numpy.count_nonzero(self._active))
        return None if self.all_improved else torch.from_numpy(improved)

    def _update(self, k: int, r: Any, s: Any) -> Any:
        xp = self._xp
        if k == 1:
            self._first, self._peak = s, r
            if self.relative:
                share = self.relative * (SHARE * s)
                self._base = xp.maximum(self._base, xp.where(xp.isfinite(share), share, 0.0))
        size = self._base
        if self.relative:
            size = xp.maximum(s if self.relative == 1 else self.relative * s, size)
        rel = s * 0.0 + r / size
        self._r, self._s, self._rel = r, s, rel
        if self.left == r.shape[0]:
            self._together += 1
        else:
            self._evaluated.append(self._active)
        improved = rel < self._best
        self.all_improved = self._host and numpy.count_nonzero(improved) == len(r)
        self._best = rel if self.all_improved else xp.where(improved, rel, self._best)
        if k % WINDOW == 0:
            self._end_window(k // WINDOW)
        self._active = self._best > self._bar
        return improved

    def _end_window(self, number: int) -> None:
        xp = self._xp
        ended, s = ~xp.isfinite(self._rel), self._s
        if number & (number - 1) == 0:
            if number > 1:
                still = (self._best <= self.floor) & (s >= PROGRESS * self._low)
                ended |= still & (self._best > PROGRESS * self._mark)
            self._mark, self._low = self._best, s if number == 1 else xp.minimum(self._low, s)
        self._bar = xp.where(ended, math.inf, self._bar)
        self._peak = xp.maximum(self._peak, self._r)

    def _shown(self, array: Any) -> Tensor:
        return torch.from_numpy(array) if self._host else array

    best = property(lambda self: self._shown(self._best))
    bar = property(lambda self: self._shown(self._bar))
    base = property(lambda self: self._shown(self._base))
    first = property(lambda self: self._shown(self._first))
    r = property(lambda self: self._shown(self._r))
    s = property(lambda self: self._shown(self._s))
    rel = property(lambda self: self._shown(self._rel))
    active = property(lambda self: self._shown(self._active))

    @property
    def last(self) -> Tensor | None:
        """As `rel`, or None where it is known to be `best`."""
        return None if self._rel is self._best else self.rel

    def safe(self) -> Tensor:
        """Returns where an accelerated step may be taken, bool [B]."""
        return self._shown(self._rel <= SAFEGUARD * self._best)

    @property
    def steps(self) -> Tensor:
        """Evaluations of each sample while it was active, int32 [B]."""
        steps = torch.full_like(self.active, self._together, dtype=torch.int32)
        return (
            steps + self._shown(self._xp.stack(self._evaluated)).sum(0, dtype=torch.int32) if self._evaluated else steps
        )

    def status(self) -> Tensor:
        """Returns the outcome of each sample, int32 [B]."""
        xp, stopped = self._xp, self._xp.isinf(self._bar)
        found = xp.where(self._best <= self.tol, CONVERGED, xp.where(stopped, PLATEAU, MAX_STEPS))
        growing = (self._s > GROWTH * self._first) & (self._r > STEADY * self._peak)
        found = xp.where(xp.isfinite(self._rel), xp.where(growing, GROWING, found), NONFINITE)
        return self._shown(found).int()
