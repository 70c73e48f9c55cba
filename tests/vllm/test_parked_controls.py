"""Negative controls of parking: each breakage of its policy must show in what the pages hold.

The books of the policy would notice most of them first, so they are not checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tail, Tails
from tests.helpers.fuzz import make_driver, play, random_case
from tests.helpers.naive_parked import evict

pytestmark = pytest.mark.vllm

Patch = pytest.MonkeyPatch
SEEDS = 20


def wrong_row(patch: Patch) -> None:
    """A page is filled from the row of another parked block."""
    restore = Parking.restore

    def wrong(self: Parking, rows: Sequence[int], residents: Sequence[int]) -> None:
        restore(self, rows, residents)
        restores = self.copies.restores
        for resident in residents:
            others = {*self._index.rows()} - {restores[resident], *self.copies.stores}
            restores[resident] = min(others, default=restores[resident])

    patch.setattr(Parking, "restore", wrong)


def wrong_row_attached(patch: Patch) -> None:
    """A pooled id gets the row of another parked block: the keys of two rows are exchanged."""
    park = ParkedIndex.park

    def wrong(self: ParkedIndex[Any], key: Any, row: int, *, pinned: bool = False) -> None:
        other = None if pinned else evict(self)
        if other is None:
            park(self, key, row, pinned=pinned)
        else:
            park(self, key, other[1])
            park(self, other[0], row)

    def wrong_for_all(self: ParkedIndex[Any], keys: Sequence[Any], rows: Sequence[int]) -> None:
        for key, row in zip(keys, rows, strict=True):
            wrong(self, key, row)

    patch.setattr(ParkedIndex, "park", wrong)
    patch.setattr(ParkedIndex, "park_all", wrong_for_all)


def lost_stores(patch: Patch) -> None:
    """Blocks are parked though nothing is stored to their rows."""
    patch.setattr(StepCopies, "store_parked", lambda *_: None)
    patch.setattr(StepCopies, "store_all_parked", lambda *_: None)


def kept_over_reset(patch: Patch) -> None:
    """New weights leave what is parked."""
    patch.setattr(Parking, "clear", lambda _: None)


def promoted_row_free(patch: Patch) -> None:
    """The row of a promoted block may be stored over before it is read."""

    def wrong(self: Parking, blocks: Sequence[Any], _: Sequence[int]) -> None:
        for block in blocks:
            self._rows.free_parked(self._rows.park(block.block_id))

    patch.setattr(Parking, "promoted", wrong)


def tail_row_free(patch: Patch) -> None:
    """The row of a tail that comes back may be stored over before it is read."""

    def wrong(self: Tails, request_id: str) -> Tail:
        tail = self._tails.pop(request_id)
        for block in tail.blocks:
            self._copies.free(block.row)
        return tail

    patch.setattr(Tails, "take", wrong)
    patch.setattr(Tails, "put_back", lambda *_: None)


def same_salt(patch: Patch) -> None:
    """Tenants share one salt."""
    patch.setattr(
        "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys", lambda *a: (None, a[3])
    )


CONTROLS = (
    wrong_row,
    wrong_row_attached,
    lost_stores,
    kept_over_reset,
    promoted_row_free,
    tail_row_free,
    same_salt,
)


SEEN = ("foreign KV", "is stored over and promoted", "a row holds what nobody can ask for")


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_a_broken_policy_is_noticed(
    control: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within twenty seeds a request reads foreign KV, or the copies of a step contradict."""
    control(monkeypatch)
    for seed in range(SEEDS):
        case = random_case(seed)
        memory = case.memory()
        driver = make_driver(
            case.geometry, memory, case.decider(), case.pool(), check=False, **case.options
        )
        try:
            play(driver, case)
        except AssertionError as error:
            if not any(text in str(error) for text in SEEN):
                raise
            return
    pytest.fail("twenty seeds did not notice")


def test_a_row_without_a_store_is_noticed_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check of plans knows which rows were stored to, whatever they hold."""
    lost_stores(monkeypatch)
    for seed in range(SEEDS):
        case = random_case(seed)
        memory = case.memory()
        driver = make_driver(case.geometry, memory, case.decider(), case.pool(), **case.options)
        try:
            play(driver, case)
        except AssertionError as error:
            assert "holds no KV" in str(error)  # noqa: PT017
            return
    pytest.fail("twenty seeds did not notice")
