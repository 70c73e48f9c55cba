"""States with prefix caching: in which blocks vLLM has them, and how many it takes.

The random tests of ``test_groups.py`` check what is in these blocks.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from pie_vllm.geometry import cdiv
from pie_vllm.vllm.scheduler_side.groups_beside import needed_by, new_residents
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, geometry, make, make_request

pytestmark = pytest.mark.vllm

STATES = 0
PROMPT = 75


def manager_of(checkpoints: bool, retention: int | None) -> Any:
    """A manager of a group of states and one of full attention, and blocks for all."""
    return make(
        geometry(60, 20),
        BLOCK_SIZE,
        beside=(STATES,),
        checkpoints=checkpoints,
        max_model_len=320,
        enable_prefix_caching=True,
        prefix_cache_retention_interval=retention,
    ).kv_cache_manager


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("retention", [0, None])
@pytest.mark.parametrize("new", [1, 5, 16, 40])
def test_a_state_from_elsewhere_takes_as_many_blocks_as_are_counted(
    checkpoints: bool, retention: int | None, new: int
) -> None:
    """After any number of tokens: the block of its last token, and those that the step leaves."""
    manager = manager_of(checkpoints, retention)
    coordinator, states = manager.coordinator, manager.coordinator.single_type_managers[0]
    stock_short = 0
    for computed in range(1, PROMPT):
        end = min(computed + new, PROMPT)
        request = make_request(f"r{computed}", [computed] * PROMPT, 5, BLOCK_SIZE)
        asks = coordinator, (0,), request, ((), ())
        (counted,) = new_residents(*asks, computed, end)
        stock_short += counted - states.get_num_blocks_to_allocate(
            request.request_id, end, (), computed, computed, end, prefill_end=PROMPT
        )
        (counted,) = new_residents(*asks, computed, end)  # It notes checkpoints, as vLLM does.
        coordinator.allocate_new_computed_blocks(request.request_id, ((), ()), 0, computed)
        table = states.req_to_blocks[request.request_id]
        (place,) = needed_by(states)(computed)
        assert place == (computed - 1) // BLOCK_SIZE == len(table) - 1
        assert [block.is_null for block in table] == [True] * place + [False]
        states.allocate_new_blocks(request.request_id, end, end)
        assert counted == sum(not block.is_null for block in table)
        assert not table[cdiv(end, BLOCK_SIZE) - 1].is_null
        assert len(table) == cdiv(end, BLOCK_SIZE)
        coordinator.free(request.request_id)
    assert stock_short > 0, "vLLM counts them all: new_residents need not"


def crowd(**options: Any) -> Driver:
    """Chats with states that outgrow their blocks, so that some are preempted."""
    rng = random.Random(7)
    made = make_driver(
        geometry(24, 16, 160),
        beside=(STATES,),
        max_model_len=320,
        max_num_batched_tokens=64,
        max_num_scheduled_tokens=64,
        max_num_seqs=8,
        **options,
    )
    for number in range(8):
        prompt = [rng.randrange(997) for _ in range(rng.randint(10, 40))]
        made.add(make_request(f"r{number}", prompt, 90, BLOCK_SIZE))
    return made


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests_compute_nothing_again(asynchronous: bool, caching: bool) -> None:
    """With prefix caching and without, wherever in a block they were."""
    made = crowd(async_scheduling=asynchronous, enable_prefix_caching=caching)
    manager, at = made.scheduler.kv_cache_manager, set()
    releases = manager.admission.releases

    def noted(request_id: str, computed: int, *, finished: bool, **more: Any) -> None:
        if not finished:
            at.add(computed % BLOCK_SIZE)
        releases(request_id, computed, finished=finished, **more)

    manager.admission.releases = noted
    made.run()
    made.verify()
    assert len(made.preemptions) >= 3
    assert len(at) >= 2
    assert manager.residency.parking.restored_blocks > len(made.preemptions)
    assert manager.hit_counts.recomputed_tokens == 0
