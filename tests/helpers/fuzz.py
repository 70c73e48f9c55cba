"""Random schedulers and loads by seed."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count as numbers
from typing import Any, NamedTuple

from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.plan import RETRY_SECONDS, PoolOrder
from pie_vllm.policy.control.elastic_pool import FREE_MARGIN, ElasticPool
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed, Wavering
from tests.helpers.drafts import Drafting
from tests.helpers.progress import MOST_IDLE, Progress
from tests.helpers.scheduling import Driver, make_request, random_load
from tests.helpers.states import groups_beside
from tests.helpers.tagrunner import DictMemory, Memory, TagRunner

BLOCK_SIZE = 16

STATE_BLOCKS = 3
"""Blocks of a state at most: the one before the step, one within it, and the one after it."""


def make_driver(
    sizes: Geometry,
    memory: Memory | None = None,
    decider: Fixed | None = None,
    pool: ElasticPool | None = None,
    check: bool = True,
    chance: float = 0.5,
    **options: Any,
) -> Driver:
    """A scheduler over the sizes, with as many steps in flight as its kind has.

    Where options ask for drafts, ``chance`` is that of one to be right.
    """
    scheduler = scheduling.make(sizes, BLOCK_SIZE, **options)
    scheduler.kv_cache_manager.groups.check(sizes.resident_blocks)
    scheduler.pie_controller.decider = decider or scheduler.pie_controller.decider
    scheduler.pie_controller.pool = pool or scheduler.pie_controller.pool
    beside = groups_beside(**options)
    memory = memory or DictMemory(sizes, BLOCK_SIZE)
    drafting = drafting_of(chance, **options)
    runner = TagRunner(memory, BLOCK_SIZE, len(beside), beside, drafting)
    in_flight = 1 + options.get("async_scheduling", False)
    return Driver(scheduler, runner, in_flight=in_flight, check=check)


def drafting_of(
    chance: float = 0.5,
    drafts: tuple[int, int] | None = None,
    async_scheduling: bool = False,
    **_: Any,
) -> Drafting | None:
    """How the runner drafts, by the options of a scheduler."""
    if drafts is None:
        return None
    return Drafting(*drafts, async_scheduling, chance, random.Random(chance))


class WatchedPool(ElasticPool):
    """Checks that no row is used beyond the memory there is."""

    def end_step(
        self, held: int, *, changed: bool, idle: bool = False, short: bool = False
    ) -> PoolOrder:
        known = not (self.asking or self.order.idle)
        assert held <= self.usable or not known, "a row is used for which there is no memory"
        return super().end_step(held, changed=changed, idle=idle, short=short)


class Case(NamedTuple):
    """One random case: sizes, scheduler options, and the way requests come and go.

    Attributes:
        geometry: tiny tiers.
        options: of the scheduler and the cache.
        limit: pooled blocks beyond which nobody is admitted.
        load: prompts and answer lengths.
        arrival: chance that the next request comes, before each step.
        wave: requests that come at once when all but one of the others are done; 0
            for arrivals one by one. Between waves residents are free for promotion.
        left_out: share of the running requests left out of a step.
        aborts: chance that a request is aborted, before each step.
        resets: chance that new weights come, before each step: the prefix cache is reset, and all
            requests are preempted or, every other time, it is refused while one holds blocks.
        follow_ups: chance that a finished chat goes on.
        salts: how many tenants there are, who share no KV.
        wavering: whether budget and limit change all the time; else the budget is without end.
        memory_seed: of the free CPU memory, which comes and goes within a second; None
            for as much as there is.
        rng: for all that happens.
        others: residents that a request takes at once in groups without a pool, at most.
        altered: chance that the next turn has another one of its chat's last tokens.
    """

    geometry: Geometry
    options: dict[str, Any]
    limit: int
    load: list[tuple[list[int], int]]
    arrival: float
    wave: int
    left_out: float
    aborts: float
    resets: float
    follow_ups: float
    salts: int
    wavering: bool
    memory_seed: int | None
    rng: random.Random
    others: int = 0
    altered: float = 0.0

    @property
    def most_without_progress(self) -> int:
        """Steps in which some request gets further than it ever was: see ``Progress``.

        Twice what the longest request takes to compute all of its tokens again, since it may be
        left out of steps, and some.
        """
        at_once = self.options["max_num_scheduled_tokens"]
        at_once = min(at_once, self.options["long_prefill_token_threshold"] or at_once)
        return 20 + 2 * cdiv(self.options["max_model_len"], at_once)

    @property
    def most_idle(self) -> int:
        """Steps in a row that may run nothing: until refused memory is asked for again, and some.

        Steps take 0.65 s on average by the clock of the pool, which looks at memory in some.
        """
        return MOST_IDLE if self.memory_seed is None else MOST_IDLE + int(4 * RETRY_SECONDS)

    @property
    def most_steps(self) -> int:
        """Steps in which all must be done, with room for left-out steps and recomputation."""
        tokens = sum(len(prompt) + count for prompt, count in self.load)
        return 500 + 10 * tokens

    def decider(self) -> Fixed:
        """What stands for the decider."""
        window = self.geometry.pooled_blocks
        if self.wavering:
            return Wavering(window, self.rng.randrange(1 << 30))
        return Fixed(self.limit, window)

    def pool(self) -> WatchedPool | None:
        """What stands for the pool's size: small, restless, and often short of memory."""
        if self.memory_seed is None:
            return None
        rng = random.Random(self.memory_seed)
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += rng.choice([0.01, 0.1, 0.5, 2.0])
            return now

        geometry = self.geometry
        chunk = geometry.chunk_rows * geometry.row_bytes
        longest = self.options["max_model_len"]
        return WatchedPool(
            geometry,
            cdiv(longest, BLOCK_SIZE) + 1 + self.others - geometry.resident_blocks,
            lambda: FREE_MARGIN + chunk * rng.randint(-3, 5),
            clock,
            idle_seconds=3.0,
            step_blocks=rng.choice([0, 4]),
        )

    def memory(self) -> DictMemory:
        """What holds the pool: where memory is short, a worker of its own pace."""
        restless = None if self.memory_seed is None else random.Random(self.memory_seed + 1)
        return DictMemory(self.geometry, BLOCK_SIZE, restless)


