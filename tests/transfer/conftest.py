"""An engine per test, closed after it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pie_vllm.transfer.engine import TransferEngine
from pie_vllm.transfer.streams import DriverStream
from tests.helpers import standin
from tests.helpers.cuda_calls import Cuda
from tests.transfer.driving import View, geometry


@pytest.fixture
def make_engine() -> Iterator[Callable[..., TransferEngine]]:
    """Makes engines of the small geometry; sizes and engine options by name."""
    engines: list[TransferEngine] = []

    def make(
        debug: tuple[str, ...] = (),
        link_bytes_per_s: float | None = None,
        chunks: int | None = None,
        **sizes: Any,
    ) -> TransferEngine:
        engine = TransferEngine(
            geometry(**sizes), debug=debug, link_bytes_per_s=link_bytes_per_s, chunks=chunks
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., TransferEngine]) -> TransferEngine:
    """An engine of the small geometry."""
    return make_engine()


@pytest.fixture
def stream(engine: TransferEngine) -> DriverStream:
    """A stream of that engine's driver."""
    return DriverStream(engine)


@pytest.fixture
def view(engine: TransferEngine) -> View:
    """What its pages and rows hold."""
    return View(engine)


@pytest.fixture
def run_native() -> Callable[..., str]:
    """Runs a sanitizer build without address randomisation, which old libtsan needs."""

    def run(*command: object) -> str:
        result = subprocess.run(
            ["setarch", "-R", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},  # vLLM sets it.
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """The stand-in for libcuda with device 0 current; nothing of it may be live afterwards."""
    loaded = standin.load()
    cuda = Cuda(loaded)
    cuda.start()
    yield cuda
    loaded.clear()
    cuda.close()
    live = loaded.live()
    loaded.reset()
    assert not live
