"""Whatever is written where pie's settings belong is taken, or refused with a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs

from pie_vllm.config import BY_NAME, PieConfig
from pie_vllm.errors import ConfigError
from pie_vllm.vllm.opt_in import wants_pie

pytestmark = pytest.mark.vllm

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)

VALUES = [
    *(None, True, False, 0, -1, 1, 0.5, 3, 10**400, -(10**400), 1e308, 1e-308),
    *(float("nan"), float("inf"), -float("inf"), "", "auto", "off", "on", "lru", "1", "0x10", "１"),
    *("nan", "inf", "1e309", "1e400", b"1", [], [1], {}, {"a": 1}, (), ("poison",), object(), 1j),
]


def attempt(chosen: dict[str, Any]) -> tuple[str, PieConfig | None]:
    """The settings, or the text of the error."""
    try:
        return "", PieConfig.from_mapping(chosen)
    except ConfigError as error:
        return str(error), None


@pytest.mark.parametrize("key", list(BY_NAME))
def test_any_value_is_taken_or_refused_by_name(key: str) -> None:
    """No other error, and nothing taken that later overflows."""
    taken = 0
    for value in VALUES:
        refused, config = attempt({key: value})
        if config is None:
            assert key in refused or key.replace("_", "-") in refused
            continue
        taken += 1
        found = getattr(config, key)
        spelt = BY_NAME[key].values.spell(found)
        assert PieConfig.from_mapping({key: spelt}) == config
        if isinstance(found, float):
            assert 0 < found * 2**30 < 1e20 or key in ("pool_idle_seconds", "emulated_link_gbps")
    assert 0 < taken < len(VALUES)


@given(st.dictionaries(st.sampled_from(list(BY_NAME)), ANYTHING))
def test_any_settings_are_taken_or_refused(chosen: dict[str, Any]) -> None:
    """As above, whatever Hypothesis finds."""
    refused, config = attempt(chosen)
    assert config is not None or "must be" in refused


@pytest.mark.parametrize("size", [1e308, 10**400, "1e308", 2.0**31])
def test_a_pool_beyond_all_machines_is_refused(model: Path, size: Any) -> None:
    """It was an OverflowError."""
    config = {"block_manager": "pie", "pie": {"pool_gib": size}}
    args = EngineArgs(model=str(model), additional_config=config)
    with pytest.raises(ConfigError, match=r"--pie-pool-gib is .*must be a number of GiB"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"pie": {}}, "without --block-manager pie"),
        ({"pie": None}, "without --block-manager pie"),
        ({"block_manager": "default", "pie": {}}, "without --block-manager pie"),
        ({"block-manager": "pie"}, r"'block-manager'.*\"block_manager\""),
        ({"blockmanager": "pie"}, "'blockmanager'"),
        ({"BlockManager": "pie", "pie": {}}, "'BlockManager'"),
        ({"block_manger": "pie"}, "'block_manger'"),
        ({"pie_pool_gib": 1}, r"'pie_pool_gib'.*\"pie\": {\"pool_gib\": ...}"),
        ({"pie-pool-gib": 1}, "'pie-pool-gib'"),
        ({"pie_parkin": "off"}, "'pie_parkin'.*parking"),
        ({"Pie": {"pool_gib": 1}}, "'Pie'"),
        ({"block_manager": "pie", "pool_gib": 1}, "'pool_gib'"),
        ({"block_manager": "Pie"}, "valid block managers"),
        ({"block_manager": None}, "valid block managers"),
        ({"block_manager": ["pie"]}, "valid block managers"),
        ({"block_manager": True}, "valid block managers"),
    ],
)
def test_what_was_meant_for_pie_is_not_silently_without(
    model: Path, config: dict[str, Any], word: str
) -> None:
    """Misspelt keys and settings without a block manager."""
    args = EngineArgs(model=str(model), enforce_eager=True, additional_config=config)
    with pytest.raises(ConfigError, match=word):
        args.create_engine_config()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pieces": 3},
        {"pool": "pie"},
        {"debug": True},
        {"block_managers": ["a"]},
        {"pie_chart": 1},
        {"block_manager": False},
        {3: 4},
    ],
)
def test_keys_of_others_are_left_alone(config: Any) -> None:
    """Who never asked for pie is not asked to spell."""
    assert wants_pie(config) is False
