"""Command line and Python settings reach vLLM's configuration, everywhere they are parsed."""

from __future__ import annotations

import argparse
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

import pie_vllm
from pie_vllm.config import SETTINGS, PieConfig
from pie_vllm.vllm import flags, settings
from tests.helpers.model import model_path

pytestmark = pytest.mark.vllm

PIE = ["--block-manager", "pie", "--pie-pool-gib", "0.5"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """What `vllm serve` makes of its arguments."""
    parser = make_arg_parser(FlexibleArgumentParser())
    namespace: argparse.Namespace = parser.parse_args(["--model", str(model_path()), *arguments])
    return namespace


def settings_of(arguments: list[str]) -> Any:
    """`additional_config` of the engine arguments."""
    return AsyncEngineArgs.from_cli_args(parse(arguments)).additional_config


@pytest.mark.parametrize(
    "arguments",
    [
        ["--block-manager", "pie", "--pie-pool-gib", "0.5"],
        ["--block-manager=pie", "--pie-pool-gib=0.5"],
        ["--block_manager", "pie", "--pie_pool_gib", "0.5"],
        ["--pie-pool-gib", "0.5", "--block-manager", "pie"],
    ],
)
def test_flags_arrive_in_any_form(arguments: list[str]) -> None:
    """Hyphens, underscores, equals signs and order make no difference."""
    found = settings_of(arguments)
    assert found == {"block_manager": "pie", "pie": {"pool_gib": 0.5}}


def test_all_flags_arrive() -> None:
    """Every flag has its key, and `auto` is a value."""
    given = {"pool_gib": "auto", "target_slowdown": 0.05, "parking": "lru", "full_graphs": True}
    assert set(given) == {setting.name for setting in SETTINGS if setting.flag}
    more = ["--pie-pool-gib", "auto", "--pie-target-slowdown", "0.05", "--pie-parking", "lru"]
    assert settings_of(["--block-manager", "pie", *more, "--pie-full-graphs"])["pie"] == given
    assert PieConfig.from_mapping(given) == PieConfig(None, 0.05, "lru", True)
    off = settings_of([*PIE, "--pie-target-slowdown", "off", "--pie-parking", "off"])["pie"]
    assert off == {"pool_gib": 0.5, "target_slowdown": "off", "parking": "off"}
    assert PieConfig.from_mapping(off) == PieConfig(0.5, None, None)


def test_old_flags_do_what_their_keys_do_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the command line and in a file; the note's JSON can be pasted, and does the same."""
    notes: list[str] = []
    monkeypatch.setattr(flags.logger, "warning", lambda text, *of: notes.append(text % of))
    old = ["--pie-ring-slots", "2", "--pie-ring-fraction", "0.2", "--pie-link-gbps", "auto"]
    keys = {"ring_slots": 2, "ring_fraction": 0.2, "link_gbps": "auto"}
    namespace = parse([*PIE, *old])
    for _ in range(2):  # As API server processes do once more with the same namespace.
        found = AsyncEngineArgs.from_cli_args(namespace).additional_config
        assert found == {"block_manager": "pie", "pie": {"pool_gib": 0.5, **keys}}
    assert len(notes) == 1
    for setting in SETTINGS:
        assert (str(setting.old_flag) in notes[0]) == (setting.old_flag is not None)
    pasted = re.findall(r"--additional-config '(.*)'", notes[0])
    assert settings_of([*PIE, "--additional-config", *pasted]) == found
    assert len(notes) == 1
    lines = "block-manager: pie\npie-ring-slots: 3"
    assert from_yaml(tmp_path, lines)["pie"] == {"ring_slots": 3}
    assert '{"pie": {"ring_slots": 3}}' in notes[1]


def test_the_command_line_takes_single_keys() -> None:
    """vLLM's own short form, beside pie's flags."""
    found = settings_of([*PIE, "--additional-config.pie.ring_slots", "2"])
    assert found["pie"] == {"pool_gib": 0.5, "ring_slots": 2}


def test_a_switch_has_two_forms(tmp_path: Path) -> None:
    """As vLLM's own; the last one counts, and YAML files have both."""
    assert settings_of([*PIE, "--no-pie-full-graphs"])["pie"]["full_graphs"] is False
    both = ["--pie_full_graphs", "--no-pie-full-graphs", "--pie-full-graphs"]
    assert settings_of([*PIE, *both])["pie"]["full_graphs"] is True
    assert "full_graphs" not in settings_of(PIE)["pie"]
    for word, value in (("true", True), ("false", False)):
        path = tmp_path / "serve.yaml"
        path.write_text(f"block-manager: pie\npie-full-graphs: {word}\n")
        assert settings_of(["--config", str(path)])["pie"] == {"full_graphs": value}
    config = ["--additional-config", '{"pie": {"full_graphs": true}}']
    assert settings_of([*PIE, *config, "--no-pie-full-graphs"])["pie"]["full_graphs"] is False


@pytest.mark.parametrize("flags_first", [True, False])
def test_flags_and_additional_config_are_merged(flags_first: bool) -> None:
    """Neither silently replaces the other, whichever comes first."""
    other = ["--additional-config", '{"mine": 1, "pie": {"ring_slots": 2}}']
    found = settings_of([*PIE, *other] if flags_first else [*other, *PIE])
    assert found["mine"] == 1
    assert found["block_manager"] == "pie"
    assert found["pie"] == {"pool_gib": 0.5, "ring_slots": 2}


def test_flags_work_in_a_yaml_file(tmp_path: Path) -> None:
    """vLLM's --config file takes the flags by their names."""
    path = tmp_path / "serve.yaml"
    path.write_text("block-manager: pie\npie-pool-gib: 0.5\npie-target-slowdown: 0.02\n")
    found = settings_of(["--config", str(path)])
    assert found["block_manager"] == "pie"
    assert found["pie"] == {"pool_gib": 0.5, "target_slowdown": 0.02}


def from_yaml(tmp_path: Path, text: str, *flags: str) -> Any:
    """`additional_config` of `vllm serve --config FILE FLAGS`."""
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return settings_of(["--config", str(path), *flags])


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("word", ["off", "no", "false", "'off'"])
def test_off_in_a_yaml_file_is_off(tmp_path: Path, word: str, dash: str) -> None:
    """YAML reads the bare words as false, and vLLM drops such a line where no flag says no."""
    keys = ("pie-parking", "pie-target-slowdown")
    if word == "'off'":
        dash = "-"
    lines = [f"{key.replace('-', dash)}: {word}" for key in keys]
    found = from_yaml(tmp_path, "\n".join(["block-manager: pie", *lines]))["pie"]
    config = PieConfig.from_mapping(found)
    assert (config.parking, config.target_slowdown) == (None, None)
    nested = "\n  ".join(["pie:", *(f"  {key[4:].replace('-', '_')}: {word}" for key in keys)])
    found = from_yaml(tmp_path, f"additional-config:\n  block_manager: pie\n  {nested}")
    assert settings.take(found).config == config
    # A flag of the command line has the last word.
    text = "block-manager: pie\npie-parking: off"
    assert from_yaml(tmp_path, text, "--pie-parking", "lru")["pie"]["parking"] == "lru"


@pytest.mark.parametrize("word", ["off", "on"])
@pytest.mark.parametrize(
    "key", ["pie-pool-gib", "pie-ring-slots", "pie-ring-fraction", "pie-link-gbps", "pie_pool_gib"]
)
def test_a_boolean_in_a_yaml_file_is_no_number(
    tmp_path: Path, key: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that names the flag; and what has only an off, has no on."""
    for name in (key, "pie-parking") if word == "on" else (key,):
        with pytest.raises(SystemExit):
            from_yaml(tmp_path, f"block-manager: pie\n{name}: {word}")
        text = capsys.readouterr().err
        assert f"--{name.replace('_', '-')}" in text
        assert ("is False; it must be" in text) == (word == "off")


def test_switches_in_a_yaml_file(tmp_path: Path) -> None:
    """The block manager itself, and the one setting that is a boolean."""
    for name in ("block-manager", "block_manager"):
        assert not from_yaml(tmp_path, f"{name}: off")
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, "block-manager: off\npie-parking: off")
    for name in ("pie-full-graphs", "pie_full_graphs"):
        found = from_yaml(
            tmp_path,
            f"block-manager: pie\n{name}: off\nadditional-config:\n  pie:\n    full_graphs: true",
        )
        assert found["pie"]["full_graphs"] is False


def test_settings_reach_a_process_that_has_no_plugin_yet() -> None:
    """API server processes read the pickled namespace before plugins are loaded."""
    namespace = pickle.dumps(parse(PIE))
    code = (
        "import os, pickle, sys; os.environ['VLLM_PLUGINS'] = '';"
        "from vllm.engine.arg_utils import AsyncEngineArgs;"
        "args = pickle.loads(sys.stdin.buffer.read());"
        "print('FOUND', AsyncEngineArgs.from_cli_args(args).additional_config)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=namespace, capture_output=True, timeout=200, check=False
    )
    assert b"FOUND {'block_manager': 'pie', 'pie': {'pool_gib': 0.5}}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pie-pool-gib", "0.5"], ["without --block-manager pie"]),
        (["--block-manager", "default", "--pie-ring-slots", "2"], ["without --block-manager pie"]),
        ([*PIE[:2], "--pie-pool-gib", "0"], ["--pie-pool-gib", "above 0"]),
        ([*PIE[:2], "--pie-pool-gib", "-2"], ["--pie-pool-gib"]),
        ([*PIE[:2], "--pie-pool-gib", "lots"], ["--pie-pool-gib", "lots", "auto"]),
        ([*PIE, "--pie-ring-slots", "none"], ["--pie-ring-slots", "none"]),
        ([*PIE, "--pie-ring-fraction", "1.5"], ["--pie-ring-fraction", "1.5"]),
        (["--block-manager", "cake"], ["--block-manager", "cake", "pie"]),
        (
            [*PIE, "--additional-config", '{"pie": {"ring_slot": 2}}'],
            ["vllm: error: unknown pie setting ring_slot; did you mean ring_slots?"],
        ),
        (
            [*PIE, "--additional-config", '{"pie": {"ring_slots": 0}}'],
            ["vllm: error: additional_config", "1 or more"],
        ),
    ],
)
def test_bad_flags_end_with_one_clear_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line answers with an error, not a traceback."""
    with pytest.raises(SystemExit) as caught:
        settings_of(arguments)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text


def listed(text: str) -> None:
    """Check that a help text has all flags but the old ones."""
    assert "--block-manager" in text
    for setting in SETTINGS:
        assert setting.flag is None or setting.flag in text
        assert setting.old_flag is None or setting.old_flag not in text


def test_help_lists_the_flags() -> None:
    """`vllm serve --help` shows the group with all flags."""
    text = make_arg_parser(FlexibleArgumentParser()).format_help()
    listed(text)


def test_help_of_the_real_command_lists_the_flags() -> None:
    """`vllm serve --help=BlockManager` finds them in a process that loads the plugin by itself."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), "serve", "--help=BlockManager"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed(done.stdout)


def test_without_the_flag_vllm_is_untouched(model: Path) -> None:
    """Merely installed, the plugin changes no class and no setting."""
    for config in ({}, {"block_manager": "default"}):
        args = EngineArgs(model=str(model), enforce_eager=True, additional_config=config)
        found = args.create_engine_config()
        assert found.scheduler_config.scheduler_cls is None
        assert "pie" not in found.parallel_config.worker_cls.lower()


@pytest.mark.parametrize("way", ["engine_args", "additional_config"])
def test_python_users_have_two_ways(model: Path, way: str) -> None:
    """A call that returns engine arguments, or `additional_config` alone."""
    config = {"block_manager": "pie", "pie": {"pool_gib": 0.25}}
    given = (
        pie_vllm.engine_args(pool_gib=0.25)
        if way == "engine_args"
        else {"additional_config": config}
    )
    args = EngineArgs(model=str(model), enforce_eager=True, kv_cache_memory_bytes=1 << 28, **given)
    for found in (args.create_engine_config(), args.create_engine_config()):
        assert (
            found.scheduler_config.scheduler_cls
            == "pie_vllm.vllm.scheduler_side.scheduler.make_scheduler"
        )
        assert (
            found.parallel_config.worker_cls == "pie_vllm.vllm.worker_side.cpu_worker.PieCPUWorker"
        )
        assert settings.of(found).config == PieConfig(pool_gib=0.25)
        again = pickle.loads(pickle.dumps(settings.of(found)))
        assert again.config == settings.of(found).config


def test_sizes_cause_no_compilation(model: Path) -> None:
    """The key of vLLM's compile cache does not depend on the pool."""
    hashes = {
        EngineArgs(
            model=str(model), kv_cache_memory_bytes=1 << 28, **pie_vllm.engine_args(pool_gib=size)
        )
        .create_engine_config()
        .compute_hash()
        for size in (0.1, 0.2)
    }
    assert len(hashes) == 1
