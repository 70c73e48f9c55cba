"""Events have CUDA's semantics, snapshot included (csrc/DESIGN.md, driver behaviour)."""

from __future__ import annotations

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import TransferError
from tests.engine.driving import host_only, inject, latched
from tests.helpers.streams import DriverEvent, DriverStream


def test_stream_runs_in_order(engine: TransferEngine) -> None:
    stream, seen = DriverStream(engine), []
    for i in range(100):
        stream.launch(lambda i=i: seen.append(i))
    stream.synchronize()
    assert seen == list(range(100))


def test_never_recorded_event_is_complete(engine: TransferEngine) -> None:
    event, stream, seen = DriverEvent(engine), DriverStream(engine), []
    assert event.query()
    event.synchronize()
    stream.wait(event)
    stream.launch(lambda: seen.append(1))
    stream.synchronize()
    assert seen == [1]


def test_wait_before_the_first_record_passes(engine: TransferEngine) -> None:
    a, b, event = DriverStream(engine), DriverStream(engine), DriverEvent(engine)
    with latched(a):
        b.wait(event)
        event.record(a)
        b.synchronize()
        assert not event.query()


def test_wait_means_the_newest_record_at_the_call(engine: TransferEngine) -> None:
    a, b, event = DriverStream(engine), DriverStream(engine), DriverEvent(engine)
    event.record(a)
    a.synchronize()
    b.wait(event)  # of the first record, complete
    with latched(a):
        event.record(a)
        b.synchronize()
        assert not event.query()
    a.synchronize()
    assert event.query()


def test_later_record_on_a_free_stream_does_not_release_an_earlier_wait(
    engine: TransferEngine,
) -> None:
    a, b = DriverStream(engine), DriverStream(engine)
    event, passed = DriverEvent(engine), DriverEvent(engine)
    with latched(a):
        event.record(a)
        b.wait(event)
        passed.record(b)
        event.record()  # inline: complete at once
        assert event.query()
        assert not passed.query()
    b.synchronize()
    assert passed.query()


def test_later_record_does_not_prolong_an_earlier_wait(engine: TransferEngine) -> None:
    a, b, c = (DriverStream(engine) for _ in range(3))
    event = DriverEvent(engine)
    with latched(a) as first:
        event.record(a)
        b.wait(event)
        with latched(c):
            event.record(c)
            first.open()
            b.synchronize()
            assert not event.query()


def test_wait_holds_later_work_only(engine: TransferEngine) -> None:
    a, b, event, seen = DriverStream(engine), DriverStream(engine), DriverEvent(engine), []
    before = DriverEvent(engine)
    with latched(a):
        event.record(a)
        b.launch(lambda: seen.append("before"))
        before.record(b)
        b.wait(event)
        b.launch(lambda: seen.append("after"))
        before.synchronize()
        assert seen == ["before"]
    b.synchronize()
    assert seen == ["before", "after"]


@pytest.mark.alone
@host_only
def test_elapsed(engine: TransferEngine) -> None:
    stream, start, end = DriverStream(engine), DriverEvent(engine), DriverEvent(engine)
    inject(engine, "late", milliseconds=20)
    at = engine.arena.address
    start.record(stream)
    stream.copy("load", at, at + 64, 64)
    end.record(stream)
    with pytest.raises(TransferError, match="complete"):
        start.seconds_until(end)
    stream.synchronize()
    assert 0.02 <= start.seconds_until(end) < 0.5


@host_only
def test_closed_event_does_not_touch_submitted_waits(engine: TransferEngine) -> None:
    a, b, event, passed = DriverStream(engine), DriverStream(engine), DriverEvent(engine), []
    with latched(a):
        event.record(a)
        b.wait(event)
        b.launch(lambda: passed.append(1))
        event.close()
        assert passed == []
    b.synchronize()
    assert passed == [1]
    with pytest.raises(TransferError, match="no event"):
        event.query()


@host_only
def test_failed_stream_fails_its_waiters(engine: TransferEngine) -> None:
    a, b, event, seen = DriverStream(engine), DriverStream(engine), DriverEvent(engine), []
    at = engine.arena.address
    inject(engine, "fail")
    a.copy("load", at, at + 64, 64)
    event.record(a)
    b.wait(event)
    b.launch(lambda: seen.append(1))
    with pytest.raises(TransferError, match="injected fault"):
        a.synchronize()
    with pytest.raises(TransferError):
        b.synchronize()
    with pytest.raises(TransferError):
        event.synchronize()
    assert seen == []


@host_only
def test_unknown_stream_is_an_error(engine: TransferEngine) -> None:
    stream = DriverStream(engine)
    stream.close()
    with pytest.raises(TransferError, match="no stream"):
        stream.launch(lambda: None)
