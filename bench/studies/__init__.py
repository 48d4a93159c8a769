"""Deep equilibrium nets beside explicit ones, on data that is at hand offline: where they win, tie and lose.

`python -m tritondeq.bench.studies NAME` runs a study; `... report` writes README.md from the results that are there.
"""

import importlib

from .study import Study

# Modules of this folder, in the order of the report; each defines its STUDY.
STUDIES = ("images", "text", "series", "control", "algorithms", "explain")


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: there is none.
        ModuleNotFoundError: a package that it needs is missing.
    """
    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    return importlib.import_module(f".{name}", __package__).STUDY
