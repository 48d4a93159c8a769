"""What a study is: contestants, cases, settings, measures, and a function that trains one contestant with one seed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

SUITES = ("tiny", "quick", "full")
Run = dict[str, Any]  # case, contestant, seed, and what `Study.run` measured: all that JSON holds
Draw = Callable[[Any], None]  # draws into a matplotlib Figure


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        key: Where a run has it. A run may lack it: a stack has no residual.
        title: With its unit.
        better: "more", "less", or "" where neither is better and nothing is judged.
        digits: Behind the point.
        scale: The table shows the value times this.
        main: Whether the summary of all studies judges it too.
        tested: Key of the number of test samples, where the value is a share of them in %: the verdict then allows for
            their chance.
    """

    key: str
    title: str
    better: str = ""
    digits: int = 1
    scale: float = 1.0
    main: bool = False
    tested: str = ""

    def __post_init__(self):
        if self.better not in ("more", "less", ""):
            raise ValueError(f"better must be 'more', 'less' or '', got {self.better!r}")
        if self.main and not self.better:
            raise ValueError(f"main must be False for {self.key!r}, of which neither more nor less is better")


@dataclass(frozen=True)
class Job:
    """One run: train this contestant on this case with this seed, and measure it."""

    case: str
    contestant: str
    seed: int
    settings: dict[str, Any]
    device: torch.device


@dataclass(frozen=True)
class Study:
    """A question, and how it is put to every contestant alike.

    Attributes:
        title, question, data: For the report; `data` says where the data is from and how it is split.
        settings: By suite, everything that a run depends on beside case, contestant and seed; plain values of JSON.
        contestants: Those of `contestants.py`, and others of one's own. The first is the one that is judged.
        measures: Columns of the table, in order.
        run: `run(job)` returns the measures, plain values of JSON, a curve being a list of [x, y]. It depends on
            nothing but the job.
        pictures: From the runs of all cases, seeds and contestants, what to draw, by name.
        says: From the same, sentences of what the numbers show. They are written from the numbers, whatever these are.
        cases: Data sets or tasks, each with a table of its own.
        packages: What `run` imports beside what the demonstrations need. The module itself does not import them, so
            that its results can be reported without.
    """

    name: str
    title: str
    question: str
    data: str
    settings: dict[str, dict[str, Any]]
    contestants: tuple[str, ...]
    measures: tuple[Measure, ...]
    run: Callable[[Job], dict[str, Any]]
    pictures: Callable[[list[Run]], dict[str, Draw]]
    says: Callable[[list[Run]], Iterable[str]] = lambda runs: ()
    cases: tuple[str, ...] = ("",)
    packages: tuple[str, ...] = ()

    def __post_init__(self):
        if missing := [suite for suite in SUITES if suite not in self.settings]:
            raise ValueError(f"settings must have every suite, got none for {', '.join(missing)}")

    def jobs(self, suite: str, seeds: Iterable[int], device: torch.device) -> Iterable[Job]:
        """All of them: seed by seed, so that what is interrupted is complete for some."""
        for seed in seeds:
            for case in self.cases:
                for contestant in self.contestants:
                    yield Job(case, contestant, seed, self.settings[suite], device)
