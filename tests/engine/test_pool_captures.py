"""The pool's thread beside captures of CUDA graphs, over the stand-in for libcuda."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import PoolOrder
from tests.engine.standin_fixtures import GLOBAL, Graphs
from tests.helpers.cuda_calls import Cuda
from tests.helpers.standin import load

INVALIDATED = 901
GROWN, FIRST = PoolOrder(2, False), PoolOrder(1, False)
cuda_only = pytest.mark.parametrize("driver", ["cuda"], indirect=True)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Tried:
    """An engine's chunks; says how many calls have ended."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine, self.ended = engine, 0

    def commit_chunk(self, chunk: int) -> None:
        self._call(self.engine.commit_chunk, chunk)

    def release_chunk(self, chunk: int) -> None:
        self._call(self.engine.release_chunk, chunk)

    def _call(self, call: Callable[[int], None], chunk: int) -> None:
        try:
            call(chunk)
        finally:
            self.ended += 1


@cuda_only
@pytest.mark.parametrize("paused", [True, False])
def test_a_capture_is_broken_unless_the_thread_rests(
    make_engine: Callable[..., TransferEngine], paused: bool
) -> None:
    """By registering memory, or waiting for the copy streams, in another thread."""
    chunks = Tried(make_engine(chunks=1))
    cuda = Cuda(load())
    graphs, stream = Graphs(cuda), cuda.stream()
    keeper = PoolKeeper(chunks, 5, idle_seconds=100)

    def captured(order: PoolOrder) -> int:
        """The code at the end of a capture in which an order comes."""
        before = chunks.ended
        graphs.begin(stream, GLOBAL)
        keeper.follow(order)
        if paused:
            time.sleep(0.05)
            assert chunks.ended == before
        else:
            until(lambda: chunks.ended > before)
        return graphs.end(stream)

    if paused:
        with keeper.paused():
            assert captured(GROWN) == 0
        until(lambda: keeper.state.chunks == 2)
        with keeper.paused():
            assert captured(FIRST) == 0
        until(lambda: keeper.state.chunks == 1 and chunks.ended == 2)
    else:
        assert captured(GROWN) == INVALIDATED
        assert keeper.state.chunks == 1
    keeper.close()
    graphs.close()
    cuda.result("cuStreamDestroy", stream)
