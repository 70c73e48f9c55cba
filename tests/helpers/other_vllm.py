"""vLLM 0.33's Python over the libraries of the installed one, as `.ci/setup-env` lays it out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.model import REPOSITORY

RELEASE = "0.33.0"
FOLDER = REPOSITORY / "build" / f"vllm-{RELEASE}"

needed = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"no {FOLDER.name} in build: PIE_SETUP=vllm033 .ci/setup-env fetches it",
)
"""Mark of tests that run it."""


def environment(caches: Path) -> dict[str, str]:
    """For processes that are to import it in place of the installed one.

    Args:
        caches: folder for what vLLM compiles.
    """
    path = [str(FOLDER), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "VLLM_CACHE_ROOT": str(caches)}
