"""The pool's chunks: taken and given back beside steps, empty when new, never named when gone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, IntegrityError
from tests.engine.driving import View, geometry, inject, plan, run_step
from tests.helpers.process import resident_bytes
from tests.helpers.streams import DriverStream


@pytest.fixture
def small(make_engine: Callable[..., TransferEngine]) -> TransferEngine:
    """Four chunks of five rows, of which the first is there."""
    return make_engine(chunks=1, rows=20)


def test_the_pool_begins_with_as_many_chunks_as_asked(
    make_engine: Callable[..., TransferEngine],
) -> None:
    """At least one, at most all, all by default; their bytes are reported."""
    row = geometry().row_bytes
    for chunks, rows in ((None, 18), (-1, 18), (99, 18), (0, 5), (1, 5), (3, 15), (4, 18)):
        assert make_engine(chunks=chunks, rows=18).host_bytes == rows * row
    engine = make_engine(chunks=1, rows=18)
    for chunk, rows in ((3, 8), (1, 13), (1, 13)):
        engine.commit_chunk(chunk)
        assert engine.host_bytes == rows * row
    for chunk, rows in ((1, 8), (1, 8), (3, 5)):
        engine.release_chunk(chunk)
        assert engine.host_bytes == rows * row


@pytest.mark.parametrize("chunk", [-1, 4])
def test_a_chunk_that_the_pool_does_not_have(small: TransferEngine, chunk: int) -> None:
    with pytest.raises(ConfigError, match=f"no chunk {chunk} of the pool; there are 4"):
        small.commit_chunk(chunk)
    with pytest.raises(ConfigError, match="no chunk"):
        small.release_chunk(chunk)


def test_a_plan_that_names_a_row_of_a_chunk_that_is_not_there_is_refused(
    small: TransferEngine,
) -> None:
    """Nothing of it is submitted, and the engine goes on."""
    view = View(small)
    view.write_all(0, 1)
    run_step(small, plan(1, stores=((0, 0, 1),), loads=((8, 0, 1),)))
    for step, bad in enumerate(
        (
            plan(2, stores=((0, 5, 1),)),
            plan(2, promotions=((1, 6, 1),)),
            plan(2, loads=((8, 7, 1),)),
        )
    ):
        with pytest.raises(IntegrityError, match=f"row {5 + step}: its chunk of the pool is not"):
            small.begin_step(bad)
    run_step(small, plan(2, loads=None))
    small.commit_chunk(1)
    run_step(small, plan(3, stores=((0, 5, 1),), loads=((8, 5, 1),)))
    small.release_chunk(1)
    with pytest.raises(IntegrityError, match="load of row 5"):
        small.begin_step(plan(4, loads=None))


def test_a_chunk_that_goes_in_the_middle_of_a_step_fails_the_step(small: TransferEngine) -> None:
    """By name, in the layer whose copies are submitted next; a page of it has no address."""
    view = View(small)
    view.write_all(0, 1)
    small.commit_chunk(1)
    run_step(small, plan(1, stores=((0, 5, 1),), loads=((8, 5, 1),)))
    small.begin_step(plan(2, loads=None))
    small.before_write(0)
    small.before_attention(0)
    small.release_chunk(1)
    with pytest.raises(IntegrityError, match="row 5: its chunk of the pool is not there"):
        small.after_attention(0)
    small.abort_step()
    run_step(small, plan(3, loads=((8, 0, 1),)))


def test_a_chunk_taken_again_is_empty(small: TransferEngine) -> None:
    """Nobody finds what was there before."""
    view = View(small)
    view.write_all(0, 1)
    small.commit_chunk(2)
    run_step(small, plan(1, stores=((0, 10, 1),), loads=()))
    run_step(small, plan(2, loads=()))
    assert view.row(10, 3).any()
    small.release_chunk(2)
    small.commit_chunk(2)
    assert not any(view.row(row, layer).any() for row in range(10, 15) for layer in range(6))


@pytest.mark.alone
def test_a_release_waits_for_copies_under_way(make_engine: Callable[..., TransferEngine]) -> None:
    """The memory goes when the last copy of its rows is over, in a thread that may wait."""
    engine = make_engine(chunks=2, rows=20)
    view = View(engine)
    for layer in range(6):
        view.write(layer, 0, 7)
    inject(engine, "late", milliseconds=100, up_to=120)
    stream = DriverStream(engine)
    run_step(engine, plan(1, stores=((0, 5, 1),), loads=((8, 5, 1),)), stream=stream)
    before = engine.host_bytes
    releasing = threading.Thread(target=engine.release_chunk, args=(1,))
    releasing.start()
    assert engine.host_bytes == before, "copies of 100 ms each are still to come"
    seen: list[bytes] = []
    stream.launch(lambda: seen.append(bytes(view.page(5, 8))))
    stream.synchronize()
    releasing.join()
    assert seen == [bytes(view.page(5, 0))]
    assert engine.host_bytes < before
    stream.close()


def test_resident_memory_follows(make_engine: Callable[..., TransferEngine]) -> None:
    """What is given back goes back to the system."""
    mib = 1 << 20
    engine = make_engine(chunks=1, rows=64, chunk_rows=16, page_bytes=mib // 2)
    size = 16 * 6 * mib // 2
    start = resident_bytes()
    for chunk in (1, 2, 3):
        engine.commit_chunk(chunk)
    assert abs(resident_bytes() - start - 3 * size) < size / 4
    for chunk in (3, 2, 1):
        engine.release_chunk(chunk)
    assert abs(resident_bytes() - start) < size / 4
