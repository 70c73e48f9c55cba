"""Does the pool's memory follow three waves of load, and do steps wait while it does?

Two pie engines of one configuration, each in a process of its own, serve three waves of chats, and
take turns of a wave: while one runs, the other waits.

    elastic    the pool grows as needed, and shrinks after little idle time
    held       the whole pool is ordered before the first wave, and never given back

Two chats of the first and the last wave are longer than the others, so that the pool shrinks beside
the steps of a light load; after the second wave it shrinks in an engine without requests. Both
sides have the same schedule, so that steps are compared one by one.

    python -m benchmarks.elastic [--repeats 1]
"""

from __future__ import annotations

import json
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.harness.display import say_written, working
from benchmarks.harness.load import Load
from benchmarks.harness.machine import facts
from benchmarks.harness.options import parser_of, run_spec
from benchmarks.harness.result_file import write_result
from benchmarks.harness.shape import kv_shape, wide_ring
from benchmarks.real.in_process import scheduler_of
from benchmarks.real.one_run import WARM_UP, add_chats, make_llm, pie_counters, run_steps
from benchmarks.real.side import serve, sides
from benchmarks.real.wave import Wave, run_wave
from benchmarks.real.wave_report import plot, print_summary, summary

WAVES = 3
LONGER_CHATS = 2
NEVER = 1e6
GROWTH_SECONDS = 60.0


def parse_arguments() -> Namespace:
    """The command line."""
    parser = parser_of("elastic", __doc__)
    parser.set_defaults(chats=40, tokens=96, repeats=1)
    # Small blocks fill, and so are pooled, all the time.
    parser.set_defaults(block_size=32, device_blocks=64, pool_blocks=240)
    parser.add_argument(
        "--light-tokens", type=int, default=60, help="further tokens of the longer chats"
    )
    parser.add_argument("--idle-seconds", type=float, default=1.0, help="of the pool")
    parser.add_argument("--prefix-caching", action="store_true")
    return parser.parse_args()


def hold_all(llm: Any) -> None:
    """Order the whole pool, as if that much had been needed, and wait until it is there."""
    from pie_vllm.plan import PoolOrder

    scheduler = scheduler_of(llm)
    residency = scheduler.kv_cache_manager.residency
    scheduler.pie_controller.pool.order = PoolOrder(residency.geometry.num_chunks, idle=False)
    add_chats(llm, WARM_UP)
    run_steps(llm, WARM_UP)  # Orders travel with steps.
    deadline = time.monotonic() + GROWTH_SECONDS
    while (counters := pie_counters(llm))["pool_bytes"] < counters["host_bytes"]:
        if time.monotonic() > deadline:
            raise RuntimeError("the pool did not grow to its full size")
        time.sleep(0.1)


def child(spec: dict[str, Any]) -> None:
    """In a child: start an engine, then run a wave in each turn."""
    llm = make_llm(spec)
    if spec["pie"]["pool_idle_seconds"] == NEVER:
        hold_all(llm)
    load = Load(**spec["load"])
    serve(lambda ask: run_wave(llm, load, ask["longer"], ask["idle"]))


def specs(args: Namespace) -> dict[str, dict[str, Any]]:
    """What the two engines are given."""
    shape = kv_shape(args.model, args.block_size, args.dtype)
    sizes = wide_ring(shape, args.device_blocks, args.pool_blocks, args.ring_slots)
    # Off: so that no measured time has a part in the schedule.
    keys = sizes.engine_keys(shape) | {"target_slowdown": "off"}
    found = {}
    for name, seconds in (("elastic", args.idle_seconds), ("held", NEVER)):
        spec = run_spec(args, shape, args.device_blocks, keys | {"pool_idle_seconds": seconds})
        # Prefixes that only one side still has would make the schedules differ.
        spec["llm"]["enable_prefix_caching"] = args.prefix_caching
        found[name] = spec
    return found


def run_round(args: Namespace, index: int) -> dict[str, list[Wave]]:
    """Both engines, fresh, through all waves; the order turns with each wave."""
    with sides("elastic", specs(args), f"-{index}") as engines:
        waves: dict[str, list[Wave]] = {name: [] for name in engines}
        names = list(engines)
        for number in range(WAVES):
            longer = [] if number % 2 else [args.light_tokens] * LONGER_CHATS
            ask = {"longer": longer, "idle": 3 * args.idle_seconds}
            names.reverse()
            for name in names:
                with working(f"wave {number + 1}, {name}"):
                    found = engines[name].turn(ask)
                if found is None:
                    raise RuntimeError(f"the engine {name} ended; see its log in build/runs")
                waves[name].append(found)
    return waves


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    if sys.argv[1:2] == ["--serve"]:
        child(json.loads(Path(sys.argv[2]).read_text()))
        return
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = [run_round(args, index) for index in range(args.repeats)]
    data = summary(rounds)
    print_summary(data)
    title = (
        f"Elastic pool: {WAVES} waves of {args.chats} chats x {args.tokens} tokens, {args.dtype}"
    )
    setup = {"repeats": args.repeats, "light_tokens": args.light_tokens, "specs": specs(args)}
    write_result(args.output, {"question": title, "machine": facts(), "setup": setup, **data})
    plot(args.output.with_suffix(".png"), title, rounds)
    say_written(args.output)


if __name__ == "__main__":
    main()
