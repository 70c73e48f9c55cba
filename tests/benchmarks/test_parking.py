"""The parts of `benchmarks.parking` that need no engine: loads, the record, what is asked."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import parking
from benchmarks.harness.rounds import Question
from benchmarks.real import parking_loads
from benchmarks.real.answering import answer_all, figures
from benchmarks.real.arrivals import Arrivals, Ask, SingleChats, Source, TurnChats, Turns
from benchmarks.real.churn import take_turns
from benchmarks.real.parking_report import Part, plot, print_part
from benchmarks.real.parking_run import source_of
from benchmarks.real.token_record import TokenRecord, watched_tokens


@dataclass
class Engine:
    """Answers up to `most` requests at a time, a token each in a step that takes a second."""

    most: int = 2
    now: float = 0.0
    running: dict[str, list[int]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    busiest: int = 0
    slept: float = 0.0

    def add(self, ask: Ask) -> None:
        self.running[ask.name] = []
        self.wanted[ask.name] = ask.tokens
        self.busiest = max(self.busiest, len(self.running))

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        self.now += 1.0
        outputs = []
        for name in list(self.running)[: self.most]:
            tokens = self.running[name]
            tokens.append(len(tokens))
            finished = len(tokens) == self.wanted[name]
            outputs.append(
                SimpleNamespace(
                    request_id=name,
                    finished=finished,
                    outputs=[SimpleNamespace(token_ids=tuple(tokens))],
                )
            )
            if finished:
                del self.running[name]
        return outputs

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds

    def answer(self, source: Source) -> list[Any]:
        return answer_all(self, source, self.add, lambda: self.now, self.sleep)


def test_single_chats_share_nothing_and_are_the_same_each_time() -> None:
    """Stock and pie get the same load, and no block of one chat is a hit of another."""
    load = SingleChats(20, (30, 50), (5, 9), seed=3)
    asks = load.asks(2.0)
    assert asks == load.asks(2.0)
    assert len({ask.prompt[:16] for ask in asks}) == 20
    assert {len(ask.prompt) for ask in asks} <= set(range(30, 51))
    assert {ask.tokens for ask in asks} <= set(range(5, 10))
    assert SingleChats(20, (30, 50), (5, 9), seed=4).asks(2.0)[0].prompt != asks[0].prompt


def test_the_rate_moves_times_only() -> None:
    """About as many a second as asked, in order; a run at another speed has the same chats."""
    load = SingleChats(400, (3, 5), (2, 4))
    fast, slow, at_once = load.asks(4.0), load.asks(1.0), load.asks(None)
    assert fast[-1].due == pytest.approx(100, rel=0.2)
    assert [4 * ask.due for ask in fast] == pytest.approx([ask.due for ask in slow])
    assert {ask.due for ask in at_once} == {0.0}
    assert [a.prompt for a in fast] == [a.prompt for a in at_once]
    assert [a.due for a in fast] == sorted(a.due for a in fast)


def test_arrivals_do_not_wait_for_answers() -> None:
    """Latency counts from when a request was due, queueing and the step under way included."""
    asks = [Ask(i, 0, due, (1, 2), 3) for i, due in enumerate((0.0, 0.5, 0.6, 20.0))]
    engine = Engine(most=1)
    answers = engine.answer(Arrivals(asks))
    assert [a.times[-1] for a in answers] == [3, 6, 9, 23]
    assert [a.latency for a in answers] == pytest.approx([3, 5.5, 8.4, 3])
    assert [a.first for a in answers] == pytest.approx([1, 3.5, 6.4, 1])
    assert engine.slept == pytest.approx(11)
    found = figures(answers)
    assert found["seconds"] == 23
    assert found["tok_s"] == pytest.approx(12 / 23)
    assert found["latency_p99_s"] == pytest.approx(8.4, rel=0.05)


def test_chats_that_return_bring_all_that_was_said() -> None:
    """Prompt, answer, question; every chat has its turn before any has the next."""
    load = TurnChats(chats=5, turns=3, first=10, question=4, answer=3, at_once=2)
    engine = Engine()
    answers = engine.answer(Turns(load))
    assert engine.busiest == 2
    order = itertools.product(range(3), range(5))
    assert [(a.ask.turn, a.ask.chat) for a in answers] == list(order)
    by_chat = {chat: [a for a in answers if a.ask.chat == chat] for chat in range(5)}
    for turns in by_chat.values():
        assert [len(a.ask.prompt) for a in turns] == [10, 17, 24]
        for before, after in itertools.pairwise(turns):
            assert after.ask.prompt[: len(before.ask.prompt) + 3] == (
                *before.ask.prompt,
                *before.tokens,
            )
    assert len({turns[0].ask.prompt for turns in by_chat.values()}) == 5
    lengths = [len(a.ask.prompt) + 3 for a in answers if a.ask.turn]
    assert load.working_set == pytest.approx(5 * sum(lengths) / len(lengths))
    assert load.longest == max(lengths)
    later = figures(answers, first_turn=1)
    assert len(later["ttfts_ms"]) == 10
    assert later["tok_s"] == figures(answers)["tok_s"]


def test_a_chat_has_one_turn_at_a_time() -> None:
    """Also where more may be under way than there are chats."""
    load = TurnChats(chats=2, turns=4, first=3, question=2, answer=3, at_once=9)
    engine = Engine(most=9)
    answers = engine.answer(Turns(load))
    assert engine.busiest == 2
    assert Counter(a.ask.chat for a in answers) == {0: 4, 1: 4}


def test_the_record_tells_first_work_from_work_done_again() -> None:
    """A preempted request that computes its tokens again; a prefix hit computes none."""
    record = TokenRecord()
    record.add("a", 100, 0, 64)
    record.add("a", 100, 64, 36)
    for token in range(100, 120):
        record.add("a", 100, token, 1)
    assert (record.prompt["a"], record.again) == (100, 0)
    record.add("a", 100, 32, 88)  # Preempted; one block was still cached.
    assert (record.prompt["a"], record.again) == (168, 88)
    record.add("a", 100, 120, 1)
    record.add("b", 50, 48, 2)
    record.add("b", 50, 50, 1)
    assert (record.prompt["b"], record.again) == (2, 88)


def test_the_record_agrees_with_a_set_of_tokens() -> None:
    """Random chunks, preemptions and hits."""
    rng = random.Random(4)
    for _ in range(200):
        record, done, again, of_prompt = TokenRecord(), set(), 0, 0
        prompt, place, first = rng.randint(1, 30), rng.randint(0, 10), None
        for _ in range(12):
            count = rng.randint(1, 8)
            record.add("r", prompt, place, count)
            first = place if first is None else first
            tokens = range(place, place + count)
            again += len(done & set(tokens))
            of_prompt += sum(token < prompt for token in tokens)
            done |= set(tokens)
            place += count
            if rng.random() < 0.3:
                place = rng.randint(first, place)
        assert (record.again, record.prompt["r"]) == (again, of_prompt)


def test_what_is_asked_has_a_direction() -> None:
    """More throughput, less latency; names of throughput ratios are as they were."""
    more, less = Question("pie", "stock", 1.3), Question("pie", "stock", 0.6, "ttft", less=True)
    assert (more.name, less.name) == ("pie / stock", "ttft, pie / stock")
    assert [more.reached(r) for r in (1.29, 1.3)] == [False, True]
    assert [less.reached(r) for r in (0.6, 0.61)] == [True, False]


def asked_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr("sys.argv", ["parking", *words])
    return parking.parse_arguments()


def test_the_chats_that_return_are_four_times_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size; a load that cannot be made says so."""
    for words, blocks in (((), 64), ((), 100), (("--turns", "5", "--chats", "60"), 75)):
        args = asked_of(monkeypatch, *words)
        load = parking_loads.turn_chats(args, blocks)
        device = blocks * args.block_size
        assert load.working_set == pytest.approx(4 * device, rel=0.01)
        assert load.at_once * load.longest < 0.8 * device  # What is under way fits without a pool.
    with pytest.raises(SystemExit, match="--chats 1000"):
        parking_loads.turn_chats(asked_of(monkeypatch, "--chats", "1000"), 64)


