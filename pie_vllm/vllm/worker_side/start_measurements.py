"""What a rank measures before it sizes its tiers: its link, and how long a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from vllm.logger import init_logger

from pie_vllm.config import PieConfig
from pie_vllm.engine.link_calibration import UNMEASURED_CTAS, measure_link
from pie_vllm.errors import TransferError
from pie_vllm.plan import Prior
from pie_vllm.vllm.compat import model_runner

logger = init_logger("vllm.pie")

PROMPT_TOKENS = 256
"""Number of prompt tokens in the step whose time is taken at start."""

PASSES = 3
"""Number of passes of which the shortest counts; one less of a single token."""

PASSES_SECONDS = 2.0
"""Seconds of all forward passes at start, about; fast devices need a tenth of it."""

COPIED_BYTES = 128 << 20
"""Maximum bytes of the copy within the device's memory that is timed: more than a GPU's cache
holds."""


class Measured(NamedTuple):
    """What was found out on one rank.

    Attributes:
        prior: what the scheduler starts from.
        gather_below: bytes of a piece below which loads were faster by the gather kernel.
        gather_blocks: number of CTAs of that kernel.
    """

    prior: Prior
    gather_below: int = 0
    gather_blocks: int = UNMEASURED_CTAS


def with_link(
    prior: Prior,
    config: PieConfig,
    *,
    num_layers: int,
    page_bytes: int,
    granularity: int,
    driver: str,
) -> Measured:
    """Add the link's bandwidth: as the user gave it, as measured, or unknown.

    Args:
        prior: what is known so far.
        config: the checked settings.
        num_layers: number of layers with KV.
        page_bytes: bytes of a block in one layer.
        granularity: bytes that the driver maps in one piece.
        driver: name of the engine's driver.
    """
    if config.link_gbps is not None:
        given = config.link_gbps * 1e9
        logger.info("Pie: link to the device counted on for %.2f GB/s", config.link_gbps)
        return Measured(prior._replace(bandwidth=given, most_bandwidth=given))
    try:
        link = measure_link(
            num_layers,
            page_bytes,
            granularity=granularity,
            driver=driver,
            link_bytes_per_s=config.emulated_link,
        )
    except TransferError as error:
        logger.warning("Pie: the link could not be measured at start: %s", error)
        return Measured(prior)
    logger.info("Pie: link %s", link)
    return Measured(prior._replace(bandwidth=link.load), link.gather_below, link.gather_blocks)


class StepTimes:
    """Times passes over more and more tokens, and guesses those that would take too long.

    A pass over ``n`` times the tokens takes at most ``n`` times as long, so it is known before
    whether passes fit what is left of the time. A fast device is timed at the sizes asked for;
    a slow one at smaller ones, whose last two are continued in a straight line.
    """

    def __init__(self, one_pass: Callable[[int], float], sizes: int, seconds_max: float) -> None:
        """Run nothing yet.

        Args:
            one_pass: runs a pass over so many tokens and returns its seconds.
            sizes: number of sizes that will be asked for, of 1 token first and then of more.
            seconds_max: seconds of all passes together, about.
        """
        self._one_pass = one_pass
        self._sizes_left = sizes
        self._left = seconds_max
        self._known: list[tuple[int, float]] = []

    def seconds(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens, at least as many as asked for before."""
        share = self._left / max(self._sizes_left, 1)
        self._sizes_left -= 1
        until = self._left - share
        if not self._known:
            self._time(1, until)
        size, seconds = self._known[-1]
        while size < tokens:
            fitting = int(size * (self._left - until) / (PASSES * seconds))
            if fitting <= size:
                break
            size, seconds = self._time(min(tokens, fitting), until)
        if size >= tokens or len(self._known) == 1:
            return seconds
        before, less = self._known[-2]
        return seconds + max(seconds - less, 0.0) / (size - before) * (tokens - size)

    def _time(self, tokens: int, until: float) -> tuple[int, float]:
        """Note the shortest of some passes, the first of which warms up."""
        shortest = math.inf
        for _ in range(PASSES if self._known else PASSES - 1):
            taken = self._one_pass(tokens)
            self._left -= taken
            shortest = min(shortest, max(taken, 1e-9))
            if self._left - shortest < until:
                break
        self._known.append((tokens, shortest))
        return self._known[-1]


def with_step_times(
    prior: Prior, runner: Any, requests: int, tokens_max: int, each: int = 1
) -> Prior:
    """Add the seconds of a step without attention, of each of its requests and prompt tokens.

    Args:
        prior: what is known so far.
        runner: vLLM's model runner, without a KV cache yet.
        requests: number of requests that decode in the step.
        tokens_max: largest number of tokens in one step.
        each: number of tokens of each of them, drafts included.
    """
    decodes = min(requests * each, max(tokens_max, requests))
    times = StepTimes(model_runner.forward_pass(runner), 3, PASSES_SECONDS)
    one = times.seconds(1)
    step = times.seconds(decodes)
    by_request = max(step - one, 0.0) / max(decodes - 1, 1)
    tokens = min(tokens_max, decodes + PROMPT_TOKENS)
    by_token = by_request
    if tokens > decodes:
        by_token = max(times.seconds(tokens) - step, 0.0) / (tokens - decodes)
    logger.info(
        "Pie: %d requests of %d tokens decode in %.1f ms without attention, one token in %.1f ms; "
        "a prompt token takes %.2f ms",
        requests,
        each,
        1e3 * step,
        1e3 * one,
        1e3 * by_token,
    )
    return prior._replace(step_seconds=step, request_seconds=by_request, prompt_seconds=by_token)


def with_attention(prior: Prior, device: torch.device, kv_bytes: int) -> Prior:
    """Add the seconds of attention over a device full of KV: ``kv_bytes / memory_bandwidth``.

    In decoding, attention reads each byte of KV once and computes a few operations with it: as many
    as query heads share a KV head, where a GPU computes a hundred in that time. Its time is that of
    memory (the roofline model: S. Williams et al., 2009; for decoding: Flash-Decoding, T. Dao et
    al., 2023). A CPU computes longer than that, so there this is a lower bound. A pass of vLLM's
    with attention would tell less: at this time there are no block tables, so it would read one
    block from a cache again and again.

    Args:
        prior: what is known so far.
        device: the device whose memory holds KV.
        kv_bytes: bytes of KV that the requests of a step read.
    """
    # KV has no memory yet, so a copy of a quarter of it fits twice.
    bandwidth = memory_bandwidth(device, max(1, min(COPIED_BYTES, kv_bytes // 4)))
    seconds = kv_bytes / bandwidth
    logger.info(
        "Pie: the device's memory reads and writes %.0f GB/s, so attention over %.2f GiB of KV "
        "takes %.1f ms at least",
        bandwidth / 1e9,
        kv_bytes / 2**30,
        1e3 * seconds,
    )
    return prior._replace(attention_seconds=seconds)


def memory_bandwidth(device: torch.device, copied: int) -> float:
    """Bytes that a device's memory reads and writes in a second, by a copy of so many within it."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    on_accelerator = device.type != "cpu"
    shortest = math.inf
    for _ in range(PASSES):
        start = perf_counter()
        target.copy_(source)
        if on_accelerator:
            torch.accelerator.synchronize(device)
        shortest = min(shortest, perf_counter() - start)
    del source, target
    if on_accelerator:
        torch.accelerator.empty_cache()  # KV is allocated beside torch's allocator.
    return 2 * copied / shortest
