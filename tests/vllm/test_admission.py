"""Who is admitted, on terms that vLLM has besides the blocks: watermark, adapters, caps of hits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import StreamingUpdate

from pie_vllm.errors import UnsupportedError
from pie_vllm.policy.pool.tails import Tail, TailBlock
from tests.helpers import parked_chats, scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, make_request

pytestmark = pytest.mark.vllm

RESIDENT, POOLED = 16, 34


def driver(decider: Fixed | None = None, **options: Any) -> Driver:
    """Device bytes of 18 blocks: 16 residents, and a ring of two slots over 34 pooled ids."""
    sizes = scheduling.geometry(RESIDENT, POOLED, num_layers=30)
    options = {"max_model_len": 240, "max_num_batched_tokens": 80, **options}
    return make_driver(sizes, decider=decider, **options)


def test_the_watermark_is_a_share_of_both_tiers() -> None:
    """0.3 of 50 blocks stays free when a request is admitted, and the other 34 are used."""
    made = driver(Fixed(POOLED), watermark=0.3)
    for number in range(12):
        made.add(make_request(f"r{number}", [number] * 64, 40, BLOCK_SIZE))
    scheduler, residency = made.scheduler, made.scheduler.kv_cache_manager.residency
    used, most = 0, 0
    while scheduler.has_requests():
        before = len(scheduler.running)
        made.step()
        in_use = residency.residents_in_use + residency.pooled_in_use
        if len(scheduler.running) > before > 0:
            used = max(used, in_use)
        most = max(most, len(scheduler.running))
    made.verify()
    assert used <= 49 - 15
    assert most >= 6, "of 5 or 6 blocks each by then"
    assert not made.preemptions


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("limit", [0, 2, 17, 34])
@pytest.mark.parametrize("withheld", [0, 20, 34])
def test_the_watermark_leaves_what_the_device_alone_would_have(
    share: float, limit: int, withheld: int
) -> None:
    """With a limit, or without CPU memory, no less is used than without pie; else the share."""
    manager = driver(watermark=share).scheduler.kv_cache_manager
    manager.admission.begin_step(Fixed(limit).decide(), 0)
    manager.residency.queue.withheld = manager.residency.queue.missing = withheld
    usable = RESIDENT + min(limit, POOLED - withheld)
    left = manager.admission.room.headroom()
    device = manager.geometry.device_bytes // manager.geometry.row_bytes
    assert device == 18
    assert usable - left >= min(usable, device - int(share * device))
    assert left <= int(share * usable)
    if usable >= device:
        assert left == int(share * usable)


def test_a_limit_and_missing_memory_are_not_counted_twice() -> None:
    """Ids without CPU memory are among those beyond the limit: 15 + 20 blocks hold 30."""
    made = driver(Fixed(20), max_model_len=560)
    manager = made.scheduler.kv_cache_manager
    manager.admission.begin_step(Fixed(20).decide(), 0)
    queue = manager.residency.queue
    for withheld, admitted in ((14, True), (20, False)):
        queue.withheld = queue.missing = withheld
        queue.refresh()
        request = make_request("r", [2] * (30 * BLOCK_SIZE), 5, BLOCK_SIZE)
        blocks, tokens, _ = manager.get_computed_blocks(request)
        got = manager.allocate_slots(
            request, 80, tokens, blocks, full_sequence_must_fit=True, has_scheduled_reqs=True
        )
        assert (got is not None) == admitted
        manager.free(request)


def test_adapters_of_requests_left_out_still_count() -> None:
    """With ``--max-loras 1`` no other adapter gets in while one waits for its turn."""
    made = driver(Fixed(POOLED, 6), max_num_seqs=16, enable_prefix_caching=False)
    scheduler = made.scheduler
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    one, two = (LoRARequest(f"a{n}", n, f"/a{n}") for n in (1, 2))
    for k in range(4):
        prompt = [100 + 7 * i + k for i in range(75)]
        lora = one if k % 2 else None
        made.add(make_request(f"long{k}", prompt, 50, BLOCK_SIZE, lora_request=lora))
    waited = 0
    while scheduler.has_requests():
        if 12 < made.steps < 120 and made.steps % 3 == 0:
            name = f"short{made.steps}"
            made.add(make_request(name, [made.steps] * 8, 12, BLOCK_SIZE, lora_request=two))
            made.add(make_request(f"{name}b", [made.steps] * 5, 3, BLOCK_SIZE))
        made.step()
        assert len({r.lora_request.lora_int_id for r in scheduler.running if r.lora_request}) <= 1
        waited += any(r.lora_request is two for r in scheduler.waiting)
    made.verify()
    assert scheduler.pie_controller.turns.left_out > 0
    assert waited > 0


def test_a_turn_shortens_no_other_wait() -> None:
    """A request that is left out by its turn is due no earlier than it was before."""
    made = driver(Fixed(POOLED, 0))
    scheduler = made.scheduler
    for number in range(2):
        made.add(make_request(f"r{number}", [number] * 150, 40, BLOCK_SIZE))
    made.run_until(lambda: scheduler.kv_cache_manager.residency.pooled_in_use > 0)
    due = scheduler.current_step + 5
    for request in scheduler.running:
        request.next_decode_eligible_step = due
    left_out = scheduler.pie_controller.turns.left_out
    made.step()
    assert scheduler.pie_controller.turns.left_out > left_out
    assert all(r.next_decode_eligible_step == due for r in scheduler.running)
    made.run()
    made.verify()


@pytest.mark.parametrize("cap", [None, 160, 159, 100, 0])
def test_a_cap_of_hits_holds_for_parked_kv(
    cap: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.33 caps hits where outputs beside the KV are kept: full blocks within it are found."""
    made = parked_chats.driver()
    chat = parked_chats.chat_then_others(made)
    stock = KVCacheManager.get_computed_blocks
    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", lambda self, r, *_: stock(self, r))
    manager = made.scheduler.kv_cache_manager
    request = make_request("again", [*chat, 1], 5, BLOCK_SIZE)
    parking = manager.residency.parking
    parking.tails._tails["again"] = Tail((TailBlock(0, 10),), 10, 161)
    caps = () if cap is None else (cap,)
    blocks, tokens, _ = manager.get_computed_blocks(request, *caps)
    del parking.tails._tails["again"]
    assert not blocks.blocks[0], "all of it is parked"
    assert tokens == (161 if cap is None else cap // BLOCK_SIZE * BLOCK_SIZE)


def test_an_updated_session_has_no_tail_of_older_tokens() -> None:
    """A session preempted with its last token in flight goes on with other tokens."""
    made = parked_chats.driver(async_scheduling=True)
    scheduler, parking = made.scheduler, parked_chats.parking(made)
    made.add(make_request("session", [3] * 20, 2, BLOCK_SIZE, resumable=True))
    made.add(make_request("other", [4] * 20, 9, BLOCK_SIZE))
    session = scheduler.requests["session"]
    made.run_until(lambda: session.num_computed_tokens == 21 and bool(made.queue))
    scheduler.running.remove(session)
    scheduler._preempt_request(session, 0.0)
    assert "session" in parking.tails._tails
    update = make_request("session", [5] * 8, 2, BLOCK_SIZE, resumable=True)
    scheduler._update_request_as_session(session, StreamingUpdate.from_request(update))
    assert "session" not in parking.tails._tails


def test_blocks_are_not_taken_out_of_their_table() -> None:
    """What vLLM does for KV connectors is refused by name, if anything ever asks for it."""
    made = driver()
    made.add(make_request("r", [1] * 20, 9, BLOCK_SIZE))
    made.step()
    scheduler = made.scheduler
    scheduler.defer_block_free = True
    scheduler.processed_step_seq, scheduler.requests["r"].last_sched_seq = 0, 1
    with pytest.raises(UnsupportedError, match="--kv-transfer-config"):
        made.abort("r")
