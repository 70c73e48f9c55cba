"""The benchmark of the scheduler measures what it says, at tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import thread_time_ns

import pytest

from benchmarks import scheduler_cost
from benchmarks.real.parked_context import ParkedContext
from benchmarks.real.returning_chats import chats_cost
from benchmarks.real.row_bookkeeping import bookkeeping_bytes
from benchmarks.real.scheduler_phases import PhaseCost, phase_costs, tiers
from benchmarks.scheduler_cost import ROWS, SHORT, Run
from benchmarks.simulated.gpu_machines import H200, ROW_BYTES
from pie_vllm.vllm.scheduler_side.scheduler import PieSchedulerMixin

pytestmark = pytest.mark.vllm


def burn(nanoseconds: int) -> None:
    """Use CPU time of this thread."""
    end = thread_time_ns() + nanoseconds
    while thread_time_ns() < end:
        pass


def test_chunks_are_those_of_a_server() -> None:
    """64 MiB of rows of 2 MiB, or what the link asks for; not one chunk for all."""
    assert tiers(10_000).chunk_rows == H200.geometry().chunk_rows < 4096


@pytest.mark.parametrize("blocks", [64, 300])
def test_a_context_comes_back_whole_from_the_pool(blocks: int) -> None:
    """All its blocks are found parked, and copied back; on stock's they are on the device still."""
    context = ParkedContext(blocks)
    manager = context.side.scheduler.kv_cache_manager
    assert manager.hit_counts.hits.parked == 0
    cost = context.comes_back()
    assert manager.hit_counts.hits.parked == blocks
    assert cost.blocks == blocks
    assert cost.admission >= cost.admission_max
    stock = ParkedContext(blocks, pie=False).comes_back()
    assert stock.steps == 1


def test_a_context_that_is_lost_is_no_result() -> None:
    """Negative control: what is parked was given up before the context came."""
    context = ParkedContext(300)
    context.side.scheduler.kv_cache_manager.residency.forget_parked()
    with pytest.raises(RuntimeError, match="not all of the context's 300 blocks"):
        context.comes_back()


def test_a_head_that_waits_is_not_admitted() -> None:
    """What is measured is waiting; where there is room, it is an error."""
    assert ParkedContext(2048).waits(2) < 1e6
    with pytest.raises(RuntimeError, match="did not have to wait"):
        ParkedContext(64).waits(2)


def test_time_in_pies_code_is_own_and_in_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight milliseconds more in the statistics, which stock's code calls, are pie's all the same.

    They are as long because the difference of two whole steps scatters by one or two.
    """
    original = PieSchedulerMixin.make_stats

    def slow(self: PieSchedulerMixin, *args: object, **kwargs: object) -> object:
        burn(8_000_000)
        return original(self, *args, **kwargs)

    def costs() -> PhaseCost:
        return phase_costs(10_000, 6, phases=["idle"])["idle"]

    before = costs()
    monkeypatch.setattr(PieSchedulerMixin, "make_stats", slow)
    after = costs()
    assert after.own - before.own > 6000
    assert after.difference - before.difference > 3000


def test_chats_return_and_find_parked_blocks() -> None:
    """More chats than the device holds: pie finds their blocks in the pool."""
    sizes = {"chats": 24, "steps": 250, "tokens": 512, "kv_bytes": 250 * ROW_BYTES}
    found = chats_cost(pie=True, haste=20.0, **sizes)
    assert found.steps == 250
    assert found.restored > 0
    assert found.p50 <= found.p99 <= found.max


def test_the_books_of_a_row_are_weighed() -> None:
    """Some tens of bytes at least, and no more with more rows."""
    few, many = bookkeeping_bytes(1000), bookkeeping_bytes(3000)
    assert 20 < many < 1.5 * few


@pytest.mark.parametrize("name", [name for name in ROWS if name != "start"])
def test_each_row_has_figures(name: str) -> None:
    """Each line says what was measured and what it is held against; ``start`` is elsewhere."""
    lines = ROWS[name](Run(SHORT, 1, True))
    assert lines
    assert len({what for what, _, _ in lines}) == len(lines)
    assert any(against for _, _, against in lines)


def test_the_command_writes_a_small_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the rows that were asked for, and how fast the machine was."""
    output = tmp_path / "scheduler_cost"
    options = ["--short", "--rounds", "1", "--only", "head", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["scheduler_cost", *options])
    monkeypatch.chdir(tmp_path)
    scheduler_cost.main()
    written = json.loads(output.with_suffix(".json").read_text())
    assert set(written) == {"machine", "million_loops_per_second", "head"}
    assert output.with_suffix(".json").stat().st_size < 4000
