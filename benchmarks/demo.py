"""The demo: a real vLLM server with too little KV memory, with pie and without.

Starts `vllm serve … --block-manager pie`, streams 32 chats at once from it through the OpenAI
client, does the same with stock vLLM at the same number of device bytes for KV, and compares.
Pie runs as a user starts it: nothing is tuned, so pool and ring have their default sizes.

    python -m benchmarks.demo        (or: make demo)
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.harness.display import console
from benchmarks.harness.load import Load
from benchmarks.harness.machine import facts, fast_dtype
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import write_json
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.real.demo_picture import draw
from benchmarks.real.demo_report import compare, explain, introduce, result
from benchmarks.real.server import ServerError
from benchmarks.real.serving_run import ServedRun, Setting, run_server

OUTPUT = Path("build/demo")
BLOCK_SIZE = 128
SIDE_SECONDS_MAX = 100.0
"""Time for the load of one side, so that the demo ends within minutes on a slow machine too."""


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are the load that the README describes."""
    parser = plain_parser("demo", __doc__)
    parser.add_argument("--model", type=Path, default=Path("build/models/smollm2-135m"))
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--device-blocks", type=int, default=40, help="KV on the device, in blocks")
    parser.add_argument("--pool-blocks", type=int, help="size of the CPU pool; pie's own default")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--only", choices=("pie", "stock"), help="run one side; no comparison")
    return parser.parse_args()


def adopt(load: Load, tokens: int) -> Load:
    """The load of the first side, for the second; says so where it was made shorter."""
    if tokens < load.tokens:
        console.print(f"This machine is slow: {tokens} tokens a chat instead of {load.tokens}.")
    return Load(load.chats, tokens)


def main() -> int:
    """Run both sides, write build/demo.json and build/demo.png."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    dtype, logs = fast_dtype(), Path("build/logs")
    shape = kv_shape(args.model, BLOCK_SIZE, dtype)
    setting = Setting(args.model, shape, BLOCK_SIZE, dtype, 1024, args.compiled, logs)
    load, blocks = Load(args.chats, args.tokens), args.device_blocks
    sizes = PieSizes(args.pool_blocks)
    introduce(setting, load, blocks, sizes)
    pie: ServedRun | None = None
    stock: ServedRun | None = None
    try:
        if args.only != "stock":
            pie = run_server("demo-pie", setting, load, blocks, sizes, SIDE_SECONDS_MAX, True)
            load = adopt(load, int(pie.figures["tokens_per_chat"]))
        if args.only != "pie":
            stock = run_server("demo-stock", setting, load, blocks, None, None, True)
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the server is down")
        return 130
    compare(pie, stock)
    if pie is not None:
        explain(setting, load, pie.figures, stock.figures if stock else None)
    found = result(pie, stock) | {"machine": facts()}
    write_json(OUTPUT.with_suffix(".json"), found)
    picture = draw(OUTPUT.with_suffix(".png"), load, blocks, pie, stock)
    console.print(f"all figures: {OUTPUT.with_suffix('.json')}; the servers' logs: {setting.logs}")
    console.print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
