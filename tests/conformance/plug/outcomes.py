"""pytest plugin: what came of each test, as JSON in the file PIE_OUT.

vLLM's own conftest tears the distributed state down and resets dynamo after every test. That takes
longer than most tests, and engines here live in the tests' process, some for a whole module: it is
left out.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

NOTES: dict[str, dict[str, Any]] = {}
"""What other plugins note of a test."""

WRITE_TESTS = 40
"""Number of tests between two writes; a process that is ended leaves what it had."""

_outcomes: dict[str, list[Any]] = {}


def _write() -> None:
    path = os.environ.get("PIE_OUT")
    if path:
        with open(path, "w") as file:
            json.dump({"outcomes": _outcomes, "notes": NOTES}, file, indent=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    torch._dynamo.reset = lambda: None
    for item in items:
        item.add_marker("skip_global_cleanup")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    outcome = report.outcome if report.when == "call" or report.skipped else "error"
    if getattr(report, "wasxfail", None) is not None:
        outcome = "xfail"
    if report.nodeid not in _outcomes or outcome in ("failed", "error"):
        crash = getattr(report.longrepr, "reprcrash", report.longrepr)
        text = "" if report.passed else str(crash)[:600]
        _outcomes[report.nodeid] = [outcome, text, round(report.duration, 1)]
        if len(_outcomes) % WRITE_TESTS == 0 or report.duration > 1:
            _write()


def pytest_sessionfinish() -> None:
    _write()
