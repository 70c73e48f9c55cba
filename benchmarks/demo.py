"""The demo: a real vLLM server with too little KV memory, with pie and without.

Starts `vllm serve … --block-manager pie`, streams 32 chats at once from it through the OpenAI
client, does the same with stock vLLM at the same number of device bytes for KV, and compares.

    python -m benchmarks.demo        (or: make demo)
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.harness.display import console, table
from benchmarks.harness.load import Load
from benchmarks.harness.machine import facts, fast_dtype, write_json
from benchmarks.harness.options import plain_parser
from benchmarks.harness.shape import PieSizes, kv_shape, wide_ring
from benchmarks.real.server import ServerError
from benchmarks.real.serving_run import Setting, run_server

OUTPUT = Path("build/demo.json")
BLOCK_SIZE = 128
SECONDS_A_SIDE = 100.0
"""Allowed for one side's load, so that the demo ends within minutes on a slow machine too."""
MIB = 2**20

ROWS = (
    ("throughput, tokens/s", "tok_s", 0),
    ("time to first token, p50, ms", "ttft_p50_ms", 0),
    ("time to first token, p99, ms", "ttft_p99_ms", 0),
    ("time per output token, p50, ms", "tpot_p50_ms", 1),
    ("time per output token, p99, ms", "tpot_p99_ms", 1),
    ("gap between tokens, p99, ms", "itl_p99_ms", 0),
    ("preemptions (KV thrown away, computed again)", "preemptions", 0),
    ("blocks pooled, peak", "pie_pooled_peak", 0),
)


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are the load that the README describes."""
    parser = plain_parser("demo", __doc__)
    parser.add_argument("--model", type=Path, default=Path("build/models/smollm2-135m"))
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--device-blocks", type=int, default=40, help="KV on the device, in blocks")
    parser.add_argument("--pool-blocks", type=int, default=80, help="size of the CPU pool")
    parser.add_argument("--ring-slots", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--only", choices=("pie", "stock"), help="run one side; no comparison")
    return parser.parse_args()


def introduce(setting: Setting, load: Load, device_blocks: int, pie: PieSizes) -> None:
    """Say what is compared, and with which sizes."""
    block = setting.shape.block_bytes
    need = -(-(load.tokens + 40) // setting.block_size) * load.chats
    ring = pie.ring_slots * pie.pool_blocks * setting.shape.page_bytes
    console.print(
        f"{load.chats} chats of {load.tokens} tokens need about {need} KV blocks of "
        f"{setting.block_size} tokens in {setting.dtype}; the device is given {device_blocks} "
        f"({device_blocks * block / MIB:.0f} MiB) on both sides.\n"
        f"Pie adds a CPU pool of {pie.pool_blocks} blocks ({pie.pool_blocks * block / MIB:.0f} "
        f"MiB) and pays for a ring of {ring / MIB:.0f} MiB out of its device bytes: "
        f"{ring / block / device_blocks:.0%}, more than the default share of 5 %, because "
        "here the pool is larger than the device.\n"
        "No GPU is used: device memory, pool and copies share this machine's memory and cores."
    )


def adopt(load: Load, tokens: int) -> Load:
    """The load of the first side, for the second; says so where it was made shorter."""
    if tokens < load.tokens:
        console.print(f"This machine is slow: {tokens} tokens a chat instead of {load.tokens}.")
    return Load(load.chats, tokens)


def cell(figures: dict[str, float] | None, key: str, digits: int) -> str:
    """One figure for the table."""
    if figures is None or key not in figures:
        return "-"
    return f"{figures[key]:,.{digits}f}"


def compare(pie: dict[str, float] | None, stock: dict[str, float] | None) -> None:
    """Print both sides next to each other, and the ratio of the throughputs."""
    rows = [(label, cell(pie, key, n), cell(stock, key, n)) for label, key, n in ROWS]
    for label, key in (("loaded from", "bytes_loaded"), ("stored to", "bytes_stored")):
        value = f"{pie[f'pie_{key}'] / MIB:,.0f}" if pie else "-"
        rows.append((f"{label} the CPU pool, MiB", value, "-"))
    table("Same load, same device bytes for KV", ("", "pie", "stock"), rows)
    if pie and stock:
        console.print(f"pie / stock: {pie['tok_s'] / stock['tok_s']:.2f} x the throughput")


def result(pie: dict[str, float] | None, stock: dict[str, float] | None) -> dict[str, object]:
    """The figures under the names that build/demo.json promises, and all others below them."""
    named: dict[str, object] = {}
    if pie:
        named |= {
            "pie_tok_s": pie["tok_s"],
            "pie_preemptions": int(pie["preemptions"]),
            "pooled_blocks_peak": int(pie["pie_pooled_peak"]),
            "bytes_loaded": int(pie["pie_bytes_loaded"]),
            "bytes_stored": int(pie["pie_bytes_stored"]),
        }
    if stock:
        named |= {"stock_tok_s": stock["tok_s"], "stock_preemptions": int(stock["preemptions"])}
    if pie and stock:
        named["ratio"] = pie["tok_s"] / stock["tok_s"]
    return named | {"pie": pie, "stock": stock, "machine": facts()}


def main() -> int:
    """Run both sides and write build/demo.json."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    dtype, logs = fast_dtype(), Path("build/logs")
    shape = kv_shape(args.model, BLOCK_SIZE, dtype)
    setting = Setting(args.model, shape, BLOCK_SIZE, dtype, 1024, args.compiled, logs)
    load = Load(args.chats, args.tokens)
    sizes = wide_ring(shape, args.device_blocks, args.pool_blocks, args.ring_slots)
    introduce(setting, load, args.device_blocks, sizes)
    pie = stock = None
    try:
        if args.only != "stock":
            pie = run_server("demo-pie", setting, load, args.device_blocks, sizes, SECONDS_A_SIDE)
            load = adopt(load, int(pie["tokens_per_chat"]))
        if args.only != "pie":
            stock = run_server("demo-stock", setting, load, args.device_blocks, None)
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the server is down")
        return 130
    compare(pie, stock)
    write_json(OUTPUT, result(pie, stock))
    console.print(f"all figures: {OUTPUT}; the servers' logs: {setting.logs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