def test_fresh_chats_fit_the_device_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """No preemption in the one, many in the other."""
    args = asked_of(monkeypatch)
    fresh, heavy = (parking_loads.single_chats(name, args) for name in ("fresh", "preempted"))

    def blocks(ask: Ask) -> int:
        return -(-(len(ask.prompt) + ask.tokens) // args.block_size)

    at_once = parking_loads.at_once_without_pool(args, fresh)
    most = max(map(blocks, fresh.asks(None)))
    assert 1 < at_once * most < (1 - parking_loads.RING_FRACTION_MAX) * args.device_blocks
    assert sum(map(blocks, fresh.asks(None))) > 3 * args.device_blocks  # Idle prefixes go.
    assert sum(map(blocks, heavy.asks(None))) > 4 * args.device_blocks
    assert sum(map(blocks, heavy.asks(None))) < min(args.all_blocks, args.pool_blocks)


def test_all_sides_get_the_same_load_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for memory and pie; further settings of pie reach it as they are."""
    args = asked_of(monkeypatch, "--pie", 'parking="off"', "--pie", "pool_gib=2.5")
    shape = parking.kv_shape(args.model, args.block_size, args.dtype)
    chats = parking_loads.turn_chats(args, 64)
    stock, pie = (parking_loads.spec_of(args, shape, 64, chats, pie=pie) for pie in (False, True))
    assert stock["pie"] is None
    assert (pie["pie"]["parking"], pie["pie"]["pool_gib"]) == ("off", 2.5)
    assert {**stock, "pie": 0} == {**pie, "pie": 0}
    assert stock["llm"]["enable_prefix_caching"] is True
    assert stock["llm"]["max_model_len"] >= chats.longest
    assert isinstance(source_of(stock["load"]), Turns)
    single = parking_loads.single_chats("preempted", args)
    source = source_of(parking_loads.spec_of(args, shape, 32, single, 2.0)["load"])
    assert isinstance(source, Arrivals)
    assert source._left[-1].due > 0


def test_an_unknown_load_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The user sees which there are."""
    with pytest.raises(SystemExit):
        asked_of(monkeypatch, "--only", "fresh,fast")
    assert "fast" in capsys.readouterr().err


class FakeSide:
    """An engine process whose steps take a given time."""

    def __init__(self, seconds: float, turns: int) -> None:
        self.seconds, self.left = seconds, turns

    def turn(self, steps: int) -> dict[str, Any]:
        if not steps:
            return {"preemptions": 0, "recomputed_tokens": 0, "prefill_tokens": 7}
        self.left -= 1
        return {"seconds": self.seconds * steps, "tokens": 3 * steps, "left": self.left > 0}


def test_turns_end_with_the_first_engine_and_count_the_whole_time() -> None:
    """Both engines had as many turns."""
    engines: Any = {"stock_equal": FakeSide(1.0, 4), "pie": FakeSide(2.0, 6)}
    found = take_turns(engines, 5)
    assert {name: len(run["turns"]) for name, run in found.items()} == {"stock_equal": 4, "pie": 4}
    assert [run["tok_s"] for run in found.values()] == [3.0, 1.5]
    assert found["pie"]["prefill_tokens"] == 7


def run_of(tok_s: float, again: int) -> dict[str, float]:
    return {"tok_s": tok_s, "latency_p99_s": 60 / tok_s, "recomputed_tokens": again}


def test_the_report_says_what_was_missed(tmp_path: Any, capsys: Any) -> None:
    """A ratio in the wrong direction and a token recomputed are not as asked."""
    runs = {"stock_equal": [run_of(10, 500)] * 2, "pie": [run_of(12, 0), run_of(12, 3)]}
    part = Part("a load", parking_loads.QUESTIONS["preempted"], runs, none_again=("pie",))
    said = print_part(part)
    assert said["ratios"]["pie / stock_equal"]["reached"] is False
    assert said["ratios"]["latency_p99_s, pie / stock_equal"]["median"] == pytest.approx(10 / 12)
    assert said["ratios"]["latency_p99_s, pie / stock_equal"]["reached"] is False
    assert said["recomputed_tokens"] == {"pie": {"max": 3, "asked": 0, "reached": False}}
    assert "NOT as asked" in capsys.readouterr().out
    good = {"stock_equal": runs["stock_equal"], "pie": [run_of(20, 0)] * 2}
    said = print_part(Part("a load", part.questions, good, none_again=("pie",)))
    assert all(ratio["reached"] for ratio in said["ratios"].values())
    assert said["recomputed_tokens"]["pie"]["reached"]
    plot(tmp_path / "plot.png", "title", {"preempted": part})
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_watch_of_tokens_ends_with_its_block() -> None:
    """An engine that serves load after load is watched for each by itself."""
    update = object()
    scheduler = SimpleNamespace(update_from_output=update)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    states = SimpleNamespace(request_states={})
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core, output_processor=states))
    with watched_tokens(llm):
        assert scheduler.update_from_output is not update
    assert scheduler.update_from_output is update
