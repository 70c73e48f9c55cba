"""Models with multi-head latent attention: pooled latents change no token.

vLLM's CPU_MLA has one block size, 16, and runs float32; its prompts are not split and nothing is
kept between requests unless ``mla_on_cpu`` says so. Of CUDA's MLA backends nothing runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import cuda_on_cpu, mla_on_cpu, other_vllm, v2_on_cpu
from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import check_diverse, check_mostly_pooled, check_traffic, tokens
from tests.helpers.mla_model import BLOCK_SIZE, LAYERS, MlaSetup, mla_model, prompts
from tests.vllm import test_exact

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWER = 28
CPU_MLA = {
    "attention_backend": "CPU_MLA",
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "max_num_scheduled_tokens": 512,
}
"""Also where the CPU has AMX. For CPU_MLA vLLM raises ``max_num_batched_tokens`` to 2048, and the
prompts of one step must be resident together."""

Record = dict[str, Any]


@pytest.fixture(scope="module")
def mla(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model."""
    return mla_model(model, tmp_path_factory.mktemp("model") / "mla")


@pytest.fixture(scope="module")
def with_context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines that split prompts and keep KV of MLA models, as vLLM does on CUDA and AMX."""
    shared = Engines(tmp_path_factory.mktemp("context"), mla_on_cpu.ENVIRONMENT)
    yield shared
    shared.close()


def setup_of(model: Path, resident: int, pooled: int, **changes: Any) -> MlaSetup:
    """Settings of an engine with float32 on CPU_MLA."""
    other = {**CPU_MLA, **changes.pop("other", {})}
    found = MlaSetup(
        model, LAYERS, resident, pooled, block_size=BLOCK_SIZE, dtype="float32", other=other
    )
    return replace(found, **changes)


def load(count: int, least: int, spread: int, answer: int = ANSWER) -> list[Record]:
    """Greedy requests with the top five logprobs of each token."""
    asked = prompts(count, least, spread)
    return [round_([request(prompt, max_tokens=answer, logprobs=5) for prompt in asked])]


def check(engines: Engines, setup: Setup) -> None:
    """Assert that pie and stock agree on everything, and that pie did pool."""
    pie = test_exact.check(engines, setup, load(32, 60, 80))
    assert pie["counters"]["page_bytes"] == setup.page


@pytest.mark.parametrize(("dtype", "slots"), [("float32", 2), ("bfloat16", 3)])
def test_tokens_and_logprobs_are_stocks(
    engines: Engines, mla: Path, dtype: str, slots: int
) -> None:
    """Type of the latents and number of ring slots change no token and no logprob."""
    check(engines, setup_of(mla, 100, 200, dtype=dtype, slots=slots))


@pytest.mark.soak
def test_compiled(engines: Engines, mla: Path) -> None:
    """Gates hold under torch.compile: both operations are outside of the compiled pieces."""
    check(engines, setup_of(mla, 100, 200, other={"enforce_eager": False}))


def test_preemption(engines: Engines, mla: Path) -> None:
    """Requests that are preempted and computed again as a whole, as stock does with both tiers.

    Without prefix caching, which vLLM turns off for CPU_MLA, the schedule is stock's.
    """
    setup = setup_of(mla, 80, 90)
    (pie,), (stock,) = engines.both(setup, load(32, 60, 80))
    assert pie["preempted"]
    assert pie["schedule"] == stock["schedule"]
    assert pie["answers"] == stock["answers"]
    check_diverse(stock)
    check_mostly_pooled(pie)
    check_traffic(pie, setup.page * setup.layers)


@pytest.fixture(scope="module")
def ample(mla: Path) -> MlaSetup:
    """What stock runs with: memory for all, whole prompts, nothing cached."""
    return setup_of(mla, 1200, 0, other={"max_model_len": 512, "enable_prefix_caching": False})


@pytest.fixture(scope="module")
def cached(mla: Path) -> MlaSetup:
    """Few residents, so that prompts are split and read pooled context, and a prefix cache."""
    other = {"max_model_len": 512, "enable_prefix_caching": True, "max_num_scheduled_tokens": 128}
    return setup_of(mla, 70, 170, rows=500, other=other)


def test_prompts_over_pooled_context(with_context: Engines, cached: MlaSetup) -> None:
    """Prompts in small chunks, each of which reads the latents of those before it: bit for bit."""
    setup = replace(cached, other={**cached.other, "enable_prefix_caching": False})
    (pie,), (stock,) = with_context.both(setup, load(12, 200, 100, answer=48))
    assert pie["schedule"] == stock["schedule"]
    assert pie["answers"] == stock["answers"]
    check_diverse(stock)
    check_mostly_pooled(pie)
    check_traffic(pie, setup.page * setup.layers)
    chunks = [number for step in pie["schedule"] for number, count in step if count > 1]
    assert len(chunks) > 2 * len(set(chunks)), "prompts were not split"


def test_prefix_cache_preemption_and_second_turn(
    with_context: Engines, ample: MlaSetup, cached: MlaSetup
) -> None:
    """A shared beginning, preempted requests that come back from the pool, and a next question."""
    (shared,) = prompts(1, 96, 0, seed=5)
    first = [shared + prompt for prompt in prompts(32, 60, 60)]
    rounds = [round_([request(prompt, max_tokens=48) for prompt in first])]
    (pie,), (stock,) = with_context.both(cached, rounds, ample)
    check_diverse(stock)
    check_traffic(pie, cached.page * cached.layers)
    assert pie["preempted"]
    assert tokens(pie) == tokens(stock)

    answers = [answer for (answer,) in tokens(stock)]
    second = [
        [*prompt, *answer, *question]
        for prompt, answer, question in zip(first, answers, prompts(32, 20, 9, seed=8), strict=True)
    ]
    rounds = [round_([request(prompt, max_tokens=48) for prompt in second])]
    (pie,), (stock,) = with_context.both(cached, rounds, ample)
    assert tokens(pie) == tokens(stock)
    assert pie["hits"]["parked"] > 0
    assert min(answer["cached_tokens"] for answer in pie["answers"]) > 0


@pytest.mark.parametrize(
    "broken",
    [("skip_loads",), ("skip_stores",), ("poison", "skip_loads")],
    ids="-".join,
)
def test_broken_copies_show(with_context: Engines, cached: MlaSetup, broken: Any) -> None:
    """In decodes and in prompts' context alike, equal tokens mean that the copies were made."""
    setup = replace(cached, other={**cached.other, "enable_prefix_caching": False})
    rounds = load(12, 200, 100, answer=48)
    (right,) = with_context.run(setup, rounds, "stock")
    (sound,) = with_context.run(replace(setup, debug=("poison",)), rounds)
    (pie,) = with_context.run(replace(setup, debug=broken), rounds)
    assert tokens(sound) == tokens(right)
    wrong = [a != b for a, b in zip(tokens(pie), tokens(right), strict=True)]
    assert sum(wrong) > len(wrong) // 2


