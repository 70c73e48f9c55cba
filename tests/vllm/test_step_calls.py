"""What pie's overrides put between vLLM's loop over the running requests and vLLM's own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import vllm as _vllm
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager

import pie_vllm
from benchmarks.real.modelled_side import prompt_of
from benchmarks.real.parked_context import ANSWER, ParkedContext
from benchmarks.real.scheduler_side import BLOCK_SIZE, Side
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager

pytestmark = pytest.mark.vllm

CONTEXT = 256
CALLS_MAX = 12
"""Maximum number of Python functions entered for each parked block that comes back."""


def _plain(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters]


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (PieBlockSpaceManager.allocate_slots, KVCacheManager.allocate_slots),
        (PieBlockPool.cache_full_blocks, BlockPool.cache_full_blocks),
    ],
)
def test_what_each_running_request_calls_takes_stocks_arguments_by_place(
    ours: Callable[..., Any], stock: Callable[..., Any]
) -> None:
    """``*args, **kwargs`` make a tuple and a dict for each of hundreds of requests a step."""
    assert _plain(ours) == _plain(stock)


def _calls_of(step: Callable[[], Any], folders: tuple[str, ...]) -> int:
    """How many Python functions of files in these folders a step enters."""
    calls = 0

    def entered(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(folders)

    sys.setprofile(entered)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def _runs(side: Side, name: str) -> bool:
    return any(request.request_id == name for request in side.scheduler.running)


def test_a_parked_block_comes_back_without_calls_of_its_own() -> None:
    """They are found, copied back and evicted as lists; vLLM's own code counts, too."""
    folders = tuple(str(Path(module.__file__ or "").parent) for module in (pie_vllm, _vllm))
    side = ParkedContext(CONTEXT).side
    usual = _calls_of(side.step, folders)
    side.add("again", prompt_of(1, CONTEXT * BLOCK_SIZE + 1), ANSWER)
    calls = []
    while not _runs(side, "again"):
        calls.append(_calls_of(side.step, folders) - usual)
    assert len(calls) > 1, "it has come back in parts"
    assert sum(calls) < CALLS_MAX * CONTEXT
