"""Families of models: pie's greedy tokens are stock's, or pie refuses the family by name.

Which of the two a family is to do stands in tests/helpers/small_models.py. `make models` runs all
of them in processes of their own, and those that stock vLLM cannot run, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import EngineError, Engines, Setup
from tests.helpers.engine_load import ngram, tokens
from tests.helpers.model_runs import (
    check_came_back,
    check_found,
    check_next_turns,
    check_preempted,
    check_returning,
    check_same,
    long_rounds,
    next_turns,
    parking,
    pie_setup,
    returning_rounds,
    rounds,
    stock_setup,
    too_small,
    unknown_setup,
    with_prefix_caching,
)
from tests.helpers.small_models import FAMILIES, make
from tests.helpers.two_ranks import CORES

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RUN = [name for name, family in FAMILIES.items() if not family.not_in_stock]
POOLED = [name for name in RUN if not FAMILIES[name].refused]
KINDS = ("gemma3", "llama4", "granite-hybrid")
"""Windows, chunks, states; the others are for ``make models`` and ``make soak``."""

REFUSED = [name for name in RUN if FAMILIES[name].refused]


def later(name: str) -> Any:
    """A family for ``make soak``."""
    return pytest.param(name, marks=pytest.mark.soak)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the families' models."""
    return tmp_path_factory.mktemp("small-models")


@pytest.mark.parametrize("name", [later(n) if n not in KINDS else n for n in POOLED])
def test_tokens_are_stocks(engines: Engines, folder: Path, name: str) -> None:
    """With most full-attention blocks of 32 requests in the pool."""
    model = make(name, folder / name)
    (stock,) = engines.run(stock_setup(name, model), rounds(), "stock")
    setup = pie_setup(name, model, stock)
    (pie,) = engines.run(setup, rounds())
    check_same(pie, stock, setup)


@pytest.mark.parametrize("name", ["gemma3"])
def test_tokens_come_from_the_pool(engines: Engines, folder: Path, name: str) -> None:
    """Without loads they are others: equal tokens mean that pooled KV was read."""
    model = make(name, folder / name)
    (stock,) = engines.run(stock_setup(name, model), rounds(), "stock")
    setup = replace(pie_setup(name, model, stock), debug=("skip_loads",))
    (blind,) = engines.run(setup, rounds())
    assert tokens(blind) != tokens(stock)


@pytest.mark.parametrize("name", ["gemma3", later("llama4")])
def test_prompts_that_come_back(engines: Engines, folder: Path, name: str) -> None:
    """With prefix caching, requests that begin with earlier prompts have stock's tokens, too."""
    model = make(name, folder / name)
    asked = with_prefix_caching(stock_setup(name, model))
    stock = engines.run(asked, returning_rounds(), "stock")
    setup = with_prefix_caching(pie_setup(name, model, stock[1]))
    check_returning(engines.run(setup, returning_rounds()), stock)


@pytest.mark.parametrize("name", ["gemma3"])
def test_preempted(engines: Engines, folder: Path, name: str) -> None:
    """With too little memory for all, requests are preempted and have stock's tokens."""
    model = make(name, folder / name)
    (stock,) = engines.run(stock_setup(name, model), rounds(), "stock")
    (pie,) = engines.run(too_small(pie_setup(name, model, stock)), rounds())
    check_preempted(pie, stock)


def kept_setups(
    engines: Engines, folder: Path, name: str, *, caching: bool = False
) -> tuple[Setup, dict[str, Any]]:
    """Settings with which requests are preempted and parked, and stock's record with room."""
    model = make(name, folder / name)
    asked, chunk = stock_setup(name, model), FAMILIES[name].cached_chunk
    if caching:
        asked = with_prefix_caching(asked, chunk)
    (stock,) = engines.run(asked, long_rounds(), "stock")
    setup = parking(pie_setup(name, model, stock))
    return with_prefix_caching(setup, chunk) if caching else setup, stock


KEPT = ("gemma3", "nemotron-h", later("gpt-oss"), later("llama4"), later("falcon-h1"))
"""Windows, states, chunks; of LFM2 stock's tokens change when stock preempts."""


@pytest.mark.parametrize("name", KEPT)
def test_what_preempted_requests_had_comes_back(engines: Engines, folder: Path, name: str) -> None:
    """Windows and states of three blocks on: nothing is computed again, and tokens are stock's."""
    setup, stock = kept_setups(engines, folder, name)
    (pie,) = engines.run(setup, long_rounds())
    check_came_back(pie, stock, setup.block_size)


CACHED = (
    "gemma3",
    "nemotron-h",
    later("gpt-oss"),
    later("llama4"),
    later("falcon-h1"),
    later("qwen3-next"),
)
"""As ``KEPT``, and gated delta nets."""


@pytest.mark.parametrize("name", CACHED)
def test_it_does_with_prefix_caching(engines: Engines, folder: Path, name: str) -> None:
    """By default vLLM keeps of windows and states what lies at the end of the prompt only.

    A state moves from block to block then, and comes back after just so many tokens, wherever in a
    block: none is computed again.
    """
    setup, stock = kept_setups(engines, folder, name, caching=True)
    (pie,) = engines.run(setup, long_rounds())
    check_came_back(pie, stock, setup.block_size)
    assert any(count % setup.block_size for count in pie["computed"]), "all were at a block's end"


