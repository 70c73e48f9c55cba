"""Steps that a load takes over two tiers, against stock vLLM with as many blocks on the device.

Counted without a model, over vLLM's real scheduler: each request samples a token when its prompt is
computed. What differs is only whom the scheduler admits, and how much of a prompt a step computes.
"""

from __future__ import annotations

import random
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.policy import controller
from pie_vllm.policy.admission.chunk import Chunk
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.scheduling import make_request

pytestmark = pytest.mark.vllm

BLOCKS = 101
SPLITS = ((12, 89), (21, 80), (30, 71), (40, 61), (60, 41), (80, 21))
LOADS = {
    "mixed": (120, (20, 400), (20, 200)),
    "short prompts, long answers": (120, (16, 200), (16, 300)),
    "long prompts": (60, (100, 900), (20, 100)),
}
"""Requests, tokens of their prompts, tokens of their answers."""

OPTIONS = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_num_scheduled_tokens": 1024,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,
}


class Took(NamedTuple):
    """What a load took.

    Attributes:
        steps: of the scheduler.
        used: share of the blocks in use, median over the steps.
        preemptions: in all.
    """

    steps: int
    used: float
    preemptions: int


def play(scheduler: Any, load: str, tokens_seed: int = 0) -> Took:
    """All requests of a load, which come at once, to their ends."""
    count, prompt, answer = LOADS[load]
    rng = random.Random(tokens_seed)
    for number in range(count):
        tokens = [rng.randrange(997) for _ in range(rng.randint(*prompt))]
        scheduler.add_request(make_request(f"{number}", tokens, rng.randint(*answer), BLOCK_SIZE))
    requests, used = list(scheduler.requests.values()), []
    while scheduler.get_num_unfinished_requests():
        output = scheduler.schedule()
        assert output.total_num_scheduled_tokens, "nothing runs"
        used.append(scheduler.kv_cache_manager.usage)
        names = list(output.num_scheduled_tokens)
        known = (scheduler.requests[name] for name in names)
        sampled = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in known]
        index = {name: i for i, name in enumerate(names)}
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled),
        )
    return Took(len(used), median(used), sum(r.num_preemptions for r in requests))


@cache
def stock(load: str, blocks: int = BLOCKS) -> Took:
    """Stock vLLM with all blocks on the device."""
    scheduler = scheduling.make(
        scheduling.geometry(blocks, 0, 1), BLOCK_SIZE, flavour=Scheduler, **OPTIONS
    )
    return play(scheduler, load)


def pie(load: str, resident: int, pooled: int, **options: Any) -> Took:
    """Pie, over a link that feeds all."""
    # One chunk: what the steps of a growing pool wait for is not what is counted here.
    sizes = scheduling.geometry(resident, pooled, chunk_rows=pooled)
    scheduler = scheduling.make(sizes, BLOCK_SIZE, **{**OPTIONS, **options})
    scheduler.pie_controller.decider = Fixed(pooled)
    return play(scheduler, load)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("resident", "pooled"), SPLITS)
def test_two_tiers_serve_as_many_as_one(load: str, resident: int, pooled: int) -> None:
    """At most a twentieth more steps than stock with the same blocks, from 21 residents on.

    With 12 residents, of which a prompt's chunk takes eleven at most, a tenth more.
    """
    took, wanted = pie(load, resident, pooled), stock(load)
    assert took.steps <= (1.05 if resident > 12 else 1.1) * wanted.steps, (took, wanted)
    assert took.used > 0.95 * wanted.used, (took, wanted)


def test_a_chunk_of_half_of_the_residents_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a constant chunk, kept free for the next one too, keeps requests out."""
    monkeypatch.setattr(controller, "decide_chunk", lambda *_: Chunk(9 * BLOCK_SIZE, 9))
    monkeypatch.setattr(
        "pie_vllm.policy.admission.admission_room.promised",
        lambda _, tails, prompts: tails + (prompts and 9 + 1),
    )
    assert pie("mixed", 21, 80).steps > 1.5 * stock("mixed").steps