def test_a_write_past_its_gate_raises(engines: Engines, mla: Path) -> None:
    """The first step that stores says which layer wrote without its gate."""
    wanted = (
        rf"GateError: step \d+ passed {LAYERS} gates of {LAYERS}; without the gate of their KV "
        "write: layers 2"
    )
    with pytest.raises(EngineError, match=wanted):
        engines.run(setup_of(mla, 100, 200, fused_write=2), load(32, 60, 80))


def test_skipped_gate_raises(engines: Engines, mla: Path) -> None:
    """A layer that ran without its gate fails the step."""
    with pytest.raises(EngineError, match="GateError"):
        engines.run(setup_of(mla, 100, 200, debug=("skip_gate",)), load(32, 60, 80))


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the CPU has no AMX")
def test_amx(engines: Engines, mla: Path) -> None:
    """The backend that vLLM takes where it can: bfloat16, blocks of 32, split prompts."""
    other = {"attention_backend": "AMX_MLA"}
    check(engines, setup_of(mla, 48, 110, dtype="bfloat16", block_size=32, other=other))


@pytest.mark.soak
def test_two_ranks(engines: Engines, mla: Path) -> None:
    """Both have the same latents, each in its own pool; without loads the tokens are others."""
    rounds = load(12, 60, 80)
    setup = setup_of(mla, 60, 100, ranks=2)
    (pie,) = engines.run(setup, rounds)
    (broken,) = engines.run(replace(setup, debug=("skip_loads",)), rounds)
    (stock,) = engines.run(setup, rounds, "stock")
    assert pie["schedule"] == stock["schedule"]
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    assert pie["counters"]["rows"] == setup.pooled, "each rank takes its share of --pie-pool-gib"
    assert tokens(pie) == tokens(stock)
    assert tokens(broken) != tokens(stock)


@pytest.mark.soak
@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("release", ["0.32", pytest.param("0.33", marks=other_vllm.needed)])
def test_runners_and_releases(mla: Path, runner: str, release: str, tmp_path: Path) -> None:
    """V1 and V2 runner of both releases; V2 has two steps in flight, over the CUDA driver."""
    environment = dict(mla_on_cpu.ENVIRONMENT)
    if release == "0.33":
        environment |= other_vllm.environment(tmp_path / "cache")
    if runner == "V2":
        environment |= {**v2_on_cpu.ENVIRONMENT, v2_on_cpu.ASYNC: "1"}
        environment |= cuda_on_cpu.environment(tmp_path / "report")
    engines = Engines(tmp_path, environment)
    setup = setup_of(mla, 40, 100, other={"max_num_scheduled_tokens": 64})
    rounds = [round_([request(prompt, max_tokens=24) for prompt in prompts(10, 60, 60)])]
    try:
        (pie,), (stock,) = engines.both(setup, rounds)
    finally:
        engines.close()
    assert cuda_on_cpu.found_wrong(tmp_path / "report") == []
    for record in (pie, stock):
        assert record["vllm"].startswith(release)
        assert record["v2_runner"] == (runner == "V2")
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
