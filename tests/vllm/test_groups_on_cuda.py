"""Models with several groups of layers over the CUDA driver, with gates and in FULL graphs.

Layers without a gate name the pages that they touch, too, so that a copy which is not ordered with
these is found. The driver's calls go to a stand-in for libcuda; see tests/helpers/cuda_on_cpu.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cuda_on_cpu, graphs_on_cpu
from tests.helpers.engine import Engines, Setup
from tests.helpers.engine_load import check_diverse, tokens
from tests.helpers.model_runs import check_same, pie_setup, rounds, stock_setup
from tests.helpers.small_models import make

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

AT_ONCE = 10
"""Number of requests where steps run in graphs, each size of which is captured."""


def engines_of(folder: Path, **more: str) -> Engines:
    """Engines over the CUDA driver, which report in this folder."""
    return Engines(folder, {**cuda_on_cpu.environment(folder / "report"), **more})


def asked() -> list[dict[str, Any]]:
    """Requests that steps in graphs can serve."""
    (round_,) = rounds()
    return [{**round_, "requests": round_["requests"][:AT_ONCE]}]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with sliding windows."""
    return make("gemma3", tmp_path_factory.mktemp("windows") / "gemma3")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gemma3", "granite-hybrid"])
def test_tokens_are_stocks_and_no_access_is_unordered(tmp_path: Path, name: str) -> None:
    """Windows, and states."""
    model, engines = make(name, tmp_path / name), engines_of(tmp_path)
    try:
        (stock,) = engines.run(stock_setup(name, model), rounds(), "stock")
        setup = pie_setup(name, model, stock)
        (pie,) = engines.run(setup, rounds())
    finally:
        engines.close()
    check_same(pie, stock, setup)
    assert pie["cuda"]["batches"] > 100
    assert cuda_on_cpu.found_wrong(tmp_path / "report") == []


@pytest.mark.soak
def test_a_page_that_goes_to_another_group_too_early_is_found(
    tmp_path: Path, windows: Path
) -> None:
    """The test above can fail: plans that do not say so let copies and windows cross."""
    engines = engines_of(tmp_path)
    try:
        (stock,) = engines.run(stock_setup("gemma3", windows), rounds(), "stock")
        setup = replace(pie_setup("gemma3", windows, stock), lost_orders=True)
        (pie,) = engines.run(setup, rounds())
    finally:
        engines.close()
    assert any("unordered" in line for line in pie["cuda"]["violations"])


def with_graphs(windows: Path, stock: dict[str, Any]) -> Setup:
    """Settings with which few requests have to pool, in graphs of up to their number."""
    found = pie_setup("gemma3", windows, stock)
    limits = {"max_num_seqs": AT_ONCE}
    return replace(
        found, resident=found.resident - 20, full_graphs=True, other={**found.other, **limits}
    )


def test_full_graphs_hold_the_copies_of_the_layers_with_a_pool(
    tmp_path: Path, windows: Path
) -> None:
    """Stock's tokens, though most layers pass no gate; without the copies they differ."""
    engines = engines_of(tmp_path, **{graphs_on_cpu.SWITCH: "told"})
    try:
        (stock,) = engines.run(stock_setup("gemma3", windows), asked(), "stock")
        setup = with_graphs(windows, stock)
        (pie,) = engines.run(setup, asked())
        (blind,) = engines.run(replace(setup, debug=("skip_loads",)), asked())
    finally:
        engines.close()
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    assert pie["counters"]["graph_steps"] > 15
    assert pie["counters"]["pooled_peak"] > AT_ONCE
    assert tokens(blind) != tokens(stock)
    assert cuda_on_cpu.found_wrong(tmp_path / "report") == []