def random_case(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """Tiny tiers, so that everything is full most of the time; in half of the cases, parked KV."""
    rng = random.Random(seed)
    parks = rng.random() < 0.5
    pooled = rng.randint(1, 40)
    few, many = rng.randint(1, 9), rng.randint(10, 90)
    geometry = scheduling.geometry(
        rng.choice([rng.randint(4, 20), rng.randint(4, 40)]),
        pooled,
        pooled + rng.choice([few, many, many] if parks else [0, 0, few, many]),
        **sizes,
    )
    capacity = (geometry.num_blocks - 1) * BLOCK_SIZE
    budget = rng.choice([16, 32, 64, 256, 1024])
    options = {
        "async_scheduling": rng.random() < 0.5 if asynchronous is None else asynchronous,
        "enable_prefix_caching": parks or rng.random() < 0.4,
        "max_num_batched_tokens": budget,
        "max_num_scheduled_tokens": budget,
        "max_num_seqs": rng.choice([2, 8, 32]),
        "max_model_len": capacity,
        "long_prefill_token_threshold": rng.choice([0, 0, 0, 8, 40]),
        "policy": rng.choice(["fcfs", "fcfs", "priority"]),
        "scheduler_reserve_full_isl": rng.random() < 0.8,
        "parking": rng.choice(("lru", "lru", "off", "off")[: 2 if parks else 4]),
    }
    longest = max(1, min(rng.choice([10, 50, capacity // 2, capacity - 10]), capacity - 20))
    answer = max(1, min(60, capacity - longest - 1))
    load = random_load(rng, rng.randint(1, 30), longest, answer, rng.randint(0, 3))
    limit = rng.choice([pooled, pooled, 0, pooled // 2])
    memory_seed = rng.choice([None, rng.randrange(1 << 30)])
    if memory_seed is not None:
        # Short chats, so that what one of them needs at most is not all that there is.
        longest = max(len(prompt) + count for prompt, count in load)
        options["max_model_len"] = min(capacity, longest + rng.choice([0, 0, 50]))
    return Case(
        geometry,
        options,
        limit,
        load,
        arrival=rng.choice([0.1, 0.3, 0.95]),
        wave=rng.choice([0, 3, 10]),
        left_out=rng.choice([0.0, 0.0, 0.3]),
        aborts=rng.choice([0.0, 0.02, 0.1]),
        resets=rng.choice([0.0, 0.0, 0.01]),
        follow_ups=rng.choice([0.2, 0.5] if parks else [0.0, 0.5]),
        salts=rng.choice([1, 1, 2]),
        wavering=rng.random() < 0.4,
        memory_seed=memory_seed,
        rng=rng,
    )


def random_groups(
    seed: int, *, asynchronous: bool | None = None, caching: bool | None = None, **sizes: int
) -> Case:
    """A random case with one to three groups of layers without a pool, which hold residents.

    Their windows are shorter than a block or several blocks long; a state (0) is one block a
    request, and with prefix caching up to three, among which it moves.
    """
    case = random_case(seed, asynchronous=asynchronous, **sizes)
    if caching is None:
        caching = case.options["enable_prefix_caching"]
    rng = random.Random(seed + 1_000_000)
    beside = tuple(rng.choice([0, 5, 20, 40, 70]) for _ in range(rng.randint(1, 3)))
    steps = 1 + case.options["async_scheduling"]
    budget = case.options["max_num_batched_tokens"]

    def most(tokens: int) -> int:
        windows = (cdiv(w - 1 + steps * tokens, BLOCK_SIZE) + 1 for w in beside if w)
        return sum(windows) + beside.count(0) * (STATE_BLOCKS if caching else 1)

    old = case.geometry
    geometry = scheduling.geometry(
        most(BLOCK_SIZE) + 4 + rng.choice([0, 2, 10, 30]),
        old.pooled_blocks + rng.choice([0, 20]),
        old.rows + 20,
        **sizes,
    )
    capacity = (geometry.num_blocks - 1 - most(budget)) * BLOCK_SIZE
    longest = max(len(prompt) + count for prompt, count in case.load)
    if longest >= capacity:
        capacity = max(capacity, 40)
        case.load[:] = [
            (prompt[: capacity // 2], min(count, capacity // 2 - 1)) for prompt, count in case.load
        ]
    options = {
        **case.options,
        "beside": beside,
        "enable_prefix_caching": caching,
        "checkpoints": rng.random() < 0.5,
        "max_model_len": capacity,
        "parking": "off",
        "prefix_cache_retention_interval": rng.choice([0, 0, None, 2 * BLOCK_SIZE]),
    }
    return case._replace(geometry=geometry, options=options, others=most(BLOCK_SIZE))


def random_groups_preempted(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """A random case with several groups, and rows for what preempted requests have in them.

    In half of the cases there is a prefix cache.
    """
    rng = random.Random(seed + 3_000_000)
    caching = rng.random() < 0.5
    case = random_groups(seed, asynchronous=asynchronous, caching=caching, **sizes)
    old = case.geometry
    geometry = replace(old, rows=old.rows + rng.choice([10, 100, 200]))
    options = {
        **case.options,
        "parking": "lru",
        "scheduler_reserve_full_isl": rng.random() < 0.3,
    }
    return case._replace(geometry=geometry, options=options)


def random_groups_returning(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """A random case with groups, a prefix cache and rows for all, whose chats go on after a turn.

    Few run at once, so that most blocks of an ended turn get another use before the next one.
    """
    draws = (
        random_groups_preempted(number, asynchronous=asynchronous, **sizes)
        for number in numbers(100 * seed)
    )
    case = next(case for case in draws if case.options["enable_prefix_caching"])
    rng = random.Random(seed + 4_000_000)
    longest = max(len(prompt) for prompt, _ in case.load)
    load = case.load[:10] + random_load(rng, 4, longest, min(12, case.load[0][1]), 0)
    return case._replace(
        load=load,
        aborts=rng.choice([0.0, 0.02]),
        resets=rng.choice([0.0, 0.0, 0.01]),
        follow_ups=0.8,
        salts=rng.choice([1, 1, 2]),
        altered=rng.choice([0.0, 0.5]),
    )


def random_preemptions(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """A random case without a prefix cache whose chats outgrow their blocks, with rows for more."""
    case = random_case(seed, asynchronous=asynchronous, **sizes)
    rng = random.Random(seed + 2_000_000)
    old = case.geometry
    few, many = rng.randint(1, 9), rng.randint(10, 90)
    geometry = scheduling.geometry(
        old.resident_blocks, old.pooled_blocks, old.pooled_blocks + rng.choice([few, many]), **sizes
    )
    most = case.options["max_model_len"]
    if case.memory_seed is None:  # Where memory comes and goes, none may need nearly all of it.
        for number, (prompt, _) in enumerate(case.load):
            case.load[number] = prompt, min(rng.randint(1, 90), most - len(prompt) - 1)
    options = {
        **case.options,
        "enable_prefix_caching": False,
        "parking": "lru",
        "scheduler_reserve_full_isl": rng.random() < 0.5,
    }
    return case._replace(geometry=geometry, options=options)


def random_drafts(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """A random case with speculation, by a drafter that writes behind a step's tokens or not.

    Half of the cases have no prefix cache and preempt a lot.
    """
    draw = random_preemptions if seed % 2 else random_case
    case = draw(seed, asynchronous=asynchronous, **sizes)
    rng = random.Random(seed + 3_000_000)
    tokens = rng.randint(1, 6)
    options = {
        **case.options,
        "drafts": (tokens, rng.choice([0, tokens, tokens + 1])),
        "chance": rng.choice([0.0, 0.4, 0.8, 1.0]),
    }
    return case._replace(options=options, memory_seed=None)


def leave_out(driver: Driver, rng: random.Random, share: float) -> None:
    """Leave a share of the running requests out of the next step, but never all of them."""
    running = list(driver.scheduler.running)
    for request in running[1:]:
        if rng.random() < share:
            step = driver.scheduler.current_step + 2
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, step)


def follow_up(driver: Driver, case: Case, asked: set[str]) -> tuple[list[int], int] | None:
    """The next turn of a finished chat, which hits the blocks of its first, if it fits."""
    rng = case.rng
    done = [r for r in driver.answers if r not in driver.scheduler.requests and r not in asked]
    if not done or rng.random() >= case.follow_ups:
        return None
    chat = rng.choice(done)
    asked.add(chat)
    prompt = [*driver.prompts[chat], *driver.answers[chat], rng.randrange(997)]
    if case.altered and rng.random() < case.altered:
        at = -2 - rng.randrange(min(BLOCK_SIZE, len(prompt) - 2))
        prompt[at] = (prompt[at] + 1) % 997
    room = case.options["max_model_len"] - len(prompt) - 1
    return (prompt, rng.randint(1, min(30, room))) if room > 0 else None


def nothing_left(driver: Driver) -> None:
    """Assert that all ids are free, and all rows free or parked under a key, once all are done."""
    scheduler = driver.scheduler
    manager, residency = scheduler.kv_cache_manager, scheduler.kv_cache_manager.residency
    queue, rows, parking = residency.queue, residency.rows, residency.parking
    assert manager.usage == 0.0
    assert queue.free_in_all == manager.geometry.num_blocks - 1, "an id is not free"
    assert not residency.tables
    assert not residency.victims.holders
    assert not residency.read_set.by_request
    assert not parking.tails, "a tail of a request that is gone"
    assert rows.num_parked == len(parking) + len(parking.ended.rows()), "a row is parked for nobody"
    assert not parking.held, "a row is kept for a step that is done"
    residency.check_integrity()
    assert driver.reset(running=False), "blocks are in use"
    assert rows.num_free == manager.geometry.rows, "a row holds what nobody can ask for"
    residency.check_integrity()


def disturb(driver: Driver, case: Case) -> None:
    """Abort, reset and leave out as the case says."""
    rng, scheduler = case.rng, driver.scheduler
    live = [r for r in driver.answers if r in scheduler.requests]
    if live and rng.random() < case.aborts:
        driver.abort(rng.choice(live))
    if rng.random() < case.resets:
        driver.reset(running=rng.random() < 0.5)
    if case.left_out:
        leave_out(driver, rng, case.left_out)


def arriving(driver: Driver, case: Case) -> int:
    """How many requests come before the next step."""
    if not case.wave:
        count = 0
        while case.rng.random() < case.arrival:
            count += 1
        return count
    live = sum(request_id in driver.scheduler.requests for request_id in driver.answers)
    return case.wave if live <= 1 else 0


def play(driver: Driver, case: Case) -> None:
    """Let all requests of a case come, run, be disturbed, and end.

    Raises:
        AssertionError: no progress, a wrong page, a wrong answer, a block or a row left over.
    """
    rng, scheduler = case.rng, driver.scheduler
    pending = list(case.load)
    asked: set[str] = set()
    progress = Progress(driver, case.most_without_progress, case.most_idle)
    count = 0
    while pending or scheduler.has_requests() or driver.queue:
        for _ in range(min(arriving(driver, case), len(pending))):
            prompt, answer = follow_up(driver, case, asked) or pending.pop(0)
            name = f"r{count}"
            count += 1
            salt = rng.choice([None, "a", "b"][: case.salts])
            driver.add(
                make_request(name, prompt, answer, BLOCK_SIZE, rng.randint(0, 2), cache_salt=salt)
            )
        disturb(driver, case)
        driver.step()
        progress.look()
        assert driver.steps <= case.most_steps, f"not done after {driver.steps} steps"
    driver.verify()
    nothing_left(driver)
