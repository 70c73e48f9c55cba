"""What the installed plugin adds to the start of a vLLM that does not use it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from benchmarks.harness.environment import vllm_environment
from benchmarks.harness.model import ROOT, made_once
from benchmarks.make_model import DEFAULT_OUTPUT

_PROGRAM = """
import json, sys, time
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def parsed(words):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", sys.argv[1], *words]))

parsed([])  # Makes what vLLM makes once.
before, began = set(sys.modules), time.process_time()
parsed([])
stock = time.process_time() - began
began = time.process_time()
from pie_vllm.vllm.plugin import register
register()
parsed(["--block-manager", "default"])
print(json.dumps([time.process_time() - began - stock, sorted(set(sys.modules) - before)]))
"""


class StartUp(NamedTuple):
    """What a start with ``--block-manager default`` takes more.

    Attributes:
        seconds: CPU time of loading the plugin and of its flags.
        modules: modules that are imported for it.
    """

    seconds: float
    modules: list[str]


def start_up() -> StartUp:
    """Measure it in a process of its own.

    Raises:
        RuntimeError: the process failed; has the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(made_once(ROOT / DEFAULT_OUTPUT))],
        env=vllm_environment(VLLM_PLUGINS=""),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the start failed: {done.stderr[-2000:]}")
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return StartUp(seconds, modules)
