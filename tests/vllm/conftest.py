"""Engines and models that the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.engine import Engines
from tests.helpers.engine_model import few_layers


@pytest.fixture(scope="session")
def few(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a few layers of the real model."""
    return few_layers(model, tmp_path_factory.mktemp("model") / "few-layers")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Worker processes that run vLLM; results are shared by all tests of the session."""
    shared = Engines(tmp_path_factory.mktemp("engines"))
    yield shared
    shared.close()
