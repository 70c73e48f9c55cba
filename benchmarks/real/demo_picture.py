"""The demo's picture: tokens over time, and below it the blocks in use by tier on each side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.harness.drawing import COLORS, drawing
from benchmarks.harness.load import Load
from benchmarks.real.serving_run import ServedRun

TIERS = (
    ("resident", "device, in use", COLORS["device"]),
    ("pooled", "CPU pool, in use (pooled)", COLORS["pooled"]),
    ("parked", "CPU pool, idle (parked)", COLORS["parked"]),
)
"""Tier, its name in the picture, and its colour; from the bottom up."""


def draw(
    path: Path, load: Load, device_blocks: int, pie: ServedRun | None, stock: ServedRun | None
) -> Path:
    """Draw the sides that were run; returns the picture's path."""
    sides = {name: run for name, run in (("pie", pie), ("stock", stock)) if run is not None}
    title = f"{load.chats} chats of {load.tokens} tokens, KV memory for {device_blocks} blocks"
    if pie and stock:
        ratio = pie.figures["tok_s"] / stock.figures["tok_s"]
        title += f": pie {ratio:.2f} x stock"
    mosaic = [["tokens"] * len(sides), list(sides)]
    with drawing(path, title, (8, 7), mosaic=mosaic) as axes:
        draw_tokens(axes["tokens"], sides)
        for name, run in sides.items():
            draw_blocks(axes[name], name, run, device_blocks)
        share_scales(axes["tokens"], [axes[name] for name in sides])
    return path


def draw_tokens(axes: Any, sides: dict[str, ServedRun]) -> None:
    """Tokens of all answers together, as they came."""
    for name, run in sides.items():
        # A piece of text is mostly one token, and now and then two.
        pieces = sorted(
            (seconds, chat.tokens / len(chat.pieces))
            for chat in run.times.chats
            for seconds in chat.pieces
        )
        seconds, tokens = zip(*pieces, strict=True)
        label = f"{name}: {run.figures['tok_s']:,.0f} tokens/s"
        axes.plot(seconds, list(itertools.accumulate(tokens)), color=COLORS[name], label=label)
    axes.set_ylabel("tokens answered")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def draw_blocks(axes: Any, name: str, run: ServedRun, device_blocks: int) -> None:
    """Blocks of one side over time, tier upon tier."""
    heights = {tier: [getattr(sample, tier) for sample in run.blocks] for tier, _, _ in TIERS}
    shown = [tier for tier in TIERS if any(heights[tier[0]])] or [TIERS[0]]
    axes.stackplot(
        [sample.seconds for sample in run.blocks],
        *(heights[tier] for tier, _, _ in shown),
        labels=[label for _, label, _ in shown],
        colors=[color for _, _, color in shown],
    )
    axes.axhline(device_blocks, color="black", linestyle="--", label="device's bytes")
    axes.set_title(f"{name}: {run.figures['preemptions']:.0f} preemptions")
    axes.set_xlabel("seconds")
    axes.set_ylabel("KV blocks")
    axes.legend(loc="upper center", fontsize="small")


def share_scales(above: Any, below: list[Any]) -> None:
    """Give all axes one scale of time, and those of blocks one height, with room for legends."""
    seconds = max(each.dataLim.x1 for each in (above, *below))
    blocks = max(each.dataLim.y1 for each in below)
    above.set_xlim(0, seconds)
    for each in below:
        each.set_xlim(0, seconds)
        each.set_ylim(0, 1.5 * blocks)
