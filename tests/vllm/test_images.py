"""Images in prompts: KV is shared by text and image alike, and answers are stock vLLM's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_inputs import image
from tests.helpers.engine_load import check_diverse, facts, tokens, user
from tests.helpers.engine_model import LAYERS
from tests.helpers.few_layer_models import IMAGE_TOKENS, with_images
from tests.helpers.two_turns import check_kept, encoded, two_turns
from tests.vllm.test_exact import check

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWER, IMAGES, BEFORE = 24, 4, 40
PROCESSOR = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
Record = dict[str, Any]
Turns = tuple[list[Record], list[Record]]


@pytest.fixture(scope="module")
def seeing(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees."""
    return with_images(few, tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def ample(seeing: Path) -> Setup:
    """What stock runs with."""
    return Setup(seeing, len(LAYERS), 500, 0, dtype="float32", other=PROCESSOR)


def asked(model: Path, count: int, answer: int = ANSWER, **params: Any) -> list[Record]:
    """So many questions, each about every image; all begin alike, before the image."""
    before = encoded(model, [facts(77, 12)])[0][:BEFORE]
    texts = [user(f"Question {i}. {facts(i, 2 + i // 2)}") for i in range(count)]
    return [
        request([*before, *question], beside=image(seed, BEFORE), max_tokens=answer, **params)
        for question in encoded(model, texts)
        for seed in range(IMAGES)
    ]


def check_images_matter(answers: list[Any]) -> None:
    """Assert that answers differ by image: else mixed KV would not show."""
    for i in range(0, len(answers), IMAGES):
        assert len({str(answer) for answer in answers[i : i + IMAGES]}) == IMAGES


def test_tokens_and_logprobs_are_stocks(engines: Engines, seeing: Path) -> None:
    """On the same schedule, bit for bit, with nothing kept of images between requests."""
    other = {**PROCESSOR, "mm_processor_cache_gb": 0}
    setup = Setup(seeing, len(LAYERS), 46, 220, other=other)
    check(engines, setup, [round_(asked(seeing, 8, answer=52, logprobs=5))])


@pytest.fixture(scope="module")
def parked(ample: Setup) -> Setup:
    """Too few blocks, hardly any pooled ids, and rows for all."""
    other = {**PROCESSOR, "enable_prefix_caching": True, "max_num_batched_tokens": 256}
    return replace(ample, resident=40, pooled=6, rows=400, other=other)


@pytest.fixture(scope="module")
def turns(engines: Engines, ample: Setup) -> Turns:
    """Both turns of all chats, and stock's answers; the image of the second is made anew."""
    rounds, records = two_turns(engines, ample, asked(ample.model, 8))
    for record in records:
        check_diverse(record)
        check_images_matter(tokens(record))
    return rounds, records


def test_parked_kv_is_found_behind_its_own_image_only(
    engines: Engines, parked: Setup, turns: Turns
) -> None:
    """In the first turn text and image are found at most, in the second all of one's own."""
    rounds, stock = turns
    first, second = engines.run(parked, rounds)
    check_kept(parked, [first, second], stock)
    shared = (BEFORE + IMAGE_TOKENS) // parked.block_size * parked.block_size
    found = {answer["cached_tokens"] for answer in first["answers"]}
    assert max(found) == shared, "the same image behind the same text, with another question"
    assert second["hits"]["parked"] > 60


def test_keys_without_images_show(engines: Engines, parked: Setup, turns: Turns) -> None:
    """Negative control: parked KV of another image is found, and answers differ."""
    rounds, stock = turns
    first, second = engines.run(replace(parked, blind_keys=True), rounds)
    assert second["hits"]["parked"] > 0
    for pie, right in zip((first, second), stock, strict=True):
        assert tokens(pie) != tokens(right)
