"""On which NUMA nodes the pool's pages go: near the GPU, elsewhere when short, never the GPU's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_nodes_are_chosen(tmp_path: Path, run_native: Callable[..., str]) -> None:
    """The table of cases; see ``csrc/test/placement.cpp``."""
    build = [sys.executable, str(CSRC / "build.py"), "--test", "placement", "--out", str(tmp_path)]
    subprocess.run(build, check=True)
    assert "all right" in run_native(tmp_path / "placement")
