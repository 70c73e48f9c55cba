"""The parts of the demo that need no server: sizes, samples, reasons, picture."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo
from benchmarks.harness.load import Load
from benchmarks.harness.shape import KvShape, PieSizes
from benchmarks.real.block_samples import BlockSample, block_sample, sampled_blocks
from benchmarks.real.chats import ChatTimes, LoadTimes
from benchmarks.real.counters import parse_metrics
from benchmarks.real.demo_picture import draw
from benchmarks.real.demo_report import blocks_needed, explain, reasons, result
from benchmarks.real.serving_run import ServedRun, Setting, server_arguments

SHAPE = KvShape(layers=30, page_bytes=98304)
SETTING = Setting(Path("model"), SHAPE, 128, "bfloat16", 1024, False, Path("logs"))
PIE = {
    "tok_s": 110.0,
    "seconds": 90.0,
    "itl_p50_ms": 200.0,
    "preemptions": 0.0,
    "pie_pooled_peak": 60.0,
    "pie_resident_blocks": 34.0,
    "pie_pooled_blocks": 60.0,
    "pie_ring_bytes": 6.0 * SHAPE.block_bytes,
    "pie_stall_seconds": 0.1,
    "pie_loaded_bytes": 5e9,
    "pie_stored_bytes": 1e8,
}
STOCK = {"tok_s": 100.0, "seconds": 99.0, "itl_p50_ms": 190.0, "preemptions": 20.0}


def run_of(figures: dict[str, float], *blocks: BlockSample) -> ServedRun:
    chats = tuple(ChatTimes(0.0, (1.0, 2.0, 2.5 + i), 4) for i in range(3))
    return ServedRun(figures, LoadTimes(5.5, chats), blocks)


def test_pie_is_started_as_a_user_starts_it() -> None:
    """One option more than stock's; sizes only where they were given."""
    stock = server_arguments(SETTING, 40, None)
    plain = server_arguments(SETTING, 40, PieSizes())
    assert plain == [*stock, "--block-manager=pie"]
    sized = server_arguments(SETTING, 40, PieSizes(80, 2, 0.133))
    assert sized[len(plain) :] == [
        "--pie-pool-gib=0.2198",
        "--additional-config.pie.ring_slots=2",
        "--additional-config.pie.ring_fraction=0.133",
    ]
    assert f"--kv-cache-memory-bytes={40 * SHAPE.block_bytes}" in stock


def test_metrics_are_summed_over_labels_and_by_reason() -> None:
    """Two engines, two reasons; comments are no samples."""
    page = """# HELP vllm:pie_head_waits_total steps
vllm:pie_head_waits_total{engine="0",model_name="m",reason="window"} 3.0
vllm:pie_head_waits_total{engine="1",model_name="m",reason="window"} 4.0
vllm:pie_head_waits_total{engine="0",model_name="m",reason="link"} 1.0
vllm:num_preemptions_total{engine="0"} 5.0
"""
    assert parse_metrics(page) == {
        "vllm:pie_head_waits_total": 8,
        "vllm:pie_head_waits_total:window": 7,
        "vllm:pie_head_waits_total:link": 1,
        "vllm:num_preemptions_total": 5,
    }


def test_a_sample_tells_the_tiers_apart() -> None:
    """Pie's gauges as they are; stock's share of all blocks but the null block."""
    pie = {
        "vllm:pie_resident_blocks_used": 30.0,
        "vllm:pie_pooled_blocks_used": 12.0,
        "vllm:pie_parked_blocks": 5.0,
        "vllm:kv_cache_usage_perc": 0.4,
    }
    assert block_sample(pie, 40, 1.5) == (1.5, 30, 12, 5)
    assert block_sample({"vllm:kv_cache_usage_perc": 1.0}, 40, 2.0) == (2.0, 39, 0, 0)


