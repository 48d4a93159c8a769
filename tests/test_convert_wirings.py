"""The command that measures how residual stacks begin as equilibria, and its table in NOTES.md."""

from pathlib import Path

import pytest

from tritondeq.bench import wirings
from tritondeq.bench.common import installed

NOTES = (Path(__file__).parent.parent / "bench" / "NOTES.md").read_text()
COMMAND = "python -m tritondeq.bench.wirings"


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


@pytest.mark.slow
def test_the_command_prints_rows_of_the_committed_table(capsys):
    (section,) = (part for part in NOTES.split("\n## ") if COMMAND in part)
    head, _, *committed = rows(section[section.index("| wiring") :])
    wirings.main(["--seeds", "1", "--blocks", "3"])
    again, _, *printed = rows(capsys.readouterr().out)
    assert head == again == ["wiring", *wirings.HEAD[1:]]
    names = [name for name, wiring in wirings.WIRINGS.items() if installed(wiring.needs)]
    assert [row[:2] for row in printed] == [row[:2] for row in committed if row[0] in names]
    for row in printed:
        assert row[1] == "4x" or "not" not in " ".join(row), "with random weights all converge"
