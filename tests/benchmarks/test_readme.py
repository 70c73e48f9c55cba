"""`benchmarks/README.md` names what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.harness.model import ROOT

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
    assert "results" in LINKS


def test_every_benchmark_is_in_the_table() -> None:
    """Each program that measures, with its question."""
    programs = {path.stem for path in BENCHMARKS.glob("*.py")} - {"__init__", "make_model"}
    named = {name.partition(".")[2] for name in COMMANDS} | {"gpu_check"}
    assert programs == named
