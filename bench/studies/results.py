"""Results on disk: a JSON file per study, suite and machine, rewritten after every run."""

import json
from pathlib import Path
from typing import Any

import torch

from .. import machine as here
from .study import SUITES, Study

SCHEMA = 1
KEYS = ("schema", "study", "suite", "settings", "machine", "complete", "runs")
FOLDER = Path(__file__).parent / "results"  # those that are committed
SAME = ("device", "torch", "tritondeq", "commit", "backend", "threads")  # of the machine, for runs to go in one file


def new(study: Study, suite: str, device: torch.device) -> dict[str, Any]:
    """Results without runs yet."""
    machine = here.describe(device)
    settings = json.loads(json.dumps(study.settings[suite]))  # tuples become lists, as they will be when read
    head = {"schema": SCHEMA, "study": study.name, "suite": suite, "settings": settings, "machine": machine}
    return head | {"complete": False, "runs": []}


def path_of(results: dict[str, Any], folder: Path) -> Path:
    """Returns the path of the file of these results in a folder."""
    return folder / f"{results['study']}-{results['suite']}-{here.name_of(results['machine'])}.json"


def save(results: dict[str, Any], path: Path) -> None:
    """The file is there whole or as it was."""
    part = path.with_suffix(".part")
    head = json.dumps(results | {"runs": None}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in results["runs"])  # a line each
    part.write_text(head.replace('"runs": null', f'"runs": [\n{runs}\n ]') + "\n")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    missing = [key for key in KEYS if key not in results] if isinstance(results, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} is not a results file of tritondeq.bench.studies: it lacks {', '.join(missing)}")
    if results["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {results['schema']}, and this version reads {SCHEMA}")
    return results


def resumed(fresh: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """(results to go on with, why those in the file are not used, or "").

    Finished runs are kept if their settings, machine and commit are the same. A tree with changes that are not
    committed is never the same as another.
    """
    if not path.exists():
        return fresh, ""
    try:
        old = load(path)
    except ValueError as error:
        return fresh, str(error)
    if old["settings"] != fresh["settings"]:
        return fresh, "other settings"
    for key in SAME:
        if old["machine"].get(key) != fresh["machine"].get(key):
            return fresh, f"another {key}: {old['machine'].get(key)}"
    if "dirty" in (fresh["machine"]["commit"] or ""):
        return fresh, "changes that are not committed"
    return fresh | {"machine": old["machine"], "runs": old["runs"]}, ""


def finished(results: dict[str, Any]) -> set[tuple[str, str, int]]:
    """(case, contestant, seed) of its runs."""
    return {(run["case"], run["contestant"], run["seed"]) for run in results["runs"]}


def chosen(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By study, its results of the longest suite that is there, a machine each; GPUs first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        results = load(path)
        found.setdefault(results["study"], []).append(results)
    for name, each in found.items():
        longest = max(SUITES.index(results["suite"]) for results in each)
        found[name] = [results for results in each if results["suite"] == SUITES[longest]]
        found[name].sort(key=lambda results: results["machine"]["kind"] != "cuda")
    return found
