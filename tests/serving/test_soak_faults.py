"""Minutes of load amid stopped workers, failed copies, refused chunks and reloaded adapters."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.helpers import soak_faults
from tests.helpers.model import REPOSITORY
from tests.helpers.reloaded_adapter import RANK, adapter
from tests.serving.process import Server, frames_of_ours, tracebacks_in_service
from tests.serving.settings import LOGS, SOON_IDLE, make_server
from tests.serving.test_soak import MIB, SOAK_SECONDS, sampling
from tests.serving.traffic import Answer, alone, differing, load_for

BUSY_SECONDS, QUIET_SECONDS = 45.0, 6.0
"""Quiet is longer than the pool's idle time, so that its memory goes and comes."""

STOPPED_SECONDS, BETWEEN_STOPS_SECONDS = 5.0, 20.0
"""A stop is longer than the pool's idle time."""

FAILED_COPIES, REFUSED_CHUNKS = 0.01, 0.2
GROWTH_MIB = 128
"""Bound on the private memory gained between the second and the last quarter, in MiB. It covers
the pool of 79 MiB, which comes and goes, and what a worker of stock vLLM on a CPU gains under this
load: 141 MiB between minutes 3 and 32, in steps, as its allocator's heap fragments (2026-11-29;
pie's worker gained 34 between minute 15 and the end of an hour)."""

END_SECONDS = 60.0
ADAPTER = "live"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.soak,
    pytest.mark.timeout(2 * int(SOAK_SECONDS) + 2400),
]


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``work(stop)`` in a thread meanwhile; its error is this context's."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


def stopping(server: Server) -> Callable[[threading.Event], None]:
    """Stops the worker now and then, for longer than the pool's idle time."""

    def work(stop: threading.Event) -> None:
        while not stop.wait(BETWEEN_STOPS_SECONDS):
            worker = server.child("VLLM::Worker")
            os.kill(worker, signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            os.kill(worker, signal.SIGCONT)

    return work


class Adapters:
    """A client that reloads one adapter in place and asks it what it asked before.

    Attributes:
        answers: by the seed of the adapter's weights, what it said.
        reloads: count.
    """

    def __init__(self, url: str, folder: Path, model: Path) -> None:
        self._http = httpx.Client(base_url=url, timeout=600.0, trust_env=False)
        self._folder = folder
        config = json.loads((model / "config.json").read_text())
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        self._config = config
        self.answers: dict[int, set[str]] = {1: set(), 2: set()}
        self.reloads = 0
        self._rng = random.Random(3)

    def turn(self) -> None:
        """Load one of two sets of weights, and ask."""
        seed = self._rng.choice((1, 2)) if self.reloads > 1 else 1 + self.reloads
        path = adapter(self._folder, self._config, seed)
        body = {"lora_name": ADAPTER, "lora_path": path, "load_inplace": self.reloads > 0}
        self._http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        self.reloads += 1
        for _ in range(2):
            self.answers[seed].add(self._ask())

    def _ask(self) -> str:
        prompt = [100 + (i * i) % 5000 for i in range(200)]
        body = {"model": ADAPTER, "prompt": prompt, "max_tokens": 24, "temperature": 0.0}
        more = {"ignore_eos": True, "return_token_ids": True}
        answer = self._http.post("/v1/completions", json={**body, **more})
        answer.raise_for_status()
        return json.dumps(answer.json()["choices"][0]["token_ids"])


def bursts(url: str, adapters: Adapters) -> list[Answer]:
    """Load with quiet in between, for the time of the soak.

    Adapters have their turn then: on a CPU, stock vLLM 0.32 gives other answers to requests without
    an adapter that run beside one with (46 of 86, 2026-11-29).
    """
    end = time.monotonic() + SOAK_SECONDS
    answers: list[Answer] = []
    while (left := end - time.monotonic()) > 0:
        answers += load_for(url, min(left, BUSY_SECONDS))
        adapters.turn()
        time.sleep(QUIET_SECONDS)
    adapters.turn()
    return answers


def test_minutes_of_faults_change_no_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wrong token, no request lost, memory flat; and the faults happened."""
    folder = soak_faults.plugin_folder(tmp_path / "plugin")
    faults = soak_faults.environment(
        folder, REPOSITORY, copies=FAILED_COPIES, chunks=REFUSED_CHUNKS
    )
    for name, value in {**faults, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}.items():
        monkeypatch.setenv(name, value)
    lora = ("--enable-lora", "--max-loras=1", f"--max-lora-rank={RANK}")
    with make_server(model, "soak-faults", SOON_IDLE, *lora) as server:
        server.start()
        adapters = Adapters(server.url, tmp_path / ADAPTER, model)
        with sampling(server) as samples, beside(stopping(server)):
            answers = bursts(server.url, adapters)
        curve = [{title: used.private_bytes // MIB for title, used in s.items()} for s in samples]
        (LOGS / "soak-faults.json").write_text(json.dumps(curve))
        assert [a for a in answers if a.error is not None] == []
        assert [a for a in answers if a.kind != "aborted" and not a.complete] == []
        references = [alone(server.url, client) for client in range(2)]
        assert differing([*answers, *references]) == []
        assert [len(said) for said in adapters.answers.values()] == [1, 1], adapters.answers
        assert adapters.answers[1] != adapters.answers[2]
        metrics = server.metrics()
        assert metrics["vllm:pie_failed_copies_total"] > 0
        assert metrics["vllm:num_preemptions_total"] > 0
        assert metrics["vllm:pie_loaded_bytes_total"] > 0
        assert "chunks of the CPU pool go back" in server.text()
        assert_flat(curve)
        server.signal(signal.SIGTERM)
        ending = server.await_end(END_SECONDS)
        assert ending.left == ()
        assert tracebacks_in_service(server.text()) == []
        assert frames_of_ours(server.text()) == []


def assert_flat(curve: list[dict[str, int]]) -> None:
    """Private memory late is that of the second quarter, about."""
    part = len(curve) // 4
    for title in curve[0]:
        early = sorted(sample[title] for sample in curve[part : 2 * part])[part // 2]
        late = sorted(sample[title] for sample in curve[-part:])[part // 2]
        assert late - early <= GROWTH_MIB, f"{title} grew from {early} to {late} MiB"
