"""Who wins: one rule for all studies."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, variance

from .study import Measure, Run

LEVEL = 0.95
RULE = (
    "A difference of means over seeds is a win or a loss where it is larger than the "
    f"{LEVEL:.0%} quantile (two-sided) of Student's t times its standard error, and a tie otherwise. The variance of a "
    "share of test samples is taken to be at least that of their chance, p (1 - p) / n. Counts without any spread are "
    "compared as they are. One seed gives no verdict. Of twenty comparisons of equals one comes out as a win or a loss."
)


@dataclass(frozen=True)
class Verdict:
    """`word`: win, tie or loss of ours, or "" where there is none; `allowed`: the difference that is still a tie."""

    word: str
    ours: float
    theirs: float
    allowed: float


def compare(ours: Sequence[float], theirs: Sequence[float], better: str, samples: int | None = None) -> Verdict:
    """By RULE.

    Args:
        ours: A value per seed.
        theirs: Likewise.
        better: "more" or "less".
        samples: The number of test samples of each seed, where values are shares of them in %.
    """
    a, b = mean(ours), mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Verdict("", a, b, float("inf"))
    error = sqrt(_variance(ours, samples) / len(ours) + _variance(theirs, samples) / len(theirs))
    allowed = _quantile(len(ours) + len(theirs) - 2) * error
    gap = a - b if better == "more" else b - a
    return Verdict("tie" if abs(gap) <= allowed else "win" if gap > 0 else "loss", a, b, allowed)


def against(ours: Sequence[float], known: float, better: str) -> Verdict:
    """By RULE, of a value per seed and one that is the same for all seeds, which has no error."""
    a = mean(ours)
    if len(ours) < 2:
        return Verdict("", a, known, float("inf"))
    allowed = _quantile(len(ours) - 1) * sqrt(variance(ours) / len(ours))
    gap = a - known if better == "more" else known - a
    return Verdict("tie" if abs(gap) <= allowed else "win" if gap > 0 else "loss", a, known, allowed)


def judge(runs: Sequence[Run], measure: Measure, ours: str, theirs: str) -> Verdict | None:
    """Of the runs of one case; None where a contestant lacks the measure."""
    own = {
        name: [r for r in runs if r["contestant"] == name and r.get(measure.key) is not None] for name in (ours, theirs)
    }
    if not measure.better or not all(own.values()):
        return None
    samples = own[ours][0][measure.tested] if measure.tested else None
    return compare(*([r[measure.key] for r in own[name]] for name in (ours, theirs)), measure.better, samples)


def _variance(values: Sequence[float], samples: int | None) -> float:
    share = mean(values)
    chance = share * (100 - share) / samples if samples else 0.0
    return max(variance(values), chance)


def _quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))
