"""Engines that are prepared for steps in graphs, over the stand-in alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.graphing import PIECES
from tests.helpers.gather_kernel import IMAGE


@pytest.fixture(params=["cuda"])
def driver(driver: str) -> str:
    """Only this one."""
    return driver


@pytest.fixture
def engine(make_engine: Callable[..., TransferEngine]) -> TransferEngine:
    """Six layers on a ring of two; graphs of four pieces a layer."""
    engine = make_engine()
    engine.graphs.prepare(IMAGE, PIECES)
    return engine
