"""The studies' README and pictures, made from results files alone."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from tritondeq.demo.training import save
from tritondeq.toolbox import spread

from ..report import markdown
from . import STUDIES, plots, results, study
from . import contestants as who
from .study import Measure, Run, Study
from .train import COSTS
from .verdict import RULE, judge

WORDS = {"win": "wins", "tie": "ties", "loss": "losses"}
JUDGED = (who.DEQ, who.HYBRID, who.WIDE)
QUICK = {"tiny": "it shows that all works, and nothing else", "quick": "minutes on a CPU: small nets, trained briefly"}
HEAD = """# Studies: where an equilibrium wins, ties and loses

<!-- written by `python -m tritondeq.bench.studies report`, not by hand -->

Each study trains the same cell as a deep equilibrium (DEQ), as a hybrid, and as the explicit nets that these have to be
compared with: the same optimiser, learning rate, number of updates and order of batches, nothing tuned for one of them.
Memory is that of one training step, beside parameters and gradients. Steps are the blocks that a test sample goes
through. Work is that of products and convolutions, of a batch which goes on until its slowest sample is done. ± is the
standard deviation over seeds.

"""


def write(folder: Path, readme: Path) -> list[Path]:
    """Writes the README, and the pictures beside the results in `folder`; returns all paths.

    Raises:
        ValueError: a file is no results file, or there is none.
    """
    found = _found(folder)
    paths = [readme]
    for name, each in found.items():
        for picture, draw in study(name).pictures(each[0]["runs"]).items():
            paths.append(save(draw, folder / f"{name}_{picture}.png"))
    readme.write_text(text(folder, readme.parent))
    return paths


def text(folder: Path, beside: Path) -> str:
    """The README, which will stand in the folder `beside`."""
    found = _found(folder)
    parts = [
        HEAD + "\n".join(f"* {name}: {said}" for name, said in who.MEANS.items()),
        *_summary(found),
        *_costs(found),
    ]
    for name, each in found.items():
        parts += _section(study(name), each, folder, beside)
    return "\n\n".join(parts) + "\n"


def _found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = results.chosen(folder)
    found = {name: found[name] for name in STUDIES if name in found}
    if not any(each[0]["runs"] for each in found.values()):
        raise ValueError(f"no results in {folder}: run a study first")
    return {name: each for name, each in found.items() if each[0]["runs"]}


def _summary(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """What every main measure says of those who are judged, and the rule."""
    yield "## In short"
    rows, counts = [["study", "measure", *who.RIVALS, *JUDGED]], {ours: Counter() for ours in JUDGED}
    for study_, case, runs in _cases(found):
        for measure in (m for m in study_.measures if m.main):
            means = [_mean(runs, name, measure) for name in who.RIVALS]
            cells = []
            for ours in JUDGED:
                judged = [judge(runs, measure, ours, rival) for rival in who.RIVALS]
                words = [verdict.word if verdict else "-" for verdict in judged]
                counts[ours].update(words)
                said = ", ".join(words) if any(word in WORDS for word in words) else ""
                cells.append(f"{_mean(runs, ours, measure)} {said}".strip())
            rows.append([case, f"{measure.title} ({measure.better} is better)", *means, *cells])
    yield markdown(rows)
    told = "; ".join(
        f"the {ours} has {', '.join(f'{count[word]} {plural}' for word, plural in WORDS.items())}"
        for ours, count in counts.items()
        if any(count[word] for word in WORDS)
    )
    yield f"Words are against {', '.join(who.RIVALS)}, in this order. In this table {told or 'none is judged'}. {RULE}"


def _costs(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Costs of those who are judged, over the stack's."""
    yield "What it costs, as a multiple of what the stack costs:"
    rows = [["study", "of the", *(_short(m) for m in COSTS if m.better)]]
    for _, case, runs in _cases(found):
        for ours in JUDGED:
            pairs = [[_values(runs, name, m) for name in (ours, who.STACK)] for m in COSTS if m.better]
            if any(map(all, pairs)):
                rows.append([case, ours, *(f"{mean(a) / mean(b):.2f}" if a and b else "" for a, b in pairs)])
    yield markdown(rows)


