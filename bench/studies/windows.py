"""Two series of statsmodels, their windows, and forecasts of these by rules without a net."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUNSPOTS, CO2 = "sunspots", "CO2"
TESTED = 0.25  # the last part of a series


@dataclass(frozen=True)
class Series:
    """Values at equal intervals, the first `split` to train on, and the task: `horizon` values after `context`."""

    values: Tensor  # [N], float64
    times: list[float]  # in years
    season: int
    context: int
    horizon: int
    split: int

    def windows(self, test: bool) -> Tensor:
        """Context and targets, [windows, context + horizon]: all targets before the split, or all after it."""
        length = self.context + self.horizon
        part = self.values[self.split - self.context :] if test else self.values[: self.split]
        return part.unfold(0, length, 1)

    @property
    def step(self) -> float:
        """The mean change from one value to the next in training: the unit of errors (MASE, Hyndman & Koehler 2006)."""
        return self.values[: self.split].diff().abs().mean().item()


@cache
def series(case: str) -> Series:
    """The series of that name in statsmodels; missing weeks of CO2 are interpolated linearly."""
    from statsmodels.datasets import co2, sunspots

    if case == SUNSPOTS:
        table = sunspots.load_pandas().data
        values, times, task = table["SUNACTIVITY"], table["YEAR"].tolist(), (11, 33, 11)
    else:
        values = co2.load_pandas().data["co2"].interpolate()
        times, task = (values.index.year + values.index.day_of_year / 365.25).tolist(), (52, 104, 26)
    values = torch.tensor(np.asarray(values, dtype=np.float64))
    return Series(values, times, *task, split=round((1 - TESTED) * len(values)))


def references(own: Series) -> dict[str, Tensor]:
    """Returns forecasts [windows, horizon] for the test windows by rules without a net.

    The last rule is fitted to the training windows by least squares.
    """
    past = own.windows(True)[:, : own.context]
    last, season = past[:, -1:], past[:, own.context - own.season :]
    seasonal = season[:, : own.horizon]
    train = own.windows(False)
    x, y = (train - train[:, own.context - 1, None]).tensor_split([own.context], dim=1)
    weights = torch.linalg.lstsq(bordered(x), y).solution
    return {
        "last value": last.expand(-1, own.horizon),
        "seasonal naive": seasonal,
        "seasonal naive with drift": seasonal + last - past[:, -1 - own.season, None],
        "linear": last + bordered(past - last) @ weights,
    }


def bordered(x: Tensor) -> Tensor:
    """With a column of ones."""
    return F.pad(x, (0, 1), value=1.0)


@dataclass(frozen=True)
class Data:
    """Windows less their last value, over the standard deviation of that in training; errors in `Series.step`."""

    x: Tensor  # [windows, context]
    y: Tensor  # [windows, horizon]
    test_x: Tensor
    test_y: Tensor
    unit: float  # of x and y, in the unit of errors


def data(own: Series, device: torch.device) -> Data:
    """Returns the windows less their last value, scaled to a standard deviation of 1."""
    parts = [part - part[:, own.context - 1, None] for part in (own.windows(False), own.windows(True))]
    unit = parts[0].std().item()
    cut = [(part / unit).float().to(device).tensor_split([own.context], dim=1) for part in parts]
    return Data(*cut[0], *cut[1], unit / own.step)
