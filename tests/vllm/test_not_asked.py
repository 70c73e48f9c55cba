"""The plugin is installed and nobody asks for pie: vLLM starts as fast, and as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm import args as pie_args
from pie_vllm.vllm import plugin
from tests.helpers.model import REPOSITORY, model_path

pytestmark = pytest.mark.vllm

ALONE = """
import sys, time
import vllm
before, began = set(sys.modules), time.process_time()
from pie_vllm.vllm.plugin import register
register()
register()
spent, more = time.process_time() - began, set(sys.modules) - before
foreign = sorted(name for name in more if not name.startswith("pie_vllm"))
print("FOUND", len(more), spent, foreign)
from vllm.engine.arg_utils import EngineArgs
print("PATCHED", vars(EngineArgs).get("_pie_installed"))
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
words = ["--model", sys.argv[1], "--enforce-eager", "--block-manager", "default"]
EngineArgs.from_cli_args(parser.parse_args(words)).create_engine_config()
print("OURS", sorted(name for name in sys.modules if name.startswith("pie_vllm")))
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What a fresh process prints that loads the plugin before anything but ``import vllm``."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(model_path())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {key: rest for key, _, rest in lines}


def test_loading_it_costs_next_to_nothing(alone: dict[str, str]) -> None:
    """No module of vLLM's or of others is imported for it; it took 0.9 s and 708 modules once."""
    modules, seconds, foreign = alone["FOUND"].split(" ", 2)
    assert int(modules) < 40
    assert float(seconds) < 0.1
    # Of Python's own, what pie's settings are made of.
    assert not [name for name in eval(foreign) if name.split(".")[0] not in sys.stdlib_module_names]


OURS = [
    "pie_vllm",
    "pie_vllm.config",
    "pie_vllm.errors",
    "pie_vllm.geometry",
    "pie_vllm.setting_values",
    "pie_vllm.vllm",
    "pie_vllm.vllm.args",
    "pie_vllm.vllm.compat",
    "pie_vllm.vllm.compat.loading",
    "pie_vllm.vllm.flags",
    "pie_vllm.vllm.opt_in",
    "pie_vllm.vllm.plugin",
]
"""Modules that a start with ``--block-manager default`` imports: names of settings, no more."""


def test_it_waits_for_vllms_arguments_and_touches_nothing_else(alone: dict[str, str]) -> None:
    """What engines with pie need is neither loaded nor put in place."""
    assert alone["PATCHED"] == "True"
    assert eval(alone["OURS"]) == OURS


@pytest.mark.parametrize("gone", ["add_cli_args", "from_cli_args", "create_engine_config"])
def test_without_one_of_the_patched_names_the_others_stay(
    gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A vLLM that has moved a function runs on, and the rest still answers ``--block-manager``."""
    names = {"add_cli_args": staticmethod(lambda p: p), "from_cli_args": classmethod(print)}
    names["create_engine_config"] = lambda _: "made"  # type: ignore[assignment]
    owner = type("EngineArgs", (), {k: v for k, v in names.items() if k != gone})
    plugin._install(SimpleNamespace(EngineArgs=owner))
    assert not hasattr(owner, gone)
    assert not caplog.records
    if gone != "create_engine_config":
        args: Any = owner()
        assert args.create_engine_config() == "made"
        args.additional_config = {"block_manager": "pie", "pie": {"pool_gib": -1}}
        with pytest.raises(Exception, match="--pie-pool-gib is -1"):
            args.create_engine_config()


def test_a_vllm_with_other_modules_runs_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever fails while the plugin is loaded is a warning, not vLLM's end."""
    plugin._install(SimpleNamespace())
    assert not caplog.records
    monkeypatch.setattr(pie_args, "install", lambda *_: 1 / 0)
    monkeypatch.setattr(vllm.logger.logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert "ZeroDivisionError" in caplog.text
    assert "vLLM runs as without the plugin" in caplog.text


GONE = """
import sys
import vllm.engine.arg_utils as module
import vllm.v1.engine.core as core, vllm.v1.metrics.loggers as loggers
from vllm.v1.core import kv_cache_coordinator
from pie_vllm.vllm.plugin import register
patched = [(core.EngineCore, "_initialize_kv_caches"), (core.EngineCore, "collective_rpc"),
    (core, "EngineCore"), (loggers, "PrometheusStatLogger"), (kv_cache_coordinator, "BlockPool"),
    (module.EngineArgs, "add_cli_args"), (module.EngineArgs, "from_cli_args")]
kept = dict(vars(module.EngineArgs))
for owner, name in patched:
    original = vars(owner)[name]
    delattr(owner, name)
    register()
    module.EngineArgs(model=sys.argv[1])
    print("STARTED", name)
    setattr(owner, name, original)
    for key in ("add_cli_args", "from_cli_args", "create_engine_config"):
        setattr(module.EngineArgs, key, kept[key])
    if "_pie_installed" in vars(module.EngineArgs):
        del module.EngineArgs._pie_installed
"""


def test_names_that_are_gone_from_the_real_vllm_keep_nobody_from_starting() -> None:
    """``EngineArgs(model=...)`` of users who never asked for pie."""
    done = subprocess.run(
        [sys.executable, "-c", GONE, str(model_path())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout.count("STARTED") == 7, done.stderr[-2000:]


def test_an_unknown_version_refuses_only_who_asks(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the clear error; everybody else is served."""
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    EngineArgs(model=str(model), enforce_eager=True).create_engine_config()
    args = EngineArgs(
        model=str(model), enforce_eager=True, additional_config={"block_manager": "pie"}
    )
    with pytest.raises(UnsupportedError, match=r"supports vLLM >=0\.32.*found 0\.40\.0"):
        args.create_engine_config()


def test_a_parser_that_takes_no_flags_is_left_alone() -> None:
    """As that of a vLLM that has flags of these names itself."""
    parser = FlexibleArgumentParser()
    parser.add_argument("--block-manager")
    assert make_arg_parser(parser) is parser
    assert parser.parse_args(["--model", str(model_path())]).block_manager is None


def test_the_default_by_name_changes_no_cache_key(model: Path) -> None:
    """Neither on the command line nor in Python, nor where a flag overrides a file."""

    def config(*flags: str, **arguments: Any) -> Any:
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--model", str(model), "--enforce-eager", *flags]
        )
        args = AsyncEngineArgs.from_cli_args(parsed)
        for name, value in arguments.items():
            setattr(args, name, value)
        return args.create_engine_config()

    plain = config()
    other = ["--additional-config", '{"block_manager": "pie"}']
    for found in (
        config("--block-manager", "default"),
        config(*other, "--block-manager", "default"),
        config("--block-manager", "pie", "--block-manager", "default"),
        config(additional_config={"block_manager": "default"}),
    ):
        assert found.additional_config == plain.additional_config
        assert found.compute_hash() == plain.compute_hash()
