"""docs/compatibility.md has every flag of vLLM's parser once, and what it says of them is so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm import cautions, refusals
from pie_vllm.vllm.cautions import logger
from tests.helpers.model import REPOSITORY
from tests.vllm.test_bad_input import configure, plain_config

pytestmark = pytest.mark.vllm

PAGE = REPOSITORY / "docs" / "compatibility.md"
WITH_TESTS = ("Tested", "Runs, with a warning at start", "Refused")
OTHER_VERSION = REPOSITORY / "build" / "vllm-0.33.0"
LIST_FLAGS = """
import json
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.common.cli_args import make_arg_parser
actions = make_arg_parser(FlexibleArgumentParser())._actions
print("FLAGS", json.dumps([a.option_strings for a in actions]))
"""


def rows() -> list[tuple[str, list[str], str]]:
    """Section, flags and last cell of each row of the page."""
    found, section = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found.append((section, re.findall(r"`(--[a-z0-9-]+)`", cells[0]), cells[-1]))
    return found


def flags_of_vllm(python_path: str) -> set[str]:
    """Each flag of ``vllm serve`` under its first name, without the plugin."""
    environment = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, "-c", LIST_FLAGS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("FLAGS "))
    names = [
        [name for name in options if name.startswith("--")] for options in json.loads(line[6:])
    ]
    return {options[0] for options in names if options}


def listed() -> set[str]:
    """All flags of the page."""
    return {flag for _, flags, _ in rows() for flag in flags}


def test_every_flag_of_this_vllm_is_classified() -> None:
    """A flag of a new release is read about before anybody counts on it."""
    missing = flags_of_vllm(str(REPOSITORY)) - listed()
    assert not missing, f"say in {PAGE.name} what these do with pie: {sorted(missing)}"


@pytest.mark.skipif(not OTHER_VERSION.is_dir(), reason=f"no {OTHER_VERSION.name} in build")
def test_every_flag_of_the_other_vllm_is_classified() -> None:
    """And no flag is listed that neither has."""
    other = flags_of_vllm(os.pathsep.join([str(OTHER_VERSION), str(REPOSITORY)]))
    assert not other - listed()
    assert listed() == other | flags_of_vllm(str(REPOSITORY))


def test_each_flag_stands_once_and_has_its_evidence() -> None:
    """Rows of what is tested, warned of and refused name files of tests that there are."""
    counts = Counter(flag for _, flags, _ in rows() for flag in flags)
    assert max(counts.values()) == 1, counts.most_common(3)
    helpers = "".join(p.read_text() for p in sorted((REPOSITORY / "tests/helpers").glob("*.py")))
    for section, flags, last in rows():
        if section in WITH_TESTS:
            tests = re.findall(r"`(tests/[\w/]+\.py)`", last)
            assert tests, flags
            text = helpers + "".join((REPOSITORY / test).read_text() for test in tests)
            named = [f for f in flags if f in text or f.strip("-").replace("-", "_") in text]
            assert named, flags
            assert section != "Tested" or named == flags, set(flags) - set(named)


def ranks(**changes: Any) -> Any:
    """The plain configuration with another part about ranks."""
    config = plain_config()
    for name, value in changes.items():
        setattr(config.parallel_config, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"distributed_executor_backend": "external_launcher", "world_size": 2},
            r"external_launcher with 2 ranks.*schedules by itself.*-executor-backend mp",
        ),
        ({"nnodes": 2}, r"--nnodes 2: free CPU memory.*Set --nnodes 1"),
        ({"distributed_executor_backend": "ray"}, r"backend ray.*several hosts.*backend mp"),
    ],
)
def test_ranks_that_pie_cannot_answer_for_are_refused(changes: dict[str, Any], words: str) -> None:
    """By name, with the way out."""
    with pytest.raises(UnsupportedError, match=f"{words}, or use --block-manager default"):
        refusals.check_config(ranks(**changes), "cuda")


@pytest.mark.parametrize("backend", ["uni", "mp", "external_launcher"])
def test_one_rank_may_be_started_in_any_way(backend: str) -> None:
    """Alone, a rank decides for itself."""
    refusals.check_config(ranks(distributed_executor_backend=backend), "cuda")


def test_one_rank_by_an_external_launcher_is_configured(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With vLLM's own configuration, too; three are refused before the model loads."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM sets it, too, and for good.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    configure(model, distributed_executor_backend="external_launcher")
    with pytest.raises(UnsupportedError, match="external_launcher with 3 ranks"):
        configure(
            model,
            {"pool_gib": 0.1},
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=3,
        )


def what_is_said(offload_gb: float = 0, groups: int = 0, metrics: bool = False) -> list[str]:
    """The warnings of a configuration."""
    offload = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=offload_gb),
        prefetch=SimpleNamespace(offload_group_size=groups),
    )
    observability = SimpleNamespace(kv_cache_metrics=metrics)
    config = SimpleNamespace(offload_config=offload, observability_config=observability)
    return cautions.cautions(config)


def test_warnings_name_the_setting_and_its_effect() -> None:
    """Nothing is said of what has no effect."""
    assert what_is_said() == []
    for said in (what_is_said(offload_gb=1.5), what_is_said(groups=4)):
        assert len(said) == 1
        assert "--cpu-offload-gb" in said[0]
        assert '"link_gbps"' in said[0]
    assert ["--kv-cache-metrics counts" in text for text in what_is_said(metrics=True)] == [True]


def test_a_real_configuration_is_warned_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At start, and only where the flag is given."""
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda form, *given: said.append(form % given))
    configure(model)
    assert said == []
    configure(model, cpu_offload_gb=1, kv_cache_metrics=True)
    assert len(said) == 2
