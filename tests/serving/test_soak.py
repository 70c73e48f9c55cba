"""Minutes of load from 32 clients: nothing grows, nothing changes."""

from __future__ import annotations

import os
import signal
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.real.counters import last_pie_line
from tests.serving.process import Server, Usage, frames_of_ours, tracebacks_in_service
from tests.serving.settings import make_server
from tests.serving.traffic import CLIENTS, Answer, alone, differing, interrupted, load, load_for

SOAK_SECONDS = float(os.environ.get("PIE_SOAK_SECONDS", "300"))
SAMPLE_SECONDS = min(5.0, SOAK_SECONDS / 12)
DRAIN_SECONDS = 240
"""For 32 answers in flight on a busy machine; 20 s are enough on an idle one."""

END_SECONDS = 60.0

ALONE = 4
MIB = 1 << 20
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.soak,
    pytest.mark.timeout(2 * int(SOAK_SECONDS) + 2400),
]


@contextmanager
def sampling(server: Server) -> Iterator[list[dict[str, Usage]]]:
    """What the engine's processes use, every few seconds."""
    samples: list[dict[str, Usage]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(server.engine_usage())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


Quarters = dict[str, tuple[list[Usage], list[Usage]]]
"""By process, the second quarter of the samples and the last one."""


def quarters(samples: list[dict[str, Usage]]) -> Quarters:
    """What is compared: the first quarter is still a warm-up."""
    count = len(samples) // 4
    assert count >= 2, f"only {len(samples)} samples"
    middle, last = samples[count : 2 * count], samples[-count:]
    return {title: ([s[title] for s in middle], [s[title] for s in last]) for title in samples[0]}


def growth(early: list[Usage], late: list[Usage]) -> float:
    """Private bytes gained, in the median."""
    before, after = (statistics.median(u.private_bytes for u in part) for part in (early, late))
    return after - before


def assert_as_flat(ours: Quarters, stock: Quarters) -> None:
    """No more threads and descriptors late than early; memory grows no more than stock's.

    Stock's worker grows for minutes too, on a CPU: in one run of four minutes from 1355 to 1496
    MiB, pie's from 1358 to 1436 (2 cores, 2026-11-23).
    """
    for title, (early, late) in ours.items():
        assert max(u.threads for u in late) <= max(u.threads for u in early), title
        assert max(u.descriptors for u in late) <= max(u.descriptors for u in early) + 2, title
        grown, allowed = growth(early, late), max(growth(*stock[title]), 0.0) + 16 * MIB
        assert grown <= allowed, f"{title} grew by {grown / MIB:.1f} of {allowed / MIB:.1f} MiB"


def soaked(server: Server) -> tuple[list[Answer], Quarters]:
    """Start a server and load it for the time: the answers, and what it used."""
    server.start()
    load(server.url, range(0, 1))  # warm-up: grammar threads, allocators
    with sampling(server) as samples:
        answers = load_for(server.url, SOAK_SECONDS)
    return answers, quarters(samples)


def stock_under_load(model: Path) -> Quarters:
    """What stock vLLM uses under the same load."""
    with make_server(model, "soak-stock", "--api-server-count=2", pie=False) as server:
        _, used = soaked(server)
        server.signal(signal.SIGTERM)
        server.await_end(END_SECONDS)
    return used


def test_minutes_of_load_change_nothing(model: Path) -> None:
    """Usage as flat as stock's, answers equal, blocks free after, nothing left at the end."""
    stock = stock_under_load(model)
    with make_server(model, "soak", "--api-server-count=2") as server:
        answers, used = soaked(server)
        assert [a for a in answers if a.error is not None] == []
        assert [a for a in answers if a.kind != "aborted" and not a.complete] == []
        assert len(answers) > 2 * CLIENTS
        references = [alone(server.url, client) for client in range(ALONE)]
        assert differing([*answers, *references]) == []
        assert_as_flat(used, stock)
        metrics = server.metrics()
        assert metrics["vllm:num_preemptions_total"] > 0
        assert metrics["vllm:kv_cache_usage_perc"] == 0
        assert last_pie_line(server.log)["bytes_loaded"] > 0
        server.signal(signal.SIGTERM)
        assert_clean(server, END_SECONDS)


def test_a_drain_completes_the_streams(model: Path) -> None:
    """With --shutdown-timeout, SIGTERM lets answers in flight complete; the worker closes pie.

    With one API server: stock vLLM 0.32 with two of them closes their sockets to the engine
    at once, and their streams hang until the time is over.
    """
    with make_server(model, "drain", f"--shutdown-timeout={DRAIN_SECONDS}") as server:
        server.start()
        reference = alone(server.url, 0)
        last = interrupted(
            server.url, lambda: server.signal(signal.SIGTERM), DRAIN_SECONDS + END_SECONDS
        )
        assert_clean(server, DRAIN_SECONDS)
        assert "all workers exited gracefully" in server.text()
        assert [a for a in last if not a.complete] == []
        assert differing([reference, *last]) == []
        assert last_pie_line(server.log)["pooled"] == 0, "the totals are logged at the end"


def assert_clean(server: Server, seconds: float) -> None:
    """The server ends in time with status 0, leaves nothing and has logged no error of ours."""
    ending = server.await_end(seconds)
    assert ending.status == 0
    assert ending.left == ()
    assert server.maps_an_arena
    assert tracebacks_in_service(server.text()) == []
    assert frames_of_ours(server.text()) == []
