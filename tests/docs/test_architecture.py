"""docs/architecture.md walks through files that there are, to names that stand in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
WALKS = dict(re.findall(r"^## Walk: ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
STATION = re.compile(r"^(\d+)\. `([\w./]+)` `(\w+)`: \S", re.MULTILINE)


def test_there_are_two_walks() -> None:
    """The pool's size from the flag down, a block id from the scheduler down."""
    assert [title.split(",")[0] for title in WALKS] == ["the pool size", "a block id"]


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_names_each_file_once_and_in_order(title: str) -> None:
    """Its stations are numbered without a gap, and no file comes twice."""
    stations = STATION.findall(WALKS[title])
    assert len(stations) > 10
    assert len(stations) == len(re.findall(r"^\d+\. ", WALKS[title], re.MULTILINE))
    assert [int(number) for number, _, _ in stations] == list(range(1, len(stations) + 1))
    files = [path for _, path, _ in stations]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_leads_through_the_code(title: str) -> None:
    """Each file is there, and has the name that the station shows."""
    for _, path, name in STATION.findall(WALKS[title]):
        file = REPOSITORY / path
        assert file.is_file(), path
        assert re.search(rf"\b{name}\b", file.read_text()), f"{path} has no {name}"
