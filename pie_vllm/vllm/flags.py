"""The command line flags, and how they get into ``additional_config``.

A flag is also a key of a YAML file that ``--config`` names. Flags come from ``config.SETTINGS``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

from pie_vllm.config import BLOCK_MANAGER_KEY, BLOCK_MANAGERS, SETTINGS, SETTINGS_KEY, Setting
from pie_vllm.errors import ConfigError

logger = logging.getLogger("vllm.pie")


def add_flags(parser: Any) -> None:
    """Add ``--block-manager`` and the flags of the settings to vLLM's parser."""
    group = parser.add_argument_group(
        title="BlockManager",
        description="Pool CPU memory into the KV cache (pie-vllm). Further settings are keys of "
        f"additional_config['{SETTINGS_KEY}']; docs/configuration.md lists them.",
    )
    group.add_argument(
        "--block-manager",
        choices=BLOCK_MANAGERS,
        default=None,
        action=_Store,
        help="Block manager of the KV cache. 'pie' serves more and longer requests than the "
        "device's KV memory holds, with KV blocks in CPU memory that are copied in a layer "
        "ahead. 'default' is vLLM's own.",
    )
    _add_off(group, "--block-manager", "block_manager", lambda _: "default")
    for setting in SETTINGS:
        flag = setting.flag or setting.old_flag
        if flag is None:
            continue
        if setting.values.metavar is None:
            _add_switch(group, flag, setting)
        else:
            _add_value(group, flag, setting)


def merge(namespace: argparse.Namespace) -> None:
    """Write the flags that were given into ``namespace.additional_config``."""
    before = getattr(namespace, "additional_config", None)
    config = dict(before or {})
    manager = getattr(namespace, "block_manager", None)
    if manager == "default":
        config.pop(BLOCK_MANAGER_KEY, None)  # vLLM hashes what is there for its compile cache.
    elif manager is not None:
        config[BLOCK_MANAGER_KEY] = manager
    given = {s.name: value for s in SETTINGS if (value := _given(namespace, s)) is not None}
    if given:
        config[SETTINGS_KEY] = {**config.get(SETTINGS_KEY, {}), **given}
    if config != (before or {}):
        namespace.additional_config = config


def replace_old_flags(namespace: argparse.Namespace) -> None:
    """Log the keys that do the same as the old flags given, which are forgotten for it.

    The flags have to be merged before. Who gets the namespace next finds the keys only, and so
    the note is logged once.
    """
    given = [
        (s, value) for s in SETTINGS if s.old_flag and (value := _given(namespace, s)) is not None
    ]
    if not given:
        return
    for setting, _ in given:
        setattr(namespace, _dest(setting.name), None)
    logger.warning(
        "Pie: %s: deprecated, and gone in the next release. Use --additional-config '%s' "
        "(additional-config in a YAML file) in place of it.",
        ", ".join(str(setting.old_flag) for setting, _ in given),
        json.dumps({SETTINGS_KEY: {setting.name: value for setting, value in given}}),
    )


def _given(namespace: argparse.Namespace, setting: Setting) -> Any:
    """What the flag of a setting was given; None if it was not."""
    return getattr(namespace, _dest(setting.name), None)


def _dest(name: str) -> str:
    return f"pie_{name}"


class _Store(argparse.Action):
    """Stores a flag in ``additional_config`` at once.

    API server processes get the parsed namespace and read it before they load
    plugins (entrypoints/launchers/api_server/entry.py:53), so the setting must
    be where vLLM itself looks.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, values)
        merge(namespace)


class _Switch(argparse.BooleanOptionalAction):
    """As ``_Store``, for a flag that has a ``--no-`` form."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        merge(namespace)


class _Off(argparse.Action):
    """A ``--no-`` form, which vLLM gives for ``off``, ``no`` and ``false`` in a YAML file.

    vLLM drops such a line where there is no flag of that form (utils/argparse_utils.py:620), and
    with it what the user asked for. ``type`` says what false means for the setting, or refuses it.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        means: Any = self.type
        try:
            setattr(namespace, self.dest, means(False))
        except ConfigError as error:
            parser.error(f"{error} (A YAML file's off, no and false are false.)")
        merge(namespace)


def _add_value(group: Any, flag: str, setting: Setting) -> None:
    """Add a flag that takes a value."""

    def parse(value: object) -> Any:
        # The word for None is kept, so that the flag overrides what it is merged with.
        return setting.values.spell(setting.parse(value, flag))

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(
        flag,
        dest=_dest(setting.name),
        type=convert,
        default=None,
        metavar=setting.values.metavar,
        action=_Store,
        help=_help(setting),
    )
    _add_off(group, flag, _dest(setting.name), parse)


def _add_switch(group: Any, flag: str, setting: Setting) -> None:
    """Add a flag that is true by itself, and false in its ``--no-`` form."""
    group.add_argument(
        flag, dest=_dest(setting.name), default=None, action=_Switch, help=_help(setting)
    )
    _add_off(group, flag, _dest(setting.name), lambda _: False, "_")


def _add_off(
    group: Any, flag: str, dest: str, means: Callable[[object], Any], spellings: str = "-_"
) -> None:
    """Add the hidden form of a flag that says false, as a YAML file may spell it."""
    name = flag.removeprefix("--")
    group.add_argument(
        *(f"--no-{name.replace('-', dash)}" for dash in spellings),
        dest=dest,
        type=means,
        nargs=0,
        default=None,
        action=_Off,
        help=argparse.SUPPRESS,
    )


def _help(setting: Setting) -> str:
    """The text of ``--help``, in which old flags are not listed."""
    if setting.flag is None:
        return argparse.SUPPRESS
    return f"{setting.help} Default: {setting.default_text}.".replace("%", "%%")
