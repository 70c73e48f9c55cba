"""Steps that a load takes over two tiers in real engines; test_capacity.py counts without a model.

Here, what the engine reads of the link and of its steps decides, too.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import check_traffic
from tests.helpers.engine_model import LAYERS
from tests.vllm.test_capacity import LOADS, SPLITS

pytestmark = [pytest.mark.vllm, pytest.mark.soak]

WORDS = 40_000
OTHER = {"max_num_batched_tokens": 1024}


def rounds(load: str) -> list[dict[str, Any]]:
    """All requests of a load at once."""
    count, prompt, answer = LOADS[load]
    chance = random.Random(0)
    prompts = [
        [chance.randrange(3, WORDS) for _ in range(chance.randint(*prompt))] for _ in range(count)
    ]
    return [round_([request(one, max_tokens=chance.randint(*answer)) for one in prompts])]


@pytest.mark.parametrize(("resident", "pooled"), SPLITS)
def test_two_tiers_serve_as_many_as_one(
    engines: Engines, few: Path, resident: int, pooled: int
) -> None:
    """At most a twentieth more steps than stock with the same blocks, from 21 residents on.

    With 12 residents a step computes eleven blocks of prompt at most, and counts more.
    """
    setup = Setup(few, len(LAYERS), resident, pooled, other=OTHER)
    (pie,), (stock,) = engines.both(setup, rounds("mixed"))
    assert pie["steps"] <= (1.05 if resident > 12 else 1.2) * stock["steps"]
    check_traffic(pie, setup.page * setup.layers)
