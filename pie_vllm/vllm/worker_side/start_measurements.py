"""What a rank measures before it sizes its tiers: its link, and how long a step takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.logger import init_logger

from pie_vllm.config import PieConfig
from pie_vllm.engine.link_calibration import UNMEASURED_CTAS, measure_link
from pie_vllm.errors import TransferError
from pie_vllm.plan import Prior
from pie_vllm.vllm.compat import model_runner

logger = init_logger("vllm.pie")

PROMPT_TOKENS = 256
"""Number of prompt tokens in the step whose time is taken at start."""


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


def with_step_times(prior: Prior, runner: Any, requests: int, tokens_max: int) -> Prior:
    """Add the seconds of a step without attention, of each of its requests and prompt tokens.

    Args:
        prior: what is known so far.
        runner: vLLM's model runner, without a KV cache yet.
        requests: number of requests that decode in the step.
        tokens_max: largest number of tokens in one step.
    """
    one = model_runner.forward_seconds(runner, 1)
    step = model_runner.forward_seconds(runner, requests)
    by_request = max(step - one, 0.0) / max(requests - 1, 1)
    tokens = min(tokens_max, requests + PROMPT_TOKENS)
    by_token = by_request
    if tokens > requests:
        longer = model_runner.forward_seconds(runner, tokens) - step
        by_token = max(longer, 0.0) / (tokens - requests)
    logger.info(
        "Pie: %d requests decode in %.1f ms without attention, one in %.1f ms; a prompt token "
        "takes %.2f ms",
        requests,
        1e3 * step,
        1e3 * one,
        1e3 * by_token,
    )
    return prior._replace(step_seconds=step, request_seconds=by_request, prompt_seconds=by_token)
