"""The rules of a solve, shared by the torch loop and by the whole-solve kernels so that both stop alike.

Evaluation k = 1, 2, ... of one sample, with f = f(z) at its current z, g = f - z, r = ||g||, s = ||f||:

    rel = r / (s + EPS)                         the residual
    active and rel < best:  best = rel, keep z  (false for NaN, so non-finite values never become best)
    active = best > bar                         bar is tol until a window stops the sample

Every WINDOW evaluations an active sample stops (bar = inf) when rel is not finite, or when best did not fall below
PROGRESS times what it was a window ago while best <= FLOOR (that low, standing still is the precision's doing;
higher up it may be a transient). The largest r seen at the first evaluation and at window ends is `peak`.

A sample is growing when steps > 2 WINDOW, s > GROWTH times its first s and r > STEADY * peak.
"""

EPS = 1e-30
WINDOW = 12
PROGRESS = 0.999
FLOOR = 1e-2
FLOOR_FP64 = 1e-8
GROWTH = 8.0
STEADY = 0.5
SAFEGUARD = 2.0  # an accelerated solver takes a plain step where rel > SAFEGUARD * best

CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE = range(5)
