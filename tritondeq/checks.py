"""Checks of arguments: each raises TypeError or ValueError with "<name> must be <what fits>, got <value>"."""

import math
from typing import Any


def number(name: str, value: Any, low: float, high: float = math.inf, closed: bool = False) -> None:
    """Raises unless `value` is a real number above `low` (or at it, if `closed`) and below `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low < value < high or (closed and value == low)):
        wanted = f"{'at least' if closed else 'above'} {low}" + (f" and below {high}" if high < math.inf else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def integer(name: str, value: Any, least: int | None = 1) -> None:
    """Raises unless `value` is an integer of at least `least`; None is no bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def boolean(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
