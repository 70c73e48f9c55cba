"""Each tick in docs/compatibility.md has a test behind it."""

from __future__ import annotations

import re

import pytest

from tests.helpers.model import REPOSITORY
from tests.helpers.small_models import FAMILIES

PAGE = REPOSITORY / "docs" / "compatibility.md"
TICK = re.compile(r"\[✓\]\((\S+) \"(\w+)(?:\[(\S+)\])?\"\)")
OTHERS = {"–", "refused", "computed again"}

LINES = [line for line in PAGE.read_text().splitlines() if "[✓]" in line]


@pytest.mark.parametrize("line", LINES, ids=[line.split("|")[1].strip() for line in LINES])
def test_ticks_are_tests(line: str) -> None:
    """By file, name and family; all other cells say why there is none."""
    _, models, *cells, end = (cell.strip() for cell in line.split("|"))
    assert models
    assert end == ""
    assert len(cells) == 6
    for cell in cells:
        found = TICK.findall(cell)
        assert found or cell in OTHERS, cell
        for path, name, family in found:
            text = (PAGE.parent / path).read_text()
            assert f"def {name}(" in text, name
            assert not family or family in FAMILIES, family


def test_there_are_ticks() -> None:
    """So that a page in another form does not pass."""
    assert len(LINES) > 10
