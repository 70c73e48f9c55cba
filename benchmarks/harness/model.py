"""The small real model that benchmarks and tests run."""

from __future__ import annotations

from pathlib import Path

from benchmarks import make_model
from benchmarks.harness.builds import build_once

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the checkout."""


def made_once(folder: Path) -> Path:
    """The folder with the model in it, made there on first use by whichever process comes first.

    Raises:
        SystemExit: the package that the model is made from is not installed; says which.
    """
    build_once(folder / make_model.DONE, lambda: make_model.write_model(folder, "bfloat16"))
    return folder
