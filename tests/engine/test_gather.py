"""What the gather kernel copies, by its host build: the same text, with loops for threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.builds import build_program


@pytest.mark.parametrize(
    ("seeds", "sanitize"),
    [(100, None), pytest.param(40, "address", marks=pytest.mark.sanitizer)],
)
def test_every_byte_is_copied_once(
    tmp_path: Path, seeds: int, sanitize: str | None, run_native: Callable[..., str]
) -> None:
    """Random tables, grids and blocks; see ``tests/csrc/gather.cpp``."""
    output = run_native(build_program("gather", tmp_path, sanitize), "1", str(seeds))
    assert f"{seeds} seeds, no wrong byte" in output
