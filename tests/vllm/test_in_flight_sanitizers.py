"""The engine under ASan and TSan, fed with what vLLM's AsyncScheduler and the policy decided.

A sanitizer's runtime must be the first library of a process, which Python is not; so the plans and
the compute of seeded runs are written down, and a C++ program replays them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.builds import build_program
from tests.helpers.fuzz import BLOCK_SIZE, make_driver, play, random_case
from tests.helpers.trace import TraceMemory

pytestmark = [pytest.mark.vllm, pytest.mark.sanitizer]

SEEDS = range(100, 160)
ENOUGH_STORED = 300
PAGE_BYTES = (1032, 4096, 200)


def record(seed: int, folder: Path) -> TraceMemory:
    """Play a random case and write its trace."""
    case = random_case(
        seed,
        asynchronous=True,
        num_layers=2 + seed % 3,
        ring_slots=1 + seed % 2,
        page_bytes=PAGE_BYTES[seed % 3],
    )
    memory = TraceMemory(case.geometry, BLOCK_SIZE)
    decider = case.decider()
    play(make_driver(case.geometry, memory, decider, check=False, **case.options), case)
    memory.save(folder / f"{seed}.trace", seed)
    return memory


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Traces of as many seeds as it takes to move many blocks in both directions."""
    folder = tmp_path_factory.mktemp("traces")
    loaded = stored = 0
    for seed in SEEDS:
        memory = record(seed, folder)
        loaded += memory.blocks_loaded
        stored += memory.blocks_stored
        if stored > ENOUGH_STORED and len(list(folder.iterdir())) >= 12:
            break
    assert stored > ENOUGH_STORED
    assert loaded > stored
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=["address", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The replay program and the engine in one piece, under a sanitizer."""
    return build_program("replay_trace", tmp_path_factory.mktemp(request.param), request.param)


def replay(program: Path, *traces: Path) -> subprocess.CompletedProcess[str]:
    """Run the program without address randomisation, which old libtsan needs."""
    # vLLM preloads libraries into its processes; a sanitizer's runtime must be the first one.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        ["setarch", "-R", program, *traces],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_replayed_steps_are_clean_under_a_sanitizer(program: Path, traces: list[Path]) -> None:
    """No race, no bad access and no wrong page, with copies of random lateness."""
    done = replay(program, *traces)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no wrong byte" in done.stdout


def test_a_broken_trace_is_noticed(program: Path, traces: list[Path], tmp_path: Path) -> None:
    """Negative control: with all loads left out the replay finds a wrong page."""
    found = False
    for trace in traces:
        broken = tmp_path / trace.name
        broken.write_text(without_loads(trace.read_text()))
        found |= "wrong bytes" in replay(program, broken).stdout
    assert found


def without_loads(text: str) -> str:
    """The trace with no block loaded in any step."""
    lines = []
    for number, line in enumerate(text.splitlines()):
        words = line.split()
        if number and words[0] == "1":
            at = 4
            for _ in range(2):  # over stores and promotions
                at += 1 + 3 * int(words[at])
            count = max(0, int(words[at]))
            words[at : at + 1 + 3 * count] = ["0"]
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"
