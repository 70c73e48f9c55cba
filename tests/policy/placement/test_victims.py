"""Victims: the order of demotion, found without asking every request."""

from __future__ import annotations

import random

from pie_vllm.policy.placement.victims import Victims
from tests.helpers.fakes import FakeBlock

BOUNDARY = 1000


class Tables:
    """Requests with full resident blocks; some of them shared."""

    def __init__(self) -> None:
        self.tables: dict[str, list[FakeBlock]] = {}
        self.victims = Victims(self.tables, BOUNDARY)
        self.next_id = 0

    def block(self) -> FakeBlock:
        block = FakeBlock(self.next_id)
        block.ref_cnt = 1
        self.next_id += 1
        self.victims.full[block.block_id] = 1
        return block

    def admit(self, name: str, count: int, shared: tuple[FakeBlock, ...] = ()) -> None:
        for block in shared:
            block.ref_cnt += 1
        self.tables[name] = [*shared, *(self.block() for _ in range(count))]
        self.victims.admit(name, len(shared) + count)

    def demote(self, name: str, index: int) -> None:
        block = self.tables[name][index]
        self.victims.full[block.block_id] = 0
        for table in self.tables.values():
            if index < len(table) and table[index] is block:
                table[index] = FakeBlock(BOUNDARY + block.block_id)


def drain(tables: Tables) -> list[tuple[str, int]]:
    """Demote all that the fast search finds."""
    order = []
    while (victim := tables.victims.private(1)) is not None:
        order.append((victim.request_id, victim.index))
        tables.demote(victim.request_id, victim.index)
        tables.victims.check_integrity()
    return order


def test_the_request_admitted_last_gives_all_its_blocks_first() -> None:
    """Few requests stream, and shared blocks are left alone."""
    tables = Tables()
    tables.admit("old", 2)
    tables.admit("new", 2, (tables.tables["old"][0],))
    assert drain(tables) == [("new", 1), ("new", 2), ("old", 1)]
    rest = [(v.request_id, v.index, v.blocks[0].ref_cnt) for v in tables.victims.rest()]
    assert rest == [("new", 0, 2), ("old", 0, 2)]
    assert tables.victims.users(0, tables.tables["old"][0]) == ["old", "new"]


def test_what_became_full_or_resident_again_is_found_again() -> None:
    """New full blocks and promoted ones bring their request back into the search."""
    tables = Tables()
    tables.admit("a", 2)
    tables.admit("b", 1)
    assert len(drain(tables)) == 3
    holder = tables.victims.holders["a"]
    tables.tables["a"].append(tables.block())
    holder.full += 1
    tables.victims.offer(holder)
    tables.tables["b"][0] = tables.block()
    tables.victims.offer_from("b", 0)
    assert drain(tables) == [("b", 0), ("a", 2)]


def test_a_block_that_lost_its_other_user_is_found_by_the_rest() -> None:
    """The fast search passed it while it was shared; the slow one takes it before shared ones."""
    tables = Tables()
    tables.admit("a", 1)
    tables.admit("b", 1, (tables.tables["a"][0],))
    drain(tables)
    shared = tables.tables["a"][0]
    shared.ref_cnt = 1
    tables.victims.forget("b")
    del tables.tables["b"]
    assert next((v.request_id, v.index) for v in tables.victims.rest()) == ("a", 0)


def test_random_comings_and_goings_keep_the_books() -> None:
    """Between them the searches find every full resident block, private ones first."""
    rng = random.Random(3)
    for _ in range(60):
        tables = Tables()
        for number in range(rng.randint(1, 8)):
            donor = rng.choice([None, *tables.tables])
            shared = tuple(tables.tables[donor][: rng.randint(0, 2)]) if donor else ()
            tables.admit(f"r{number}", rng.randint(0, 3), shared)
            if rng.random() < 0.3 and tables.tables:
                name = rng.choice(list(tables.tables))
                tables.victims.forget(name)
                for block in tables.tables.pop(name):
                    block.ref_cnt -= 1
                    tables.victims.full[block.block_id] = block.ref_cnt > 0
            tables.victims.check_integrity()
        wanted = {b.block_id for t in tables.tables.values() for b in t}
        found = set()
        for name, index in drain(tables):
            found.add(tables.tables[name][index].block_id - BOUNDARY)
        for victim in tables.victims.rest():
            found.add(victim.blocks[0].block_id)
            tables.demote(victim.request_id, victim.index)
        assert found == wanted
        assert not any(tables.victims.full)
