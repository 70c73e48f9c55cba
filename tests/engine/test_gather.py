"""What the gather kernel copies, by its host build: the same text, with loops for threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize(
    ("seeds", "sanitize"),
    [(100, None), pytest.param(40, "address", marks=pytest.mark.sanitizer)],
)
def test_every_byte_is_copied_once(
    tmp_path: Path, seeds: int, sanitize: str | None, run_native: Callable[..., str]
) -> None:
    """Random tables, grids and blocks; see ``csrc/test/gather.cpp``."""
    build = [sys.executable, str(CSRC / "build.py"), "--test", "gather", "--out", str(tmp_path)]
    subprocess.run([*build, *(["--sanitize", sanitize] if sanitize else [])], check=True)
    output = run_native(tmp_path / "gather", "1", str(seeds))
    assert f"{seeds} seeds, no wrong byte" in output
