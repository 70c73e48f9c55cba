"""One table of settings: what is typed, said and documented elsewhere agrees with it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest

import pie_vllm
from docs import settings_table
from pie_vllm.config import BY_NAME, SETTINGS, PieConfig, Setting
from pie_vllm.errors import ConfigError
from pie_vllm.policy.pool.eviction import POLICIES
from tests.helpers.model import REPOSITORY


def types_of(hint: object) -> tuple[type, ...]:
    """The types of a field, without their parameters."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)


def test_the_typed_fields_are_the_rows_of_the_table() -> None:
    """Names, order and defaults; a field may be None exactly where its setting may."""
    assert [field.name for field in fields(PieConfig)] == list(BY_NAME)
    assert len(BY_NAME) == len(SETTINGS)
    hints = get_type_hints(PieConfig)
    for setting in SETTINGS:
        assert getattr(PieConfig(), setting.name) == setting.default
        assert isinstance(setting.default, types_of(hints[setting.name])), setting.name
        may_be_none = type(None) in types_of(hints[setting.name])
        assert may_be_none == bool(setting.values.none), setting.name


def test_the_keywords_of_engine_args_are_the_rows_of_the_table() -> None:
    """With defaults as users write them, which may be given."""
    shown = inspect.signature(pie_vllm.engine_args).parameters
    assert list(shown) == list(BY_NAME)
    defaults = {name: parameter.default for name, parameter in shown.items()}
    made = pie_vllm.engine_args(**defaults)["additional_config"]
    assert PieConfig.from_mapping(made["pie"]) == PieConfig()
    assert pie_vllm.engine_args(parking=None)["additional_config"]["pie"] == {}


def test_the_policies_to_choose_from_are_those_there_are() -> None:
    """The table names them, and the pool makes them."""
    for name in POLICIES:
        assert BY_NAME["parking"].parse(name) == name
    listed = re.findall(r"\w+", str(BY_NAME["parking"].values.metavar))
    assert sorted(listed) == sorted([*POLICIES, "off"])


def test_an_old_flag_belongs_to_a_setting_that_has_no_other() -> None:
    """Two flags of one setting would hide which one counts."""
    assert not [s.name for s in SETTINGS if s.flag and s.old_flag]
    flags = [s.flag or s.old_flag for s in SETTINGS if s.flag or s.old_flag]
    assert len(set(flags)) == len(flags)


def test_a_removed_value_says_why_and_what_to_use() -> None:
    """By whatever name it was given; other values are as before."""
    setting = replace(BY_NAME["parking"], removed={"mru": "it was slow. Use 'lru'."})
    with pytest.raises(ConfigError, match=r"--pie-parking is 'mru', which is gone: it was slow"):
        setting.parse("mru")
    with pytest.raises(ConfigError, match=r"^the file is 'mru', which is gone: .* Use 'lru'\.$"):
        setting.parse("mru", "the file")
    assert setting.parse("lru") == "lru"
    with pytest.raises(ConfigError, match="it must be 'lru' or 'off'"):
        setting.parse("fifo")


def names_in(text: str) -> set[str]:
    """Flags and keys of pie that a text names."""
    flags = re.findall(r"--(?:no-)?(pie-[a-z]+(?:-[a-z]+)*)", text)
    return {f"--{flag}" for flag in flags} | set(re.findall(r'\["pie"\]\["(\w+)"\]', text))


def valid_names(settings: tuple[Setting, ...]) -> set[str]:
    return {s.flag for s in settings if s.flag} | {s.name for s in settings}


def test_no_text_of_the_package_names_a_flag_or_key_that_is_not_there() -> None:
    """Errors and warnings tell users to change settings; old flags are named by the table only."""
    package = REPOSITORY / "pie_vllm"
    texts = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    found = {path: names_in(text) for path, text in texts.items() if path.name != "config.py"}
    assert sum(len(names) for names in found.values()) > 5
    for path, names in found.items():
        assert not names - valid_names(SETTINGS), path


def test_the_page_of_the_settings_is_up_to_date() -> None:
    """`python -m docs.settings_table` writes it."""
    text = settings_table.PAGE.read_text()
    assert text == settings_table.page(text)
    for setting in SETTINGS:
        assert f"| `{setting.name}` |" in text
    with pytest.raises(ValueError, match="lost its markers"):
        settings_table.page(text.replace(settings_table.END, ""))
