"""What pie uses of vLLM is there, in each release that it supports, as it was when it was read.

A release that fails here has moved something: read it in its source, mend pie, then write the new
signature into vllm_signatures.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import drift, other_vllm
from tests.helpers.model import REPOSITORY

pytestmark = pytest.mark.vllm

SIGNATURES = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text())
"""Parameters by function; by release where they differ."""


@pytest.fixture(
    scope="module", params=["0.32.0", pytest.param(other_vllm.RELEASE, marks=other_vllm.needed)]
)
def release(request: pytest.FixtureRequest) -> str:
    """A supported release."""
    return str(request.param)


@pytest.fixture(scope="module")
def found(release: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that imports the release finds in it."""
    more = {}
    if release == other_vllm.RELEASE:
        more = other_vllm.environment(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.drift"],
        cwd=REPOSITORY,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    return result


def test_all_that_pie_uses_is_there(found: dict[str, Any], release: str) -> None:
    """Imported names, attributes, and the lines that patches rely on, each of which was looked at.

    A check that pie has and the helper does not run is in ``not_run``.
    """
    assert found["version"] == release
    assert found["imported"] > 25
    for kind in ("missing", "no_attribute", "failed", "not_run"):
        assert found[kind] == [], kind


def test_signatures_are_those_that_were_read(found: dict[str, Any], release: str) -> None:
    """Parameters of what pie calls, wraps and overrides."""
    pinned = {
        name: text if isinstance(text, str) else text.get(release)
        for name, text in SIGNATURES.items()
    }
    assert found["signatures"] == pinned


def test_what_is_gone_would_show() -> None:
    """Negative control: names, attributes and lines that no vLLM has."""
    assert not drift.resolve("vllm.engine.arg_utils:NoSuchArgs")
    assert not drift.resolve("vllm.no_such_module:Name")
    assert drift.signature("vllm.engine.arg_utils:EngineArgs.no_such_method") == "missing"
    assert not drift.has_attribute("vllm.v1.core.sched.scheduler:Scheduler", "no_such_queue")
    checks = drift.Checks()
    checks.run(lambda: 1 / 0)
    assert checks.failed[-1].startswith("ZeroDivisionError")
    assert "cuda_graphs.py:full_graphs" in drift.expected()
