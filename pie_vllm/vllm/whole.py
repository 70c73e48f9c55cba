"""Inputs that vLLM computes as a whole, in one step, so that their blocks are resident together."""

from __future__ import annotations

from typing import Any, NamedTuple

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import cdiv


class Whole(NamedTuple):
    """An input that one step computes as a whole.

    Attributes:
        tokens: largest number of its tokens.
        spare: number of resident blocks needed beside its own: one for a prompt's block that is
            begun.
        what: subject and verb of the error: what computes how many tokens.
        way_out: command that makes it smaller, with a place for a number of tokens.
    """

    tokens: int
    spare: int
    what: str
    way_out: str

    def blocks(self, block_size: int) -> int:
        """Number of resident blocks that the step needs, without the null block."""
        return cdiv(self.tokens, block_size) + self.spare

    def check(self, resident_blocks: int, block_size: int) -> None:
        """Refuse a device that does not hold the blocks.

        Raises:
            ConfigError: says how many tokens it holds.
        """
        needed, usable = self.blocks(block_size), resident_blocks - 1
        if needed > usable:
            way_out = self.way_out.format((usable - self.spare) * block_size)
            raise ConfigError(
                f"{self.what} in one step, whose {needed} KV blocks must be in device memory "
                f"together, and {usable} are all that fit there. Raise --kv-cache-memory-bytes or "
                f"--gpu-memory-utilization, {way_out}."
            )


def whole_of(config: Any) -> Whole | None:
    """The largest input that a finished VllmConfig does not split; None if it splits all.

    Two places of ``Scheduler.schedule`` do not split. A waiting request's prompt without chunked
    prefill (v1/core/sched/scheduler.py:1161 in 0.32, :1338 in 0.33) breaks the loop where the step
    has fewer tokens left. ``_try_schedule_encoder_inputs`` (:1870, :2099) goes back to the token
    before an image, because the model cannot attend to a part of one. The other places
    (encoder-decoder and pooling models, alignment to state blocks, drafters of several modules) are
    refused by name.
    """
    scheduler, model = config.scheduler_config, config.model_config
    if not scheduler.enable_chunked_prefill:
        # platforms/cpu.py:516 in 0.32, whatever was asked for.
        by_itself = " (which vLLM sets for MLA models on CPUs without AMX)" if model.use_mla else ""
        return Whole(
            model.max_model_len,
            0,
            f"--no-enable-chunked-prefill{by_itself} computes a prompt of --max-model-len "
            f"{model.max_model_len} tokens",
            "lower --max-model-len to {}, or remove --no-enable-chunked-prefill",
        )
    if model.supports_multimodal_inputs and (
        scheduler.disable_chunked_mm_input or model.is_mm_prefix_lm
    ):
        tokens_max = min(scheduler.max_num_batched_tokens, model.max_model_len)
        what = (
            "--disable-chunked-mm-input computes"
            if not model.is_mm_prefix_lm
            else "a model that attends to images as a whole computes"
        )
        return Whole(
            tokens_max,
            1,
            f"{what} an image of up to --max-num-batched-tokens, here {tokens_max} tokens,",
            "lower --max-num-batched-tokens to {}, if that is at least the largest image",
        )
    return None
