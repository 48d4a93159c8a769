"""What the parts of the bench share that is about no part of it."""

import importlib.util
from typing import Any

Results = dict[str, Any]


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Its lines; the first row is the head."""
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
