"""The real model that the tests run."""

from __future__ import annotations

from pathlib import Path

from benchmarks import make_model
from benchmarks.harness.model import made_once

REPOSITORY = Path(__file__).resolve().parents[2]


def model_path() -> Path:
    """Folder of SmolLM2-135M-Instruct, made from the package on first use."""
    return made_once(REPOSITORY / make_model.DEFAULT_OUTPUT)
