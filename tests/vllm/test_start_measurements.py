"""Step times at start: within their bound on any machine, and the window follows a full step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pie_vllm.plan import Prior
from pie_vllm.vllm.compat import model_runner
from pie_vllm.vllm.worker_side import start_measurements
from pie_vllm.vllm.worker_side.start_measurements import (
    COPIED_BYTES,
    PASSES,
    PASSES_SECONDS,
    PROMPT_TOKENS,
    StepTimes,
    memory_bandwidth,
    with_attention,
    with_step_times,
)
from tests.helpers.kv_groups import one_group

pytestmark = pytest.mark.vllm


class Device:
    """Passes of ``base + by_token * tokens`` seconds; the first of each size takes longer."""

    def __init__(self, base: float, by_token: float) -> None:
        self.base, self.by_token = base, by_token
        self.sizes: list[int] = []
        self.spent = 0.0

    def seconds(self, tokens: int) -> float:
        return self.base + self.by_token * tokens

    def __call__(self, tokens: int) -> float:
        taken = self.seconds(tokens) * (1.5 if tokens not in self.sizes else 1.0)
        self.sizes.append(tokens)
        self.spent += taken
        return taken


def test_a_fast_device_is_timed_at_the_sizes_asked_for() -> None:
    """6 ms a step, as of an H200: three passes of each size, and no more than one size between."""
    device = Device(6e-3, 1e-6)
    times = StepTimes(device, 3, PASSES_SECONDS)
    found = [times.seconds(tokens) for tokens in (1, 256, 512)]
    assert found == pytest.approx([device.seconds(t) for t in (1, 256, 512)])
    assert [device.sizes.count(t) for t in (1, 256, 512)] == [PASSES - 1, PASSES, PASSES]
    assert len(set(device.sizes)) <= 4
    assert device.spent < 0.2


@pytest.mark.parametrize("base", [0.02, 0.1, 0.4, 3.0])
@pytest.mark.parametrize("by_token", [1e-3, 0.02])
def test_a_slow_device_stays_within_the_bound(base: float, by_token: float) -> None:
    """By one pass at most; what was not timed is continued in a straight line."""
    device = Device(base, by_token)
    times = StepTimes(device, 3, PASSES_SECONDS)
    found = [times.seconds(tokens) for tokens in (1, 256, 512)]
    assert device.spent < PASSES_SECONDS + 1.5 * device.seconds(1) + 0.5
    assert found[0] <= 1.5 * device.seconds(1)
    if base < 0.4:
        assert found == pytest.approx([device.seconds(t) for t in (1, 256, 512)], rel=0.6)
    assert found[0] <= found[1] <= found[2]


def test_times_of_requests_and_prompt_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """From three sizes, of which the last is no longer than a step may be."""
    device = Device(6e-3, 1e-5)
    monkeypatch.setattr(model_runner, "forward_pass", lambda _: device)
    prior = with_step_times(Prior(), object(), 64, 100)
    assert max(device.sizes) == 100 < 64 + PROMPT_TOKENS
    assert prior.step_seconds == pytest.approx(device.seconds(64))
    assert prior.request_seconds == pytest.approx(1e-5)
    assert prior.prompt_seconds == pytest.approx(1e-5)


def test_a_step_with_drafts_is_timed_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen requests of four tokens each; the seconds of a request are those of a token."""
    device = Device(6e-3, 1e-5)
    monkeypatch.setattr(model_runner, "forward_pass", lambda _: device)
    prior = with_step_times(Prior(), object(), 16, 512, 4)
    assert prior.step_seconds == pytest.approx(device.seconds(64))
    assert prior.request_seconds == pytest.approx(1e-5)
    assert max(device.sizes) == 64 + PROMPT_TOKENS


def test_attention_takes_as_long_as_memory_reads_its_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200: 110 GB of KV at 4 TB/s are 27.5 ms beside a step of 6 ms."""
    monkeypatch.setattr(start_measurements, "memory_bandwidth", lambda *_: 4e12)
    prior = with_attention(Prior(step_seconds=6e-3), torch.device("cpu"), 110 * 10**9)
    assert prior.attention_seconds == pytest.approx(0.0275)
    assert prior.full_step_seconds == pytest.approx(0.0335)
    assert Prior(attention_seconds=1.0).full_step_seconds is None


def test_a_devices_memory_is_timed() -> None:
    """A copy of this machine's memory: between 100 MB/s and 10 TB/s."""
    assert 1e8 < memory_bandwidth(torch.device("cpu"), COPIED_BYTES) < 1e13


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Sizes a worker whose device and link are made up; returns W."""
    from pie_vllm.vllm import settings
    from pie_vllm.vllm.worker_side import ranks, worker

    row = 2 << 20

    def found(longest: int, memory: float, device_blocks: int = 4000) -> int:
        monkeypatch.setattr(ranks, "least", lambda *values: values)
        monkeypatch.setattr(start_measurements, "memory_bandwidth", lambda *_: memory)
        monkeypatch.setattr(model_runner, "forward_pass", lambda _: Device(6e-3, 0.0))
        made = worker.PieWorkerMixin()
        made.pie_device_is_host, made.pie_granularity = False, 2 << 20
        made.pie_driver = "host"
        config = settings.take({"pie": {"pool_gib": 4.0, "link_gbps": 55.0}}).config
        monkeypatch.setattr(settings, "of", lambda _: SimpleNamespace(config=config))
        monkeypatch.setattr(worker, "whole_of", lambda _: None)
        spec = SimpleNamespace(block_size=16, page_size_bytes=row // 32)
        monkeypatch.setattr(worker.grouping, "groups_by_vllm", lambda *_: [])
        monkeypatch.setattr(worker, "groups_of", lambda _, specs, *__: one_group(specs))
        made.get_kv_cache_spec = lambda: dict.fromkeys(range(32), spec)  # type: ignore[attr-defined]
        made.model_runner = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[attr-defined]
        made.vllm_config = SimpleNamespace(  # type: ignore[attr-defined]
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            model_config=SimpleNamespace(max_model_len=longest * 16),
            scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=8192),
            speculative_config=None,
            num_speculative_tokens=0,
        )
        geometry: Any = made._pie_size(device_blocks * row)
        return int(geometry.pooled_blocks)

    return found


def test_the_window_follows_a_step_with_attention(window: Callable[..., int]) -> None:
    """``ceil(link * (step + kv / memory) / row)``, with the KV that the requests can hold."""
    row, link = 2 << 20, 55e9
    without = -(-link * 6e-3 // row)
    assert window(60, 1e18) == without
    full = -(-link * (6e-3 + 4000 * row / 1e12) // row)
    assert window(1000, 1e12) == full > 2 * without
    half = -(-link * (6e-3 + 64 * 30 * row / 1e12) // row)
    assert window(30, 1e12) == half < full
