"""No KV of old weights is found by who comes later: pages are marked with who computed them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.policy.admission.keeping import Keeping
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.stale_kv import StaleKv
from tests.helpers import scheduling
from tests.helpers.changing_weights import Changes
from tests.helpers.engine_memory import EngineMemory
from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.parked_chats import (
    POOLED,
    RESIDENT,
    ROWS,
    cached_tokens,
    crowd,
    driver,
    parking,
    prompt,
)
from tests.helpers.streams import inject
from tests.helpers.tagrunner import Memory

pytestmark = pytest.mark.vllm

Patch = pytest.MonkeyPatch
A, B = LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b")


def reloaded(lora: LoRARequest, number: int | None = None) -> LoRARequest:
    """What vLLM is asked for: the same adapter anew, in place or under another number."""
    return LoRARequest(
        lora.lora_name, number or lora.lora_int_id, lora.lora_path, load_inplace=number is None
    )


def chat(made: Changes, lora: LoRARequest | None, seed: int) -> list[int]:
    """A chat of ten blocks, done; returns its tokens."""
    name = made.ask(prompt(seed, 150), 12, lora)
    made.made.run()
    return [*made.made.prompts[name], *made.made.answers[name]]


def found(made: Changes, history: list[int], lora: LoRARequest | None) -> int:
    """Tokens that the next turn of a chat finds computed."""
    name = made.ask([*history, 1, 2, 3], 5, lora)
    made.made.step()
    tokens = cached_tokens(made.made, name)
    made.made.run()
    return tokens


def parked_chats() -> tuple[Changes, dict[str, tuple[list[int], LoRARequest | None]]]:
    """Three chats, with the base model and two adapters, whose residents others have used since."""
    made = Changes(driver())
    chats = {
        name: (chat(made, lora, seed), lora)
        for seed, (name, lora) in enumerate({"base": None, "a": A, "b": B}.items())
    }
    crowd(made.made)
    made.made.run()
    assert len(parking(made.made)) >= 30
    return made, chats


@pytest.mark.parametrize(
    "change",
    [
        lambda stale: stale.adapter_added(reloaded(A)),
        lambda stale: stale.adapter_added(reloaded(A, 7)),
        lambda stale: stale.adapter_removed(A.lora_int_id),
    ],
    ids=["in place", "other number", "removed"],
)
def test_a_reloaded_adapter_finds_nothing_and_others_find_all(change: Any) -> None:
    """In place, by another number, or removed so that its files are read again."""
    made, chats = parked_chats()
    made.runner.new_adapter("a")
    change(made.stale)
    assert {name: found(made, *it) for name, it in chats.items()} == {"base": 160, "a": 0, "b": 160}
    assert found(made, *chats["a"]) >= 160, "its new KV is cached as before"


@pytest.mark.parametrize(
    "lora", [A, LoRARequest("a", 1, "/other", load_inplace=True), LoRARequest("c", 3, "/c")]
)
def test_loading_what_changes_no_adapter_forgets_nothing(lora: LoRARequest) -> None:
    """One that is loaded already, the same name with other files, or a new one."""
    made, chats = parked_chats()
    made.stale.adapter_added(lora)
    assert {name: found(made, *it) for name, it in chats.items()} == dict.fromkeys(chats, 160)


def test_new_weights_forget_residents_too() -> None:
    """Else KV that is computed behind a stale hit would be parked, and live long."""
    made = Changes(driver())
    history = chat(made, None, 1)
    assert found(made, history, None) == 160
    made.new_weights()
    assert found(made, history, None) == 0
    made.made.verify()


def change_at_random(
    seed: int, asynchronous: bool, memory: Memory | None = None, *, caching: bool = True
) -> int:
    """Chats that go on while weights and adapters change; returns parked blocks found."""
    rng = random.Random(seed)
    made = Changes(driver(memory, async_scheduling=asynchronous, enable_prefix_caching=caching))
    loras: list[LoRARequest | None] = [None, A, B]
    chats: list[tuple[str, LoRARequest | None]] = []
    for step in range(400):
        live = len(made.made.scheduler.requests)
        if live < 8 and rng.random() < 0.3:
            lora, tokens = rng.choice(loras), prompt(rng.randrange(6), rng.randint(20, 120))
            done = [c for c in chats if c[0] not in made.made.scheduler.requests]
            if done and rng.random() < 0.7:
                name, lora = rng.choice(done)
                tokens = [*made.made.prompts[name], *made.made.answers[name], 5]
            if len(tokens) < 250:
                chats.append((made.ask(tokens, rng.randint(1, 40), lora), lora))
        if step % 20 == 10:
            what = rng.choice([None, A, B])
            if what is None:
                made.new_weights()
            else:
                made.reload(reloaded(what))
        made.made.step()
    made.made.run()
    made.made.verify()
    return int(made.made.scheduler.kv_cache_manager.hit_counts.hits.parked)


def found_by_seeds(asynchronous: bool = False, *, caching: bool = True) -> int:
    """Parked blocks that were found in all runs."""
    return sum(change_at_random(seed, asynchronous, caching=caching) for seed in range(12))


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_nobody_who_comes_later_reads_old_kv(asynchronous: bool, caching: bool) -> None:
    """Under preemption, with requests that run on through the change and end later."""
    found = found_by_seeds(asynchronous, caching=caching)
    assert found > (100 if caching else 20), "parked KV is still found"


def test_what_is_kept_by_name_is_forgotten(monkeypatch: Patch) -> None:
    """Negative control: a preempted request finds what the adapter before a reload computed."""
    monkeypatch.setattr(Keeping, "forget", lambda *_: None)
    with pytest.raises(AssertionError, match="foreign KV"):
        found_by_seeds(caching=False)


def test_rows_that_steps_in_flight_name_are_not_written_to_before() -> None:
    """What is forgotten frees rows at once; copies are late, and pages are read layer by layer."""
    for seed in range(3):
        sizes = scheduling.geometry(RESIDENT, POOLED, ROWS, chunk_rows=ROWS)
        with TransferEngine(sizes, chunks=1) as engine:
            inject(engine, "late", milliseconds=0.05, up_to=0.4, seed=seed)
            memory = EngineMemory(engine, BLOCK_SIZE)
            try:
                change_at_random(seed, asynchronous=True, memory=memory)
            finally:
                memory.close()


def cached_all_the_same(patch: Patch) -> None:
    """Who held blocks at the change caches and parks what it computes behind them."""
    patch.setattr(
        PieBlockPool, "not_cached", property(lambda _: set(), lambda *_: None), raising=False
    )


def residents_left(patch: Patch) -> None:
    """What residents cache is left, as vLLM does."""
    patch.setattr(PieBlockPool, "forget_cached", lambda _: None)


def old_keys(patch: Patch) -> None:
    """Requests of a reloaded adapter keep their keys."""
    patch.setattr(StaleKv, "_salt_again", lambda *_: None)


@pytest.mark.parametrize("breakage", [cached_all_the_same, residents_left, old_keys])
def test_each_part_is_needed(breakage: Any) -> None:
    """Negative controls."""
    with pytest.MonkeyPatch.context() as patch:
        breakage(patch)
        with pytest.raises(AssertionError, match="foreign KV"):
            found_by_seeds()


def test_a_request_that_reloads_its_adapter(tmp_path: Path) -> None:
    """New files count from the step that admits it; the same files are no reload."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    lora = LoRARequest("d", 4, str(tmp_path), load_inplace=True)
    made = Changes(driver())
    history = chat(made, lora, 1)
    assert found(made, history, lora) == 160, "vLLM 0.32's server sets the flag every time"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"22")
    for _ in range(12):  # Old weights until the reload: these fill the device.
        made.ask(prompt(9, 60), 60, LoRARequest("d", 4, str(tmp_path)))
    for _ in range(3):
        made.made.step()
    name = made.ask([*history, 1, 2, 3], 5, lora)
    made.runner.reloads[name] = "d"
    made.ask(prompt(9, 90), 5, LoRARequest("d", 4, str(tmp_path)))
    made.made.run()
    made.made.verify()
    assert not made.stale.reloads
    assert found(made, prompt(9, 90), lora) > 0, "what came after it is cached"
