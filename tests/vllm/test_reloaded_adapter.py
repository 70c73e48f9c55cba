"""A real engine, a real adapter: after a reload in place its answers are those of the new files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.engine import ENVIRONMENT
from tests.helpers.model import REPOSITORY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_reloaded_adapter_answers_as_if_freshly_loaded(few: Path, tmp_path: Path) -> None:
    """Its prompt is in the pool, as the adapter of before computed it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.reloaded_adapter", str(few), str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["hits"] > 0, "the pool was hit before the reload"
    assert answers["again"] == answers["before"]
    assert answers["after"] == answers["fresh"]
    assert answers["fresh"] != answers["before"], "the adapters differ"
