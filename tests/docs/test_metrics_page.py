"""docs/metrics.md and the Grafana dashboard name the metrics that exist, as the code does."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from vllm.v1.metrics import loggers
from vllm.v1.spec_decode import metrics as spec_decode

from pie_vllm.policy.admission.waits import REASONS
from pie_vllm.vllm.scheduler_side import metrics
from pie_vllm.vllm.scheduler_side.prometheus import BY_REASON, COUNTERS, GAUGES

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "metrics.md").read_text()
DASHBOARD = REPOSITORY / "pie_vllm" / "grafana" / "dashboard.json"
UNITS = {
    "bytes_per_second": "bytes/s",
    "bytes": "bytes",
    "seconds": "seconds",
    "blocks": "blocks",
    "steps": "steps",
    "tokens": "tokens",
    "requests": "requests",
}
"""Unit by the word for it in a metric's name; the first that fits counts."""


def section(title: str) -> str:
    """Text of one section of the page."""
    found = re.search(rf"^##+ {title}$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    """Cells of the rows of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names_in(cell: str) -> list[str]:
    """What a cell has in code quotes."""
    return re.findall(r"`([^`]+)`", cell)


def exported() -> dict[str, tuple[str, list[str], str]]:
    """Type, labels and help text of every metric, by the name that Prometheus shows."""
    labels = ["model_name", "engine"]
    found = {f"vllm:{name}": ("gauge", labels, text) for name, text in GAUGES.items()}
    found |= {f"vllm:{name}_total": ("counter", labels, text) for name, text in COUNTERS.items()}
    for name, text in BY_REASON.items():
        found[f"vllm:{name}_total"] = ("counter", [*labels, "reason"], text)
    return found


def test_every_metric_is_on_the_page_as_it_is_in_the_code() -> None:
    """Name, type, labels and meaning; the meaning is the help text that the server exports."""
    page = {}
    for name, kind, labels, _, meaning in rows("Gauges") + rows("Counters"):
        page[names_in(name)[0]] = (kind, names_in(labels), meaning)
    code = exported()
    assert page.keys() == code.keys()
    for name, (kind, labels, meaning) in page.items():
        assert (kind, labels) == code[name][:2], name
        text = code[name][2]
        assert text.startswith(meaning) if "reason" in labels else text == meaning, name


def test_the_unit_is_the_one_in_the_name() -> None:
    """A name without a unit counts blocks or steps."""
    for name, _, _, unit, _ in rows("Gauges") + rows("Counters"):
        word = next((word for word in UNITS if word in name), None)
        assert unit == UNITS[word] if word else unit in ("blocks", "steps"), name


def test_every_reason_is_on_the_page() -> None:
    """With the words of the code."""
    assert {names_in(reason)[0]: text for reason, text in rows("Reasons")} == REASONS


def test_the_line_of_totals_is_explained() -> None:
    """Each of its fields, and no other."""
    written = re.findall(r"\b(\w+)=%", inspect.getsource(metrics.StepLog.write))
    explained = [name for row in rows("Line of totals") for name in names_in(row[0])]
    assert sorted(explained) == sorted(written)


def test_what_python_users_get_is_explained() -> None:
    """All sums of a worker; its sizes are those that the docstring names."""
    explained = {name for row in rows("In Python") for name in names_in(row[0])}
    assert set(metrics.Totals._fields) <= explained
    named = set(re.findall(r"``(\w+)``", metrics.counters.__doc__ or ""))
    named.discard("vllm")
    assert explained == set(metrics.Totals._fields) | named


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    """Pie's by their exported names, vLLM's by those in its sources."""
    names = set(re.findall(r"vllm:\w+", DASHBOARD.read_text()))
    own = {name for name in names if name.startswith("vllm:pie_")}
    assert len(own) > 10
    assert own <= exported().keys()
    source = inspect.getsource(loggers) + inspect.getsource(spec_decode)
    for name in names - own:
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", name)}"' in source, name


def test_every_panel_of_the_dashboard_says_what_it_shows() -> None:
    """A title and a description, and queries of the chosen model only."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        for target in panel["targets"]:
            assert 'model_name=~"$model_name"' in target["expr"], panel["title"]
