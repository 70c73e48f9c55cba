"""Command-line options that the benchmarks of pooling share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import fast_dtype
from benchmarks.harness.result_file import RESULTS
from benchmarks.harness.shape import KvShape, PieSizes, wide_ring


def plain_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser without options for the benchmark of that name; the description is kept as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every comparison: model, load, sizes, repeats, output."""
    parser = plain_parser(module, description)
    parser.add_argument("--model", type=Path, default=Path("build/models/smollm2-135m"))
    parser.add_argument("--dtype", default=fast_dtype(), choices=("bfloat16", "float32"))
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device-blocks", type=int, default=40)
    parser.add_argument("--all-blocks", type=int, default=128, help="enough for every chat")
    parser.add_argument("--pool-blocks", type=int, default=80)
    parser.add_argument("--ring-slots", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / module)
    return parser


def add_redraw(parser: argparse.ArgumentParser) -> None:
    """Add the option of a benchmark whose plot can be drawn from its result file."""
    parser.add_argument(
        "--redraw", action="store_true", help="draw the plot of the result file; run nothing"
    )


def add_speeds(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option that names the links of a comparison."""
    parser.add_argument("--speeds", default=default, help="GB/s, comma-separated")


def link_keys(speed: str) -> dict[str, float]:
    """The argument of `engine_args` for a link of `--speeds`; none for "none"."""
    return {} if speed == "none" else {"emulated_link_gbps": float(speed)}


def add_wide_ring(parser: argparse.ArgumentParser) -> None:
    """Add the option that sets the ring's width by hand."""
    parser.add_argument(
        "--wide-ring",
        action="store_true",
        help="a ring for the whole pool, whatever the link brings; else its width is left to pie",
    )


def starved_sizes(args: argparse.Namespace, shape: KvShape) -> PieSizes:
    """Sizes of a pie run on `--device-blocks`, with pie's own ring unless `--wide-ring`."""
    if args.wide_ring:
        return wide_ring(shape, args.device_blocks, args.pool_blocks, args.ring_slots)
    return PieSizes(args.pool_blocks, args.ring_slots)


def run_spec(
    args: argparse.Namespace, shape: KvShape, device_blocks: int, pie: dict[str, Any] | None
) -> dict[str, Any]:
    """What `benchmarks.real.one_run` is given; `pie` are arguments of `engine_args`."""
    return {
        "load": {"chats": args.chats, "tokens": args.tokens},
        "llm": {
            "model": str(args.model),
            "dtype": args.dtype,
            "block_size": args.block_size,
            "max_model_len": 1024,
            "kv_cache_memory_bytes": device_blocks * shape.block_bytes,
            "enforce_eager": not args.compiled,
        },
        "pie": pie,
    }


def with_ngrams(spec: dict[str, Any], drafts: int) -> dict[str, Any]:
    """The same run on chats that repeat what they say, with so many n-gram drafts a step."""
    spec = {**spec, "load": {**spec["load"], "repeating": True}}
    if drafts:
        speculative = {
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 4,
        }
        spec["llm"] = {**spec["llm"], "speculative_config": speculative}
    return spec
