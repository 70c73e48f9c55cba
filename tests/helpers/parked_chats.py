"""vLLM's real schedulers with few residents, hardly any pooled ids, and rows for much more."""

from __future__ import annotations

import random
from typing import Any

from pie_vllm.policy.pool.parked_kv import Parking
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import Memory

RESIDENT, POOLED, ROWS = 20, 4, 200
WINDOW = Fixed(POOLED, POOLED)


def driver(
    memory: Memory | None = None,
    rows: int = ROWS,
    decider: Fixed = WINDOW,
    chunk_rows: int | None = None,
    **options: Any,
) -> Driver:
    """A few residents, hardly any pooled ids, and rows for much more, all there from the start.

    With ``chunk_rows`` the rows beyond so many come and go.
    """
    sizes = scheduling.geometry(RESIDENT, POOLED, rows, chunk_rows=chunk_rows or rows)
    options = {"max_model_len": 320, "max_num_batched_tokens": 64, **options}
    return make_driver(sizes, memory, decider, **options)


def prompt(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(count)]


def crowd(made: Driver, count: int = 12) -> None:
    """More requests than there are blocks for, all at once."""
    for i in range(count):
        made.add(make_request(f"r{i}", prompt(i, 30 + 7 * (i % 4)), 60, BLOCK_SIZE))


def run_crowd(made: Driver) -> None:
    """Run it to its end; no answer may have read foreign KV."""
    crowd(made)
    made.run()
    made.verify()


def computed_again(made: Driver) -> int:
    return int(made.scheduler.kv_cache_manager.hit_counts.recomputed_tokens)


def parking(made: Driver) -> Parking:
    found: Parking = made.scheduler.kv_cache_manager.residency.parking
    return found


def cached_tokens(made: Driver, request_id: str) -> int:
    """Tokens that a request found computed when it was admitted in the last step."""
    new = {r.req_id: r.num_computed_tokens for r in made.output.scheduled_new_reqs}
    return int(new[request_id])


def chat_then_others(made: Driver, **other: Any) -> list[int]:
    """A chat of ten blocks, idle, whose residents others have used since; returns its tokens."""
    made.add(make_request("chat", prompt(100, 150), 12, BLOCK_SIZE, **other))
    made.run()
    crowd(made)
    made.run()
    return [*made.prompts["chat"], *made.answers["chat"]]