def test_sampling_goes_on_until_the_load_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order; none after the block; a page that cannot be read is no silence."""
    monkeypatch.setattr("benchmarks.real.block_samples.SAMPLE_SECONDS", 0.01)
    with sampled_blocks(lambda: {"vllm:kv_cache_usage_perc": 0.5}, 41) as samples:
        while len(samples) < 3:
            time.sleep(0.01)
    taken = list(samples)
    time.sleep(0.05)
    assert samples == taken == sorted(taken)
    assert {sample.resident for sample in taken} == {20}
    with pytest.raises(KeyError, match="kv_cache_usage"), sampled_blocks(dict, 41):
        pass


def test_what_held_pie_back_is_said(capsys: Any) -> None:
    """Only below the ratio that is expected, and by the counters."""
    need = blocks_needed(Load(32, 300), 128)
    assert need == 96
    (found,) = reasons(need, PIE, STOCK)
    assert "94 together, the chats need 96" in found
    more = {"preemptions": 2.0, "pie_stall_seconds": 9.0, "itl_p50_ms": 285.0}
    more |= {"pie_head_waits:window": 7.0, "pie_head_waits:link": 40.0}
    said = reasons(90, PIE | more, STOCK | {"preemptions": 0.0})
    parts = ("40 steps", "preempted 2", "10.0%", "1.50 x", "Stock preempted nothing")
    assert [part in line for part, line in zip(parts, said, strict=True)] == [True] * 5
    assert "link feeds no more" in said[0]
    assert reasons(90, PIE, STOCK) != []
    explain(SETTING, Load(32, 300), PIE, STOCK)
    assert "Less than 1.25 x" in capsys.readouterr().out
    explain(SETTING, Load(32, 300), PIE | {"tok_s": 130.0}, STOCK)
    said_then = capsys.readouterr().out
    assert "34 resident and 60 pooled" in said_then
    assert "Less than" not in said_then


def test_the_result_has_both_sides_and_their_ratio() -> None:
    """The names that build/demo.json promises."""
    found = result(run_of(PIE), run_of(STOCK))
    assert found["ratio"] == pytest.approx(1.1)
    assert (found["pie_preemptions"], found["stock_preemptions"]) == (0, 20)
    assert (found["pooled_blocks_peak"], found["bytes_loaded"]) == (60, 5_000_000_000)
    assert result(None, run_of(STOCK))["pie"] is None


def width_of(picture: Path) -> int:
    """Pixels, as the header of a PNG file tells."""
    width: int = struct.unpack(">I", picture.read_bytes()[16:20])[0]
    return width


@pytest.mark.parametrize("sides", ["both", "pie", "stock"])
def test_the_picture_is_as_wide_as_a_page(tmp_path: Path, sides: str) -> None:
    """Also of one side alone."""
    pie = run_of(PIE, BlockSample(0.0, 3, 0, 0), BlockSample(3.0, 30, 20, 4))
    stock = run_of(STOCK, BlockSample(0.0, 3, 0, 0), BlockSample(3.0, 39, 0, 0))
    path = tmp_path / "new" / "demo.png"
    chosen = (pie if sides != "stock" else None, stock if sides != "pie" else None)
    assert draw(path, Load(3, 4), 40, *chosen) == path
    assert width_of(path) == 800


def test_both_sides_get_the_same_load_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where the first side made it shorter; the picture's path comes last."""
    asked: list[tuple[Load, int, PieSizes | None]] = []

    def run_server(*args: Any) -> ServedRun:
        load, blocks, pie = args[2:5]
        asked.append((load, blocks, pie))
        figures = PIE if pie else STOCK
        return run_of(figures | {"tokens_per_chat": 120.0}, BlockSample(0.0, 3, 0, 0))

    monkeypatch.setattr(demo, "run_server", run_server)
    monkeypatch.setattr(demo, "kv_shape", lambda *_: SHAPE)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr("sys.argv", ["demo"])
    assert demo.main() == 0
    assert asked == [(Load(32, 300), 40, PieSizes()), (Load(32, 120), 40, None)]
    said = "".join(capsys.readouterr().out.split())  # Lines may be broken anywhere.
    assert said.endswith(f"picture:{tmp_path / 'demo.png'}")
    assert (tmp_path / "demo.png").exists()
    assert json.loads((tmp_path / "demo.json").read_text())["ratio"] == pytest.approx(1.1)
