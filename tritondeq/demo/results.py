"""What the demonstrations find out: all that their tables and pictures are made of."""

from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..solution import Solution

TEST = 360  # images that nobody trains on


@dataclass
class Data:
    """Images [N, 1, 8, 8] in 0 ... 1 and labels [N], by which the split is stratified."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def split(cls, seed: int, device: torch.device) -> "Data":
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=TEST, stratify=labels, random_state=seed)
        x, test_x = (torch.tensor(p, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16 for p in parts[:2])
        y, test_y = (torch.tensor(p, dtype=torch.long, device=device) for p in parts[2:])
        return cls(x, y, test_x, test_y)


@dataclass
class Run:
    """Digits: one model, trained with one seed. Of test samples where not said."""

    model: str
    seed: int
    parameters: int
    memory: int  # bytes, at the peak of one training step
    seconds: float  # of training
    accuracy: float  # %
    steps: tuple[float, float]  # per sample, before and after training
    by_allowed: list[float] = field(default_factory=list)  # accuracy in % by steps in ALLOWED; DEQ and loop
    solves: dict[str, Solution] = field(default_factory=dict)  # DEQ: traced beyond the tolerance, before and after
    counts: Tensor | None = None  # DEQ: steps of each sample after training
    guesses: Tensor | None = None  # DEQ
    converged: float = 0.0  # %, DEQ
    data: Data | None = None  # DEQ

    @property
    def label(self) -> str:
        return f"{self.model} (seed {self.seed}) {self.accuracy:.1f} %"


@dataclass
class Score:
    """Strings of one length."""

    exact: float  # % of strings whose every bit is right
    bits: float  # % of bits that are right
    steps: float  # mean per string


@dataclass
class Outcome:
    """One model, trained with one seed, tested at each length."""

    model: str
    seed: int
    parameters: int
    memory: int  # bytes, at the peak of one training step, of the most blocks that training draws
    seconds: float  # of training
    scores: dict[int, Score] = field(default_factory=dict)

    @property
    def label(self) -> str:
        longest = max(self.scores)
        return f"{self.model} (seed {self.seed}) {self.scores[longest].exact:.0f} % of {longest} bits"
