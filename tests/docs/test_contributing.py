"""CONTRIBUTING.md names commands, files and markers that there are; hosted CI calls `.ci/run`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
WORKFLOW = REPOSITORY / ".github" / "workflows" / "ci.yml"


def quoted() -> list[str]:
    """Everything that the page has in code quotes."""
    return re.findall(r"`([^`\n]+)`", PAGE)


def workflow() -> Any:
    """The workflow, whose key ``on`` YAML reads as true."""
    return yaml.safe_load(WORKFLOW.read_text())


def test_targets_exist() -> None:
    """Each `make` of the page and of the README, and none of the Makefile's is missing."""
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    readme = re.findall(r"`make ([a-z-]+)`", (REPOSITORY / "README.md").read_text())
    named = {text.removeprefix("make ") for text in quoted() if text.startswith("make ")}
    assert named | set(readme) <= targets
    assert targets - named <= {"help", "clean", "distclean"}


def test_paths_exist() -> None:
    """Files and folders of the how-tos, and of the folders that are named by themselves."""
    paths = [text for text in quoted() if re.fullmatch(r"\.?[a-z_]+/[\w./-]*|csrc", text)]
    assert len(paths) > 15
    for path in paths:
        assert (REPOSITORY / path).exists(), path


def test_markers_are_those_of_pytest() -> None:
    """All of them, and no other."""
    listed = (REPOSITORY / "pyproject.toml").read_text().partition("markers = [")[2]
    markers = set(re.findall(r'^    "(\w+): ', listed.partition("]")[0], re.MULTILINE))
    assert "vllm" in markers
    table = PAGE.partition("| marker |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == markers


def test_hosted_ci_runs_what_ci_runs() -> None:
    """It checks out, takes a Python that the set-up accepts, and calls `.ci/run`."""
    (job,) = workflow()["jobs"].values()
    steps = job["steps"]
    assert job["runs-on"] == "ubuntu-latest"
    assert steps[0]["uses"].startswith("actions/checkout@")
    (python,) = [s["with"] for s in steps if s.get("uses", "").startswith("actions/setup-python@")]
    assert python["python-version"] == "3.11"
    assert (REPOSITORY / python["cache-dependency-path"]).is_file()
    assert [s["run"] for s in steps if "run" in s] == [".ci/run"]
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_hosted_ci_keeps_the_logs_of_a_failure() -> None:
    """Where `.ci/run` writes them."""
    (job,) = workflow()["jobs"].values()
    (keep,) = [s for s in job["steps"] if s.get("uses", "").startswith("actions/upload-artifact@")]
    assert keep["if"] == "always()"
    made = re.findall(r"^mkdir -p (\S+)$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert [keep["with"]["path"]] == made


def test_hosted_ci_runs_on_changes_and_stops_what_is_overtaken() -> None:
    """Pull requests and the main branch; one run a branch, which may only read."""
    found = workflow()
    assert {"push", "pull_request"} <= found[True].keys()
    assert "github.ref" in found["concurrency"]["group"]
    assert found["permissions"] == {"contents": "read"}
