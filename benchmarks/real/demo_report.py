"""What the demo prints: what is compared, both sides' figures, and what held pie back."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.display import console, table
from benchmarks.harness.load import Load
from benchmarks.harness.shape import PieSizes
from benchmarks.real.serving_run import ServedRun, Setting, server_arguments

MIB = 2**20
PROMPT_TOKENS = 40
"""Tokens of a chat's prompt, template included, rounded up."""

EXPECTED_RATIO = 1.25
"""Throughput of pie against stock's below which the demo says what held pie back."""

STALL_SHARE = 0.02
"""Share of the time waited for copies from which on the stall is named as a reason."""

SLOWER_STEPS = 1.15
"""Ratio of the median gaps between tokens from which on slower steps are named as a reason."""

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
WHY = {
    "link": "the link feeds no more pooled blocks a step",
    "rows": "CPU memory for more pooled blocks was not there yet",
    "window": "resident and pooled blocks were all in use",
    "residents": "blocks being written filled the device's memory",
    "restore": "their own KV was copied back first",
}
"""What kept the first waiting chat, by the reasons of the counter `pie_head_waits`."""


def blocks_needed(load: Load, block_size: int) -> int:
    """KV blocks that all chats hold together at their ends."""
    return -(-(load.tokens + PROMPT_TOKENS) // block_size) * load.chats


def introduce(setting: Setting, load: Load, device_blocks: int, sizes: PieSizes) -> None:
    """Say what is compared, and with which options."""
    block = setting.shape.block_bytes
    need = blocks_needed(load, setting.block_size)
    stock = server_arguments(setting, device_blocks, None)
    ours = server_arguments(setting, device_blocks, sizes)
    console.print(
        f"{load.chats} chats of {load.tokens} tokens need about {need} KV blocks of "
        f"{setting.block_size} tokens in {setting.dtype}; the device is given {device_blocks} "
        f"({device_blocks * block / MIB:.0f} MiB) on both sides, pie's ring included.\n"
        f"Both: vllm serve MODEL {' '.join(stock)}\n"
        f"Pie adds: {' '.join(option for option in ours if option not in stock)}\n"
        "No GPU is used: device memory, pool and copies share this machine's memory and cores.",
        markup=False,
    )


def compare(pie: ServedRun | None, stock: ServedRun | None) -> None:
    """Print both sides next to each other, and the ratio of the throughputs."""
    sides = (pie, stock)
    rows = [(label, *(cell(side, key, n) for side in sides)) for label, key, n in ROWS]
    for label, key in (("loaded from", "pie_loaded_bytes"), ("stored to", "pie_stored_bytes")):
        value = f"{pie.figures[key] / MIB:,.0f}" if pie else "-"
        rows.append((f"{label} the CPU pool, MiB", value, "-"))
    table("Same load, same device bytes for KV", ("", "pie", "stock"), rows)
    if pie and stock:
        ratio = pie.figures["tok_s"] / stock.figures["tok_s"]
        console.print(f"pie / stock: {ratio:.2f} x the throughput")


def cell(side: ServedRun | None, key: str, digits: int) -> str:
    """One figure for the table."""
    if side is None or key not in side.figures:
        return "-"
    return f"{side.figures[key]:,.{digits}f}"


def explain(
    setting: Setting, load: Load, pie: Mapping[str, float], stock: Mapping[str, float] | None
) -> None:
    """Print the sizes that pie chose, and below EXPECTED_RATIO what held it back."""
    resident, pooled = int(pie["pie_resident_blocks"]), int(pie["pie_pooled_blocks"])
    ring = pie["pie_ring_bytes"] / setting.shape.block_bytes
    console.print(
        f"Sizes pie chose: {resident} resident and {pooled} pooled blocks; the ring took "
        f"{ring:.1f} blocks of the device's bytes."
    )
    if stock is None or pie["tok_s"] >= EXPECTED_RATIO * stock["tok_s"]:
        return
    console.print(f"Less than {EXPECTED_RATIO} x. What the counters say of it:")
    for reason in reasons(blocks_needed(load, setting.block_size), pie, stock):
        console.print(f"  - {reason}", markup=False)


def reasons(need: int, pie: Mapping[str, float], stock: Mapping[str, float]) -> list[str]:
    """What held pie back, from the counters of both sides; never empty.

    Args:
        need: blocks that all chats hold together at their ends.
        pie: figures of the pie run.
        stock: figures of the stock run.
    """
    found = []
    in_all = int(pie["pie_resident_blocks"] + pie["pie_pooled_blocks"])
    if need > in_all:
        found.append(
            f"Resident and pooled blocks are {in_all} together, the chats need {need}: the window "
            "of pooled blocks is as wide as the link can feed in a step (ring_fraction)."
        )
    waits = {why: pie.get(f"pie_head_waits:{why}", 0.0) for why in WHY}
    why = max(waits, key=waits.__getitem__)
    if waits[why]:
        found.append(f"Chats waited in {waits[why]:.0f} steps, mostly because {WHY[why]}.")
    if pie["preemptions"]:
        found.append(f"Pie preempted {pie['preemptions']:.0f} times.")
    stall = pie["pie_stall_seconds"] / pie["seconds"]
    if stall >= STALL_SHARE:
        found.append(f"The compute waited for copies {stall:.1%} of the time.")
    slower = pie["itl_p50_ms"] / stock["itl_p50_ms"]
    if slower >= SLOWER_STEPS:
        found.append(
            f"The median gap between tokens is {slower:.2f} x stock's: a step has more chats in "
            "it, and on a CPU the copies take cores and memory bandwidth from the compute."
        )
    if not stock["preemptions"]:
        found.append("Stock preempted nothing: the chats were too short to outgrow its memory.")
    return found or ["Nothing stands out: the two runs differ by as much as the machine's drift."]


def result(pie: ServedRun | None, stock: ServedRun | None) -> dict[str, object]:
    """The figures under the names that build/demo.json promises, and all others below them."""
    named: dict[str, object] = {}
    if pie:
        named |= {
            "pie_tok_s": pie.figures["tok_s"],
            "pie_preemptions": int(pie.figures["preemptions"]),
            "pooled_blocks_peak": int(pie.figures["pie_pooled_peak"]),
            "bytes_loaded": int(pie.figures["pie_loaded_bytes"]),
            "bytes_stored": int(pie.figures["pie_stored_bytes"]),
        }
    if stock:
        named |= {
            "stock_tok_s": stock.figures["tok_s"],
            "stock_preemptions": int(stock.figures["preemptions"]),
        }
    if pie and stock:
        named["ratio"] = pie.figures["tok_s"] / stock.figures["tok_s"]
    sides = {"pie": pie, "stock": stock}
    return named | {name: side and side.figures for name, side in sides.items()}
