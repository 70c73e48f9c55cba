"""A process of the engine is killed amid 32 streams."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.serving.conftest import Pair
from tests.serving.process import Ending, Server, frames_of_ours
from tests.serving.settings import make_server
from tests.serving.traffic import CLIENTS, interrupted

END_SECONDS = 90.0
CORE = "VLLM::EngineCore"
WORKER = "VLLM::Worker"
pytestmark = [pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(1200)]


def crash(server: Server, victim: str, pie: bool = True) -> Ending:
    """Kill one process of the engine amid the streams; how the server ended then."""
    target = server.child(victim)
    answers = interrupted(server.url, lambda: server.signal(signal.SIGKILL, target), END_SECONDS)
    ending = server.await_end(END_SECONDS)
    assert len(answers) == CLIENTS
    assert not any(answer.complete for answer in answers)
    assert frames_of_ours(server.text()) == []
    assert server.maps_an_arena == pie
    return ending


@pytest.mark.slow
def test_nothing_outlives_a_killed_engine_core(pair: Pair) -> None:
    """The server ends by itself with stock's status; worker, memory and clients go with it."""
    ending = crash(pair.killed, CORE)
    assert ending.status == 0
    assert ending.left == ()


@pytest.mark.soak
@pytest.mark.parametrize("victim", [CORE, WORKER])
def test_a_crash_ends_as_with_stock(model: Path, victim: str) -> None:
    """Whichever process is killed, status and remains are those of stock vLLM."""
    endings = []
    for pie in (True, False):
        name = f"crash-{victim.rpartition(':')[2]}-{'pie' if pie else 'stock'}"
        with make_server(model, name, pie=pie) as server:
            server.start()
            endings.append(crash(server, victim, pie))
    ours, stock = endings
    assert ours.status == stock.status
    assert ours.left == stock.left == ()
