"""On which NUMA nodes the pool's pages go: near the GPU, elsewhere when short, never the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.builds import build_program


def test_nodes_are_chosen(tmp_path: Path, run_native: Callable[..., str]) -> None:
    """The table of cases; see ``tests/csrc/placement.cpp``."""
    assert "all right" in run_native(build_program("placement", tmp_path))
