"""What counts as a difference between stock vLLM and pie."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance.bed import HERE
from tests.conformance.compare import differences, read_known
from tests.conformance.suites import ENGINE_SUITES, MODES, MORE_MODES

STOCK = {"tests/a.py::one[2]": ["passed", ""], "tests/a.py::two": ["failed", "boom"]}
ENTRY = {"tests": ["a.py::one[2]"], "modes": ["idle"], "error": "ids", "why": "other ids"}


def test_equal_outcomes_are_no_difference() -> None:
    """A test that fails in both is none, whatever it says."""
    pie = {**STOCK, "tests/a.py::two": ["failed", "another text"]}
    assert differences("core", "idle", STOCK, pie, {}) == []


def test_a_difference_is_known_by_mode_name_and_error() -> None:
    """An entry of another mode, or for another error, explains nothing."""
    pie = {**STOCK, "tests/a.py::one[2]": ["failed", "wrong ids"]}
    assert differences("core", "idle", STOCK, pie, {"core": [ENTRY]}) == []
    assert len(differences("core", "half", STOCK, pie, {"core": [ENTRY]})) == 1
    pie["tests/a.py::one[2]"] = ["failed", "deadlock"]
    unknown, gone = differences("core", "idle", STOCK, pie, {"core": [ENTRY]})
    assert "NOT KNOWN: deadlock" in unknown
    assert "KNOWN AND GONE" in gone


def test_an_explanation_that_no_test_needs_is_a_difference() -> None:
    """Where its test ran and did as stock."""
    (gone,) = differences("core", "idle", STOCK, STOCK, {"core": [ENTRY]})
    assert "KNOWN AND GONE" in gone


def test_a_test_that_did_not_run_is_a_difference() -> None:
    """In the modes that run all of them."""
    (missing,) = differences("core", "idle", STOCK, {"tests/a.py::two": ["failed", ""]}, {})
    assert "NOT RUN tests/a.py::one[2]" in missing
    assert differences("core", "tiny", STOCK, {}, {}) == []


def test_every_explanation_has_its_place() -> None:
    """Suites and modes that exist, and a reason."""
    for suite, entries in json.loads((HERE / "known.json").read_text()).items():
        assert suite == "core" or suite in ENGINE_SUITES
        modes = {*MODES, *MORE_MODES} if suite == "core" else {"pool"}
        for entry in entries:
            assert set(entry["modes"]) <= modes
            assert entry["tests"]
            assert entry["why"].endswith(".")


def test_an_entry_may_be_of_one_release_alone(tmp_path: Path) -> None:
    """It explains nothing in another."""
    entry = {"tests": ["a"], "modes": ["idle"], "error": "x", "why": "y", "releases": ["0.33.0"]}
    path = tmp_path / "known.json"
    path.write_text(json.dumps({"core": [entry]}))
    assert read_known(path, "0.33.0")["core"] == [entry]
    assert read_known(path, "0.32.0")["core"] == []
