"""Processes that a round starts, which end in time: the tests of the device, and other commands of the library."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import installed

TESTS = Path(__file__).resolve().parents[1] / "tests"
# Tests of nothing that runs on the device.
ELSEWHERE = ("test_bench*.py", "test_studies*.py", "test_demo*.py", "test_compiled*.py", "ptx/*")
INTERRUPTED = 130  # the exit status after Ctrl-C
PROGRESS = re.compile(r"([.FEsxX]+)(?:\s+\[.*\])?")  # a line of pytest's while tests run


def tests(folder: Path, seconds: float, most: int = 1) -> dict[str, Any]:
    """Runs the tests of the device in this folder in a few processes, for so long at most; ends after `most` failures.

    Returns:
        `passed`, None if the time was short and no test had failed by then; `text`, with the names of what failed.
    """
    if seconds <= 0:
        return {"passed": None, "text": "no time"}
    ignored = [f"--ignore-glob={TESTS}*/{pattern}" for pattern in ELSEWHERE]  # * is any part of a path
    shards = ["-n", str(max(1, min(4, (os.cpu_count() or 1) // 2)))] if installed("xdist") else []
    options = ["-q", f"--maxfail={most}", "-p", "no:cacheprovider", *shards, *ignored]
    code, text = run(["-m", "pytest", *options, str(folder)], seconds)
    return {"passed": None if code is None else code == 0, "text": text}


def run(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Runs Python with these arguments, for so many seconds at most.

    Returns:
        The exit status, None if it was stopped before any test failed; the last line, after pytest's lines of failures.
    """
    if seconds <= 0:
        return 1, "no time"
    try:
        run = subprocess.run(
            [sys.executable, *arguments], cwd=TESTS.parent, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        seen = (error.stdout or b"").decode(errors="replace").splitlines()  # bytes, whatever `text` asks for
        failed = sum(len(re.findall("[FE]", found[1])) for line in seen if (found := PROGRESS.fullmatch(line)))
        text = f"stopped after {seconds:.0f} s"
        return (1, f"{text}, when {failed} tests had failed") if failed else (None, text)
    lines = (run.stdout if run.returncode == 0 else run.stdout + run.stderr).strip().splitlines()
    named = [line for line in lines[:-1] if line.startswith(("FAILED ", "ERROR "))]
    return run.returncode, "\n".join([*named, lines[-1]]) if lines else "no output"
