"""docs/tools.md: every line of its tables names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / "docs" / "tools.md").read_text().splitlines() if line.startswith("| ")]
ROWS = [line for line in LINES if not line.startswith(("| what |", "|---"))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_a_line_is_held_by_tests(row: str) -> None:
    held_by, source = row.strip("| ").rsplit(" | ", 1)[-1], ""
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(\w+)(?:\[[^`]*\])?`", held_by)
    assert named, f"no test in: {held_by}"
    for file, test in named:
        source = (ROOT / file).read_text() if file else source
        assert re.search(rf"^\s*(async )?def {test}\(", source, re.MULTILINE), f"{file} has no {test}"
