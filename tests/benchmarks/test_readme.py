"""`benchmarks/README.md` names what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.model import ROOT
from benchmarks.harness.result_file import RESULTS, read_result

BENCHMARKS = ROOT / "benchmarks"
TEXT = (BENCHMARKS / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m (benchmarks\.\w+)", TEXT)))
LINKS = sorted(set(re.findall(r"\]\(((?!http|\.\.)[\w./]+)", TEXT)))


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_is_there(module: str) -> None:
    """Each is a module that runs."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert '__name__ == "__main__"' in Path(spec.origin).read_text()


@pytest.mark.parametrize("link", LINKS)
def test_a_link_leads_somewhere(link: str) -> None:
    """Pictures, folders and pages."""
    assert (BENCHMARKS / link).exists()


def test_the_commands_were_found() -> None:
    """The pattern still finds them."""
    assert {"benchmarks.demo", "benchmarks.regret", "benchmarks.idle_cost"} <= set(COMMANDS)
    assert "results/parking.png" in LINKS


def ratios(data: dict[str, Any]) -> list[str]:
    """Ratios of a result, in the words of the page."""
    return [
        f"{ratio['median']:.2f} [{ratio['low']:.2f} .. {ratio['high']:.2f}]"
        for ratio in data["ratios"].values()
        if ratio["high"] - ratio["low"] >= 0.01
    ]


def test_the_figures_are_those_of_the_newest_results() -> None:
    """Who measures anew writes the page anew."""
    results = [read_result(ROOT / RESULTS / name) for name in ("throughput", "serving")]
    results.append(read_result(ROOT / RESULTS / "parking")["loads"]["fresh"])
    missing = [text for data in results for text in ratios(data) if text not in TEXT]
    assert not missing
    idle = read_result(ROOT / RESULTS / "idle_cost")["ratio"]
    assert f"{idle['median']:.3f} [{idle['low']:.3f} .. {idle['high']:.3f}]" in TEXT
    speeds = read_result(ROOT / RESULTS / "link_speeds")["ratios"].values()
    assert " | ".join(f"{ratio['median']:.2f}" for ratio in speeds) in TEXT
