"""One wave of chats in this process, and what each of its steps showed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.load import Load
from benchmarks.harness.machine import private_bytes
from benchmarks.real.in_process import scheduler_of
from benchmarks.real.one_run import add_chats, pie_counters

Wave = list[dict[str, Any]]
"""The samples of a wave, as they travel between processes."""

LOOK_SECONDS = 0.05
"""Between looks at the memory while nothing runs."""


@dataclass(frozen=True)
class Sample:
    """The process after a step, or after a while without one.

    Attributes:
        at: seconds after the wave began.
        phase: "before" the wave, "prompts" while a chat has no token yet, "peak", "light" once
            only the longer chats are left, "paused" where a step computed nothing, "idle".
        seconds: duration of the step; 0 where none ran.
        memory: bytes of the process; see `private_bytes`.
        pool: bytes that the pool holds.
        waits: times so far that the schedule paused for the pool's memory.
        waited: seconds that it paused.
    """

    at: float
    phase: str
    seconds: float
    memory: int
    pool: int
    waits: int
    waited: float


def run_wave(llm: Any, load: Load, longer: list[int], idle: float) -> Wave:
    """Run the chats until they are done, then wait `idle` seconds; returns the samples.

    Looking happens between the steps, and takes well below a millisecond.
    """
    begin = time.perf_counter()
    samples: list[Sample] = []

    def look(phase: str, seconds: float) -> None:
        counters = pie_counters(llm)
        now = time.perf_counter() - begin
        memory, pool = private_bytes(), counters["pool_bytes"]
        pauses = scheduler_of(llm).pie_controller.pool
        waits, waited = pauses.pauses, pauses.paused_seconds
        samples.append(Sample(now, phase, seconds, memory, int(pool), waits, waited))

    look("before", 0.0)
    engine = llm.llm_engine
    requests = scheduler_of(llm).requests
    add_chats(llm, load, longer)
    started: set[str] = set()
    done = 0
    while engine.has_unfinished_requests():
        phase = "prompts" if len(started) < load.chats else "peak"
        if done == load.chats - len(longer):
            phase = "light"
        computed = sum(request.num_computed_tokens for request in requests.values())
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if not outputs and computed == sum(r.num_computed_tokens for r in requests.values()):
            phase = "paused"  # It waits for the pool's memory.
        started.update(output.request_id for output in outputs)
        done += sum(output.finished for output in outputs)
        look(phase, seconds)
    engine.step()  # As an engine process does, to tell the workers who is done.
    resume = time.perf_counter() + idle
    while time.perf_counter() < resume:
        time.sleep(LOOK_SECONDS)
        look("idle", 0.0)
    return [asdict(sample) for sample in samples]
