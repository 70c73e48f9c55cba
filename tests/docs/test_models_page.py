"""docs/models.md has a row for each family, with what its entry says."""

from __future__ import annotations

from tests.helpers.small_models import FAMILIES
from tests.models_sweep import HEAD, PAGE, as_expected, page_rows


def test_every_family_has_its_row() -> None:
    """In the order of the helper, under the heading that `make models` writes."""
    assert PAGE.read_text().startswith(HEAD)
    assert [row.family for row in page_rows()] == list(FAMILIES)


def test_rows_say_what_entries_say() -> None:
    """A family that is newly run or refused has its page written anew."""
    assert [row.family for row in page_rows() if not as_expected(row)] == []
