"""Figures that cannot be: they are flagged in the JSON, in the table and in the exit status, and never drawn."""

import math

from .measure import Record


def mark(records: list[Record]) -> None:
    """Gives `suspect`, one reason, to each record whose figure cannot be, and takes it from all others.

    A contestant cannot take less time than the cell that it evaluates, or do more than the machine's measured limit
    allows. Times of a case count for nothing if a contestant of it returned another result.
    """
    wrong = {(r["kind"], r["case"]) for r in records if r.get("wrong")}
    for record in records:
        record.pop("suspect", None)
        if why := _reason(record, (record["kind"], record["case"]) in wrong):
            record["suspect"] = why


def listed(records: list[Record]) -> list[str]:
    """Returns a line for each suspect record."""
    return [f"{r['case']}, {r['contestant']}: {r['suspect']}" for r in records if r.get("suspect")]


def _reason(record: Record, differs: bool) -> str | None:
    seconds = record.get("seconds")
    if seconds is None:
        return None
    if not 0 < seconds < math.inf:
        return f"{seconds} seconds are no time"
    if differs:
        return "timed, although results of this case differ"
    if (over := record.get("over_cell") or 1.0) < 1:
        return f"{over:.2f} of the time of the bare cell that it evaluates"
    if (share := record.get("of_limit") or 0.0) > 1:
        return f"{100 * share:.0f} % of the measured limit of this machine"
    return None
