"""Random solves, each judged in float64: `python -m tests.fuzz --solves 10000 --seed 0`.

fuzz_kinds.py, fuzz_more.py and fuzz_pairs.py have the kinds of cases; fuzz_judge.py has the verdicts and their bounds.
The exit status is 1 where an answer is silently wrong, or where an answer is due and an error came.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from fuzz_draw import Draw
from fuzz_judge import BROKEN, REPORTED, RIGHT, UNNAMED, WRONG, Verdict, judge
from fuzz_kinds import KINDS as CELLS
from fuzz_more import MORE
from fuzz_pairs import PROGRAMS

KINDS = CELLS | MORE | PROGRAMS
VERDICTS, BAD = (RIGHT, REPORTED, UNNAMED, BROKEN, WRONG), (BROKEN, WRONG)


@dataclass(frozen=True)
class Case:
    """One random case, which `seed` and `index` determine."""

    seed: int
    index: int

    def drawn(self) -> tuple[Draw, str]:
        draw = Draw(self.seed, self.index)
        (kind,) = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()])
        return draw, kind

    def run(self) -> tuple[str, Verdict]:
        """Returns the kind and the verdict."""
        draw, kind = self.drawn()
        torch.manual_seed(draw.getrandbits(40))
        return kind, judge(KINDS[kind][1](draw))

    def __str__(self) -> str:
        return f"python -m tests.fuzz --seed {self.seed} --only {self.index}"


def table(counts: Counter) -> str:
    """Returns the number of cases of each kind and verdict."""
    lines = [f"{'kind':<24}" + "".join(f"{name:>14}" for name in VERDICTS)]
    for kind in [*KINDS, "all"]:
        row = [sum(n for (k, v), n in counts.items() if v == name and kind in (k, "all")) for name in VERDICTS]
        lines.append(f"{kind:<24}" + "".join(f"{n:>14}" for n in row))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--solves", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one case")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: Counter = Counter()
    start = last = time.monotonic()
    indices = range(given.solves) if given.only is None else [given.only]
    try:
        for done, index in enumerate(indices, 1):
            case = Case(given.seed, index)
            kind, verdict = case.run()
            counts[kind, verdict.name] += 1
            if verdict.name in BAD or given.only is not None:
                print(f"{verdict.name}: {kind}: {verdict.detail}\n    {case}", flush=True)
            if time.monotonic() > last + 10:
                last = time.monotonic()
                bad = sum(n for (_, name), n in counts.items() if name in BAD)
                print(f"{done} of {len(indices)} cases in {last - start:.0f} s, {bad} bad", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted after {sum(counts.values())} of {len(indices)} cases")
        return 130
    print(table(counts))
    return int(any(counts[key] for key in counts if key[1] in BAD))


if __name__ == "__main__":
    sys.exit(main())