def _cases(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[Study, str, list[Run]]]:
    """(study, name of it and the case, runs) of the first machine."""
    for name, each in found.items():
        for case in study(name).cases:
            if runs := plots.of(each[0]["runs"], case=case):
                yield study(name), ", ".join(filter(None, (name, case))), runs


def _mean(runs: list[Run], contestant: str, measure: Measure) -> str:
    values = _values(runs, contestant, measure)
    return f"{measure.scale * mean(values):,.{measure.digits}f}" if values else ""


def _values(runs: list[Run], contestant: str, measure: Measure) -> list[float]:
    return [r[measure.key] for r in plots.of(runs, contestant=contestant) if r.get(measure.key) is not None]


def _section(study: Study, each: list[dict[str, Any]], folder: Path, beside: Path) -> Iterator[str]:
    """All there is of one study: of the first machine, and the tables of the others."""
    yield f"## {study.title}"
    yield f"`python -m tritondeq.bench.studies {study.name} --suite {each[0]['suite']}`: {study.question}"
    yield f"Data: {study.data}"
    for machine in each:
        yield _where(machine)
        for case in study.cases:
            if runs := plots.of(machine["runs"], case=case):
                yield f"**{case or study.title}**"
                yield markdown(_table(study, runs))
                if verdicts := list(_verdicts(study, runs, timed=not _busy(machine))):
                    yield "\n".join(verdicts)
    if said := list(study.says(each[0]["runs"])):
        yield "\n".join(f"* {sentence}" for sentence in said)
    for picture in study.pictures(each[0]["runs"]):
        path = os.path.relpath(folder / f"{study.name}_{picture}.png", beside)
        yield f"![{study.title}: {picture}]({path})"


def _where(results: dict[str, Any]) -> str:
    """Where these figures come from."""
    machine, runs = results["machine"], results["runs"]
    seeds = sorted({run["seed"] for run in runs})
    said = f"Suite {results['suite']}" + (f" ({QUICK[results['suite']]})" if results["suite"] in QUICK else "")
    said += f", seeds {', '.join(map(str, seeds))}, {machine['device']} ({machine['threads']} CPU threads)"
    said += f", torch {machine['torch']}, commit {machine['commit']}, {machine['backend']} backend"
    said += "." if results["complete"] else ", not complete."
    if machine["kind"] == "cpu":
        said += " Times are seconds of the process's CPU"
        if busy := _busy(results):
            said += f"; others kept the machine busy (load {busy:.1f} of {machine['cores']}): rough, and not judged"
        said += "."
    return said


def _table(study: Study, runs: list[Run]) -> list[list[str]]:
    """A row a measure, a column a contestant."""
    names = plots.names(runs)
    rows = [["", *names]]
    for measure in study.measures:
        each = [_values(runs, name, measure) for name in names]
        if any(each):
            rows.append([measure.title, *(_value(values, measure) for values in each)])
    return rows


def _busy(results: dict[str, Any]) -> float | None:
    """The mean load, if it left too few cores for times to be judged."""
    loads = [run["load"] for run in results["runs"] if run.get("load") is not None]
    return mean(loads) if loads and mean(loads) > results["machine"]["cores"] else None


def _short(measure: Measure) -> str:
    """Its title without the unit."""
    return measure.title.partition(",")[0]


def _verdicts(study: Study, runs: list[Run], timed: bool) -> Iterator[str]:
    """A line for each implicit contestant and rival; times are judged if they are worth it."""
    present = plots.names(runs)
    for ours in (name for name in present if name not in who.RIVALS):
        for rival in (name for name in who.RIVALS if name in present):
            judged = [m for m in study.measures if timed or not m.key.endswith("seconds")]
            found = [(_short(m), judge(runs, m, ours, rival)) for m in judged]
            by_word = {word: [title for title, v in found if v and v.word == word] for word in WORDS}
            said = "; ".join(f"{word}: {', '.join(titles)}" for word, titles in by_word.items() if titles)
            if said:
                yield f"* {ours} against the {rival}: {said}."


def _value(values: list[float], measure: Measure) -> str:
    if not values:
        return ""
    scaled = [measure.scale * value for value in values]
    if max(scaled) == min(scaled):
        return f"{scaled[0]:,.{measure.digits}f}"
    return spread(scaled, measure.digits)