def turns_setups(
    engines: Engines, folder: Path, name: str
) -> tuple[Setup, list[dict[str, Any]], list[dict[str, Any]]]:
    """Settings with which chats are parked whole, rounds of two turns, and stock's records."""
    model = make(name, folder / name)
    asked = with_prefix_caching(stock_setup(name, model))
    (first,) = engines.run(asked, rounds(), "stock")
    turns = next_turns(first)
    stock = engines.run(asked, turns, "stock")
    setup = with_prefix_caching(parking(pie_setup(name, model, stock[3])))
    return replace(setup, rows=16 * setup.pooled), turns, stock


@pytest.mark.parametrize("name", ["gemma3", later("gpt-oss"), later("llama4")])
def test_next_turns_go_on_where_the_first_ended(engines: Engines, folder: Path, name: str) -> None:
    """Windows and full blocks of ended requests come back together, to the last token."""
    setup, turns, stock = turns_setups(engines, folder, name)
    check_next_turns(engines.run(setup, turns), stock)


@pytest.mark.soak
@pytest.mark.parametrize("lost", [False, True])
def test_next_turns_go_on_with_states(engines: Engines, folder: Path, *, lost: bool) -> None:
    """What is found are all tokens of the first turn; without their states answers are others.

    Stock's own tokens change with the chunks that a prompt is computed in (28 of 32 answers): only
    the first token of an answer tells. The tags of ``test_groups`` tell of each page.
    """
    setup, turns, stock = turns_setups(engines, folder, "qwen3-next")
    pie = engines.run(replace(setup, lost_beside=lost), turns)
    check_found(pie)
    pairs = zip(tokens(pie[3]), tokens(stock[3]), strict=True)
    equal = sum(mine[0][0] == right[0][0] for mine, right in pairs)
    assert equal < 8 if lost else equal > 20, f"{equal} first tokens are stock's"


def test_windows_of_ended_requests_that_do_not_come_back_show(
    engines: Engines, folder: Path
) -> None:
    """Negative control: full blocks do, and tokens are others."""
    setup, turns, stock = turns_setups(engines, folder, "gemma3")
    pie = engines.run(replace(setup, lost_beside=True), turns)
    assert [tokens(record) for record in pie[:3]] == [tokens(record) for record in stock[:3]]
    wrong = sum(p != s for p, s in zip(tokens(pie[3]), tokens(stock[3]), strict=True))
    assert wrong > len(tokens(stock[3])) // 2


@pytest.mark.parametrize(
    ("name", "caching"), [("gemma3", False), ("nemotron-h", False), ("nemotron-h", True)]
)
def test_windows_and_states_that_do_not_come_back_show(
    engines: Engines, folder: Path, name: str, caching: bool
) -> None:
    """Negative control: full blocks do, and tokens are others."""
    setup, stock = kept_setups(engines, folder, name, caching=caching)
    (pie,) = engines.run(replace(setup, lost_beside=True), long_rounds())
    assert pie["preempted"]
    assert pie["recomputed_tokens"] == 0
    assert tokens(pie) != tokens(stock)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "granite-hybrid"])
def test_compiled(engines: Engines, folder: Path, name: str) -> None:
    """Gates on some of the layers hold under torch.compile."""
    model = make(name, folder / name)
    eager = {"enforce_eager": False}
    asked = stock_setup(name, model)
    (stock,) = engines.run(replace(asked, other=asked.other | eager), rounds(), "stock")
    setup = pie_setup(name, model, stock)
    setup = replace(setup, other=setup.other | eager)
    (pie,) = engines.run(setup, rounds())
    check_same(pie, stock, setup)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_ngrams_beside_windows(engines: Engines, folder: Path, name: str) -> None:
    """With speculation on both sides; some drafts are accepted, others are not."""
    model = make(name, folder / name)
    asked = stock_setup(name, model)
    (stock,) = engines.run(replace(asked, other=asked.other | ngram(3)), rounds(), "stock")
    setup = pie_setup(name, model, stock)
    (pie,) = engines.run(replace(setup, other=setup.other | ngram(3)), rounds())
    check_same(pie, stock, setup)
    assert pie["drafted"] > pie["accepted"]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gemma3"])
def test_two_ranks(folder: Path, tmp_path: Path, name: str) -> None:
    """Each pools the full attention of its own heads."""
    model = make(name, folder / name)
    engines = Engines(tmp_path, CORES)
    (stock,) = engines.run(replace(stock_setup(name, model), ranks=2), rounds(), "stock")
    setup = replace(pie_setup(name, model, stock), ranks=2)
    (pie,) = engines.run(setup, rounds())
    engines.close()
    check_same(pie, stock, setup)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(engines: Engines, folder: Path, name: str) -> None:
    """The error says what, and the way out."""
    model = make(name, folder / name)
    with pytest.raises(EngineError, match=f"UnsupportedError.*{FAMILIES[name].refused}") as caught:
        engines.run(unknown_setup(name, model), rounds())
    assert "--block-manager default" in str(caught.value)
