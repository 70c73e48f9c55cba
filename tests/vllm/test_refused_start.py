"""What only shows once an engine starts ends with the same clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.engine import EngineError, Engines, Setup

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SETUP = Setup(Path(), 30, 10, 40)


def test_a_device_too_small_for_the_ring_says_what_would_do(engines: Engines, model: Path) -> None:
    """The error names the bytes given, the bytes needed and the flags that help."""
    setup = replace(SETUP, model=model, resident=2)
    with pytest.raises(EngineError, match="too small for a ring of 3 slots") as caught:
        engines.run(setup, [])
    for word in (str(setup.device_bytes), "bytes are needed", "--kv-cache-memory-bytes"):
        assert word in str(caught.value)


def test_a_pool_too_small_for_the_longest_request_says_what_is_missing(
    engines: Engines, model: Path
) -> None:
    """Residents and pool together must hold one request of --max-model-len."""
    setup = replace(SETUP, model=model, resident=10, pooled=12)
    with pytest.raises(EngineError, match=r"needs 33 blocks.*--pie-pool-gib by at least"):
        engines.run(setup, [])


def test_python_users_get_the_error_of_a_bad_value(engines: Engines, model: Path) -> None:
    """``LLM`` ends with the error that the command line gives."""
    with pytest.raises(EngineError, match="--pie-pool-gib is -"):
        engines.run(replace(SETUP, model=model, pooled=-3), [])
