"""The real model that the tests run."""

from __future__ import annotations

from pathlib import Path

from benchmarks import make_model
from tests.helpers.builds import build_once

REPOSITORY = Path(__file__).resolve().parents[2]


def model_path() -> Path:
    """Folder of SmolLM2-135M-Instruct, made from the package on first use."""
    folder = REPOSITORY / make_model.DEFAULT_OUTPUT
    build_once(folder / make_model.DONE, lambda: make_model.write_model(folder, "bfloat16"))
    return folder
