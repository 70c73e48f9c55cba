"""Allocations that are left out, because vLLM's code would change nothing, are just those."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.vllm.scheduler_side import manager as module
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager
from tests.helpers.fuzz import BLOCK_SIZE, Case, make_driver, play, random_case, random_groups

pytestmark = pytest.mark.vllm

SEEDS = range(6)


class Shadow:
    """Has vLLM's code do what was left out, and sees whether that changed anything.

    Attributes:
        left_out: number of calls that did not come to vLLM's code.
        stock: number of calls that did.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left_out = self.stock = 0
        for method, stock in (
            ("allocate_slots", "_allocate_stock"),
            ("cache_blocks", "_cache_stock"),
        ):
            own, of_vllm = getattr(PieBlockSpaceManager, method), getattr(module, stock)
            monkeypatch.setattr(module, stock, self._counted(of_vllm))
            monkeypatch.setattr(PieBlockSpaceManager, method, self._shadowed(own, of_vllm))

    def _counted(self, of_vllm: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.stock += 1
            return of_vllm(*args)

        return counted

    def _shadowed(self, own: Any, of_vllm: Any) -> Any:
        def shadowed(manager: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            before, waits = self.stock, request.status is not module._RUNNING
            found = own(manager, request, *args, **kwargs)
            if self.stock == before and not waits:
                self.left_out += 1
                books = _books(manager, request)
                assert of_vllm(manager, request, *args, **kwargs) is found, "left out"
                assert found in (None, manager.empty_kv_cache_blocks), "left out"
                assert _books(manager, request) == books, "left out"
            return found

        return shadowed


def _books(manager: Any, request: Any) -> list[Any]:
    """What an allocation or the caching of blocks may change."""
    pool, name = manager.block_pool, request.request_id
    queue = pool.free_block_queue
    return [
        [
            (one.num_cached_block.get(name), [*one.req_to_blocks.get(name, ())])
            for one in manager.coordinator.single_type_managers
        ],
        [block.block_hash for block in manager.residency.tables.get(name, ())],
        len(pool.cached_block_hash_to_block),
        (queue.taken, queue.turnover, queue.free_residents, queue.num_free_blocks),
        manager.residency.demotions,
    ]


def _play(case: Case) -> None:
    memory, decider, pool = case.memory(), case.decider(), case.pool()
    play(make_driver(case.geometry, memory, decider, pool, **case.options), case)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_left_out_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, *, caching: bool, asynchronous: bool
) -> None:
    """With and without prefix caching, one or two steps in flight, parking on and off."""
    shadow = Shadow(monkeypatch)
    for seed in SEEDS:
        case = random_case(seed, asynchronous=asynchronous)
        case.options["enable_prefix_caching"] = caching
        _play(case)
    assert shadow.left_out > 2 * shadow.stock > 0


def test_nothing_is_left_out_beside_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups with windows or states free and move blocks in steps that fill none."""
    shadow = Shadow(monkeypatch)
    for seed in SEEDS:
        _play(random_groups(seed))
    assert shadow.stock > 0 == shadow.left_out


@pytest.mark.parametrize("wrong", ["_num_cached", "_tables", "block_size"])
def test_the_shadow_sees_a_call_too_many_left_out(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Negative control: books that are ahead of vLLM's, or blocks that are longer."""

    class _Ahead(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            found = books.get(key, default)
            return found + 1 if isinstance(found, int) else [*found, None]

    Shadow(monkeypatch)
    case = random_case(0, asynchronous=True)
    case.options["enable_prefix_caching"] = wrong == "_num_cached"
    driver = make_driver(case.geometry, case.memory(), case.decider(), None, **case.options)
    manager = driver.scheduler.kv_cache_manager
    books: Any = getattr(manager, wrong)
    monkeypatch.setattr(manager, wrong, 2 * BLOCK_SIZE if wrong == "block_size" else _Ahead())
    with pytest.raises(AssertionError, match="left out"):
        play(driver, case)
