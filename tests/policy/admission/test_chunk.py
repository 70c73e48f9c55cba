"""The tokens of a step: all of its new blocks find resident pages, and nothing more is kept."""

from __future__ import annotations

import random

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.chunk import Asked, Chunk, Runs, decide_chunk, plenty, promised
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.simulation.prefix_cache import Block, Free

SIZE = 16
MAX = 4096


class _Nobody:
    def __getattr__(self, _: str) -> object:
        return lambda *_: None


def queue_of(free: int, demotable: int, pooled: int) -> TieredFreeBlockQueue:
    """With so many free residents, demotable ones and free pooled ids."""
    blocks = [Block(i) for i in range(free + demotable + pooled)]
    queue = TieredFreeBlockQueue(blocks, free + demotable, Free, _Nobody())  # type: ignore[arg-type]
    queue.popleft_n(demotable)
    queue.demotable = demotable
    queue.refresh()
    return queue


def decide(
    queue: TieredFreeBlockQueue,
    asked: Asked,
    waiting: bool = True,
    stores: int | None = None,
    lookahead: int = 0,
) -> Chunk:
    return decide_chunk(queue, asked, waiting, stores, MAX, SIZE, lookahead=lookahead)


def decoding(computed: int, tokens: int, lookahead: int, out: bool) -> Runs:
    """A request that decodes, with drafts, and has the slots of the step before."""
    held = cdiv(computed + lookahead, SIZE)
    lacks = cdiv(computed + tokens + lookahead, SIZE) - held
    return Runs(computed, tokens, False, out, lacks)


def test_a_waiting_prompt_may_have_all_but_what_running_requests_need() -> None:
    """Three decodes, two of them at the end of a block, one left out there."""
    running = [
        Runs(32, 1, False, False),
        Runs(16, 1, False, False),
        Runs(20, 1, False, False),
        Runs(48, 1, False, True),
    ]
    asked = Asked.of(running, SIZE)
    assert asked == Asked(3, 2, 0, (), 1)
    drafts = [*running, Runs(30, 4, False, False, 1), Runs(12, 4, False, True, 2)]
    assert Asked.of(drafts, SIZE) == Asked(7, 3, 0, (), 3), "a decode with its drafts"
    # 4 free, 6 to be demoted, 2 due.
    assert decide(queue_of(4, 6, 50), asked) == Chunk(3 + 8 * SIZE, 8)
    # As far as the link stores behind the compute: what is free costs no store.
    assert decide(queue_of(4, 6, 50), asked, stores=3) == Chunk(3 + 5 * SIZE, 5)
    assert decide(queue_of(4, 6, 50), asked, waiting=False) == Chunk(3, 8)
    # The last page is the one of who is left out.
    assert decide(queue_of(3, 1, 50), asked) == Chunk(3 + 2 * SIZE, 2)
    assert decide(queue_of(3, 0, 50), asked) == Chunk(3, 1)


def test_a_block_takes_a_page_of_each_group() -> None:
    """Three pages a block: of 10 that can be had, 3 are due, and two blocks find theirs."""
    asked = Asked(decodes=4, due=1)
    queue = queue_of(4, 6, 50)
    assert decide_chunk(queue, asked, True, None, MAX, SIZE, 3) == Chunk(4 + 2 * SIZE, 2)
    assert decide_chunk(queue, asked, True, None, MAX, SIZE, 99) == Chunk(4 + SIZE, 1)
    assert plenty(queue_of(20, 0, 1), 2 * SIZE, 3, SIZE, 3)
    assert not plenty(queue_of(18, 0, 1), 2 * SIZE, 3, SIZE, 3)


def test_nothing_is_demoted_while_those_who_wait_for_the_link_hold_too_much() -> None:
    """What is free counts, and nothing else."""
    queue = queue_of(3, 20, 50)
    queue.frozen = True
    assert decide(queue, Asked(2, 1)) == Chunk(2 + 2 * SIZE, 2)


def test_a_want_of_cpu_memory_makes_the_chunk_smaller() -> None:
    """Instead of a preemption: there are pooled ids, and soon perhaps rows for them."""
    queue = queue_of(3, 20, 50)
    queue.withheld = 46
    queue.refresh()
    assert decide(queue, Asked(2, 1)) == Chunk(2 + 6 * SIZE, 6)


def test_nothing_is_kept_where_one_more_page_is_to_be_had() -> None:
    """The newcomer's own blocks but one can be demoted for the others in the next step."""
    assert promised(queue_of(1, 3, 9), tails=1, prompts=2) == 0
    assert promised(queue_of(1, 2, 9), tails=1, prompts=2) == 3
    assert promised(queue_of(1, 0, 9), tails=0, prompts=0) == 0


def test_a_prompt_under_way_is_served_before_those_who_wait() -> None:
    """It fills the block that it began, and its end need not fill a block."""
    asked = Asked.of([Runs(20, 12 + 5, True, False)], SIZE)
    # One block of its own, five for others.
    assert decide(queue_of(6, 0, 9), asked) == Chunk(17 + 5 * SIZE, 6)
    long = Asked.of([Runs(20, 500, True, False)], SIZE)
    assert decide(queue_of(6, 0, 9), long) == Chunk(12 + 6 * SIZE, 6)
    # It comes before decodes: it would take their tokens as well.
    before = Asked.of([Runs(20, 500, True, False), Runs(7, 1, False, False)], SIZE)
    assert decide(queue_of(6, 0, 9), before) == Chunk(12 + 6 * SIZE, 6)


def test_there_is_always_something_to_compute() -> None:
    """Where all is in use somebody is preempted, as in vLLM, instead of a step of nothing."""
    assert decide(queue_of(0, 0, 0), Asked(prompts=((16, 100),))).tokens == SIZE
    assert decide(queue_of(0, 4, 4), Asked(3, 4)).tokens >= 3
    assert decide(queue_of(1, 0, 0), Asked()).tokens == SIZE


def test_the_blocks_of_any_step_are_there() -> None:
    """Of random requests, served in order with the tokens decided, as vLLM serves them."""
    rng = random.Random(0)
    for _ in range(3000):
        drafts, ahead = rng.choice([(0, 0), (0, 0), (4, 0), (4, 4), (4, SIZE + 1)])
        running = [
            Runs(computed, rng.randint(2, 400), True, rng.random() < 0.1)
            if rng.random() < 0.3
            else decoding(computed, rng.randint(1, 1 + drafts), ahead, rng.random() < 0.1)
            for computed in rng.choices(range(200), k=rng.randint(0, 12))
        ]
        asked = Asked.of(running, SIZE)
        least = max(1, asked.due + len(asked.prompts))
        queue = queue_of(rng.randint(least, least + 20), rng.randint(0, 20), rng.randint(0, 20))
        stores = rng.choice([None, 1, 5])
        tokens, blocks = decide(queue, asked, rng.random() < 0.5, stores, ahead)
        assert 1 <= tokens <= MAX
        used, left = 0, tokens
        for computed, wanted, _, out, _ in running:
            count = 0 if out else min(wanted, left)
            left -= count
            used += cdiv(computed + ahead + count, SIZE) - cdiv(computed + ahead, SIZE)
        # And the rest for one who waits.
        used += cdiv(left + ahead, SIZE) if left > 1 else left
        assert used <= queue.free_residents + queue.demotable, (running, tokens)
        assert used <= asked.due + blocks


def test_plenty_is_more_than_any_step_asks_for() -> None:
    assert plenty(queue_of(20, 0, 0), 16 * SIZE, 2, SIZE)
    assert not plenty(queue_of(19, 5, 9), 16 * SIZE, 2, SIZE)
