"""What vLLM does not split: served whole, or refused with the size that works."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from pie_vllm.errors import ConfigError
from pie_vllm.vllm.scheduler_side import scheduler as pie_scheduler
from pie_vllm.vllm.whole import Whole, whole_of
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.sizes import plan

pytestmark = pytest.mark.vllm

LONGEST = 32 * BLOCK_SIZE


def driver_of(resident: int, pooled: int, **options: Any) -> Driver:
    return make_driver(
        scheduling.geometry(resident, pooled),
        decider=Fixed(pooled),
        **{
            "max_model_len": LONGEST,
            "max_num_batched_tokens": LONGEST,
            "max_num_scheduled_tokens": LONGEST,
            "max_num_seqs": 16,
            **options,
        },
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(997) for _ in range(length)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("resident", [33, 40])
def test_a_prompt_that_is_not_chunked_is_served(resident: int, asynchronous: bool) -> None:
    """Longer than half of the residents, beside others, and those behind it, too."""
    driver = driver_of(resident, 40, enable_chunked_prefill=False, async_scheduling=asynchronous)
    for name, length in (("a", 40), ("b", 200), ("long", LONGEST - 20), ("c", 20), ("d", 300)):
        driver.add(make_request(name, prompt_of(length, length), 12, BLOCK_SIZE))
    while driver.scheduler.has_requests() or driver.queue:
        driver.step()
        assert driver.idle <= 20, "no progress: the scheduler runs nothing"
        for request_id, tokens in driver.output.num_scheduled_tokens.items():
            if request_id in {new.req_id for new in driver.output.scheduled_new_reqs}:
                assert tokens == len(driver.prompts[request_id]), "a prompt was split"
    driver.verify()
    assert all(len(answer) == 12 for answer in driver.answers.values())
    assert not driver.preemptions


def with_images(driver: Driver) -> None:
    """Let a scheduler of a text model take requests with images."""
    scheduler = driver.scheduler
    scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=4096)
    scheduler.max_num_encoder_input_tokens = 4096


@pytest.mark.parametrize("seed", range(4))
def test_an_image_that_may_not_be_split_is_computed_at_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands in the prompt, with others running beside it.

    One prompt at a time: vLLM itself goes on with a part of an image where the prompt of another
    takes the tokens that the whole needs.
    """
    most = 13 * BLOCK_SIZE
    image = 12 * BLOCK_SIZE
    monkeypatch.setattr(pie_scheduler, "whole_of", lambda _: Whole(most, 1, "", ""))
    driver = driver_of(
        15,
        90,
        disable_chunked_mm_input=True,
        max_num_batched_tokens=most,
        max_num_scheduled_tokens=most,
    )
    with_images(driver)
    rng = random.Random(seed)
    spans = {}
    coming = []
    for name in ("a", "b", "c", "d", "e"):
        first = rng.randint(0, LONGEST - image - 90)
        spans[name] = first, first + image
        feature = MultiModalFeatureSpec(
            data=None,
            modality="image",
            identifier=name,
            mm_position=PlaceholderRange(offset=first, length=image),
        )
        length = first + image + rng.randint(1, 20)
        coming.append(
            make_request(name, prompt_of(length, length), 60, BLOCK_SIZE, mm_features=[feature])
        )
    split = beside = 0
    while coming or driver.scheduler.has_requests() or driver.queue:
        running = driver.scheduler.running
        if coming and not driver.scheduler.waiting and not any(r.is_prefill_chunk for r in running):
            beside += bool(running)
            driver.add(coming.pop(0))
        driver.step()
        assert driver.idle <= 20, "no progress: the scheduler runs nothing"
        for name, count in driver.output.num_scheduled_tokens.items():
            request = driver.scheduler.requests.get(name)
            if request is not None:
                end = request.num_computed_tokens
                begin, (first, last) = end - count, spans[name]
                split += begin < last and end > first and not (begin <= first and last <= end)
    driver.verify()
    assert beside == 4
    assert not split


def config(**changes: Any) -> Any:
    scheduler = {
        "enable_chunked_prefill": True,
        "disable_chunked_mm_input": False,
        "max_num_batched_tokens": 2048,
    }
    model = {
        "max_model_len": 1024,
        "use_mla": False,
        "supports_multimodal_inputs": True,
        "is_mm_prefix_lm": False,
    }
    for name, value in changes.items():
        (scheduler if name in scheduler else model)[name] = value
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**scheduler), model_config=SimpleNamespace(**model)
    )


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        (
            {"enable_chunked_prefill": False},
            1024,
            ["--no-enable-chunked-prefill", "--max-model-len"],
        ),
        (
            {"enable_chunked_prefill": False, "use_mla": True},
            1024,
            ["vLLM sets for MLA models on CPUs without AMX", "--max-model-len to 304"],
        ),
        ({"disable_chunked_mm_input": True}, 1024, ["--disable-chunked-mm-input"]),
        (
            {"is_mm_prefix_lm": True, "max_num_batched_tokens": 700},
            700,
            ["image", "--max-num-batched-tokens to 288"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_size_that_does(
    changes: dict[str, Any], tokens: int, words: list[str]
) -> None:
    whole = whole_of(config(**changes))
    assert whole is not None
    assert whole.tokens == tokens
    needed = whole.blocks(16)
    whole.check(needed + 1, 16)
    with pytest.raises(ConfigError, match="device memory") as caught:
        whole.check(20, 16)
    for word in (*words, f"{needed} KV blocks", "19 are all"):
        assert word in str(caught.value)


def test_what_is_split_needs_no_room() -> None:
    assert whole_of(config()) is None
    assert whole_of(config(supports_multimodal_inputs=False, disable_chunked_mm_input=True)) is None


def test_the_window_shrinks_for_what_must_be_resident() -> None:
    """As far as it takes, and not at all where that would not do."""
    sizes = {"needed_blocks": 34, "ring_fraction": 0.2}
    wide = plan(**sizes)
    assert wide.resident_blocks < 35
    whole = plan(**sizes, whole_blocks=34)
    assert whole.resident_blocks == 35
    assert 1 < whole.pooled_blocks < wide.pooled_blocks
    more = plan(**sizes, whole_blocks=60)
    assert more.resident_blocks <= 40
