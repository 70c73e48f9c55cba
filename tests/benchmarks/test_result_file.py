"""Result files: what is kept, what goes under build/, and plots drawn from what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import report, result_file
from benchmarks.harness.result_file import compact, read_result, rounded, write_result
from benchmarks.harness.rounds import Question
from benchmarks.real import link_picture, parking_report
from benchmarks.real.parking_report import Part, publish_parts, redraw_parts


@pytest.fixture(autouse=True)
def details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the whole results."""
    folder = tmp_path / "details"
    monkeypatch.setattr(result_file, "DETAILS", folder)
    return folder


def test_a_small_file_reads_as_json_and_keeps_to_its_lines() -> None:
    """Parts that fit a line are on one; numbers have five digits."""
    data = {"few": {"a": 1.23456789, "b": True}, "many": {f"key{i}": [i] * 9 for i in range(9)}}
    text = compact(rounded(data))
    assert json.loads(text) == data | {"few": {"a": 1.2346, "b": True}}
    lines = text.splitlines()
    assert '  "few": {"a": 1.2346, "b": true},' in lines
    assert max(map(len, lines)) <= 110
    assert len(lines) == 14


def test_details_are_not_in_the_small_file(tmp_path: Path, details: Path) -> None:
    """They stand in for the same entry of the whole."""
    write_result(tmp_path / "new" / "name", {"sum": 3, "runs": []}, {"runs": [1, 2]})
    assert read_result(tmp_path / "new" / "name") == {"sum": 3, "runs": []}
    assert json.loads((details / "name.json").read_text()) == {"sum": 3, "runs": [1, 2]}


def run_of(tok_s: float) -> dict[str, Any]:
    gaps = {f"itl_{kind}p{p}_ms": 10.0 * p for kind in ("", "pooled_") for p in (50, 99)}
    return {"tok_s": tok_s, "stall_share": 0.1, **gaps, "ttfts_ms": [1.5] * 99, "pie": {"steps": 7}}


@pytest.mark.parametrize("draw", [report.plot, link_picture.plot])
def test_a_plot_is_drawn_again_from_the_small_file(
    tmp_path: Path, details: Path, draw: Callable[..., None]
) -> None:
    """The same to the byte; distributions and counters are in the whole only."""
    stem = tmp_path / "speeds"
    figures = {name: [run_of(10), run_of(12)] for name in ("stock_equal", "pie_1", "pie_none")}
    report.publish(stem, "title", {}, [Question("pie_1", "stock_equal", 1.0)], figures, draw)
    picture = stem.with_suffix(".png")
    drawn = picture.read_bytes()
    picture.unlink()
    report.redraw(stem, draw)
    assert picture.read_bytes() == drawn
    assert "ttfts_ms" not in stem.with_suffix(".json").read_text()
    whole = json.loads((details / "speeds.json").read_text())
    assert whole["runs"]["pie_1"][0] == run_of(10)


def test_the_loads_of_parking_are_drawn_again(tmp_path: Path) -> None:
    """With what is asked of each, and with those that are to recompute nothing."""
    stem = tmp_path / "parking"
    questions = {"load": [Question("pie", "stock_equal", 1.1)]}
    runs = {n: [run_of(10) | {"recomputed_tokens": 5}] for n in ("stock_equal", "pie")}
    part = Part("load: so many", questions["load"], runs, none_again=("pie",))
    publish_parts(stem, "title", {}, {"load": part})
    picture = stem.with_suffix(".png")
    drawn = picture.read_bytes()
    picture.unlink()
    redraw_parts(stem, questions)
    assert picture.read_bytes() == drawn
    assert parking_report.read_result(stem)["loads"]["load"]["recomputed_tokens"]["pie"]["max"] == 5
