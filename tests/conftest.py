"""What every test shares: a closed environment for vLLM, skips by marker, fuzz seeds, the model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.model import model_path

# Before vLLM is imported anywhere: no usage reports, no look-ups on a model hub.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy two-core machine makes single examples slow, which says nothing about the code.
settings.register_profile("pie", deadline=None, print_blob=True)
settings.load_profile("pie")

DEFAULT_FUZZ_SEEDS = 100
SLOW_SECONDS = 900
"""Limit of a slow test that names none: only for what hangs, on a machine however busy."""

WEIGHTS = {"slow": 4, "sanitizer": 1}
"""Of a test with such a mark, in guessing how long its file takes."""


@cache
def cuda_device_answers() -> bool:
    """Whether nvidia-smi lists a device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why; slow tests get time, and come first."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not cuda_device_answers():
            item.add_marker(pytest.mark.skip(reason="no CUDA device answers"))
        if item.get_closest_marker("vllm") and not has_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    if hasattr(config, "workerinput"):
        _long_files_first(items)


def _long_files_first(items: list[pytest.Item]) -> None:
    """So that none is left for the end, when one of two processes has nothing more to do."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += sum(w for name, w in WEIGHTS.items() if item.get_closest_marker(name))
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the small real model."""
    return model_path()


@pytest.fixture(scope="session")
def fuzz_seeds() -> range:
    """Seeds of a fuzz test; `make fuzz` runs many more of them than `make test`."""
    return range(int(os.environ.get("PIE_FUZZ_SEEDS", DEFAULT_FUZZ_SEEDS)))
