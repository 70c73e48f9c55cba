"""Prints, plots and sums up waves of two sides: with an elastic pool, and with a held one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.display import table
from benchmarks.harness.drawing import drawing
from benchmarks.harness.stats import curve, draw_curve, percentile
from benchmarks.real.wave import Wave

MIB = 2**20
DECODING = ("peak", "light")
RUNNING = ("prompts", *DECODING)

Round = Mapping[str, Sequence[Wave]]
"""The waves of each side."""


def levels(waves: Sequence[Wave]) -> list[dict[str, Any]]:
    """Memory and pool in MiB: before each wave, the maximum of its peak, at the end of a trough."""
    found = []
    for number, wave in enumerate(waves, 1):
        for phase in ("before", "peak", "light", "idle"):
            samples = [sample for sample in wave if sample["phase"] == phase]
            if not samples:
                continue
            level = {
                key: (max(s[key] for s in samples) if phase == "peak" else samples[-1][key]) / MIB
                for key in ("memory", "pool")
            }
            found.append({"wave": number, "phase": phase, **level})
    return found


def milliseconds(waves: Sequence[Wave], phases: Sequence[str]) -> list[float]:
    """Durations of the steps of some phases."""
    return [1e3 * s["seconds"] for wave in waves for s in wave if s["phase"] in phases]


def figures(values: Sequence[float]) -> dict[str, float]:
    """Count, p50, p99 and maximum of a distribution; the count alone where it is empty."""
    if not values:
        return {"count": 0}
    quantiles = {f"p{percent}": percentile(values, percent) for percent in (50, 99)}
    return {"count": len(values), **quantiles, "max": max(values)}


def differences(elastic: Sequence[Wave], held: Sequence[Wave]) -> dict[str, list[float]]:
    """Milliseconds by which each step was longer than the same step with a held pool.

    Apart: steps with prompts; of the others, those after which the pool's size was not that of
    before ("resized"), and the rest.

    Raises:
        RuntimeError: the sides had different schedules.
    """
    found: dict[str, list[float]] = {"prompts": [], "resized": [], "rest": []}
    for ours, theirs in zip(elastic, held, strict=True):
        sizes = [before["pool"] for before, after in itertools.pairwise(ours) if _runs(after)]
        ours, theirs = ([s for s in wave if _runs(s)] for wave in (ours, theirs))
        if [s["phase"] for s in ours] != [s["phase"] for s in theirs]:
            raise RuntimeError(f"one side ran {len(ours)} steps, the other {len(theirs)}")
        for size, one, other in zip(sizes, ours, theirs, strict=True):
            kind = "rest" if one["pool"] == size else "resized"
            if one["phase"] not in DECODING:
                kind = "prompts"
            found[kind].append(1e3 * (one["seconds"] - other["seconds"]))
    return found


def _runs(sample: Mapping[str, Any]) -> bool:
    return sample["phase"] in RUNNING


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of all rounds."""
    data: dict[str, Any] = {}
    for name in ("elastic", "held"):
        waves = [wave for round_ in rounds for wave in round_[name]]
        last = [round_[name][-1][-1] for round_ in rounds]
        sizes = [[sample["pool"] for sample in wave] for wave in waves]
        pairs = [pair for wave in sizes for pair in itertools.pairwise(wave)]
        data[name] = {
            "levels_mib": [levels(round_[name]) for round_ in rounds],
            "step_ms": figures(milliseconds(waves, RUNNING)),
            "decode_step_ms": figures(milliseconds(waves, DECODING)),
            "decode_step_curve_ms": curve(milliseconds(waves, DECODING)),
            "grown": sum(before < after for before, after in pairs),
            "shrunk": sum(before > after for before, after in pairs),
            "waits": sum(sample["waits"] for sample in last),
            "waited_ms": 1e3 * sum(sample["waited"] for sample in last),
        }
    longer: dict[str, list[float]] = {}
    for round_ in rounds:
        for kind, values in differences(round_["elastic"], round_["held"]).items():
            longer.setdefault(kind, []).extend(values)
    data["longer_ms"] = {kind: figures(values) for kind, values in longer.items()}
    return data


def print_summary(data: Mapping[str, Any]) -> None:
    """Print memory by phase (of the first round) and the steps' times."""
    sides = ("elastic", "held")
    rows = [
        [
            f"{one['wave']} {one['phase']}",
            *(f"{level[key]:,.0f}" for level in (one, other) for key in ("memory", "pool")),
        ]
        for one, other in zip(*(data[side]["levels_mib"][0] for side in sides), strict=True)
    ]
    head = [f"{side} {what}" for side in sides for what in ("process", "pool")]
    table("Memory, MiB: before, maximum of a peak, end of a trough", ["wave", *head], rows)
    keys = ("count", "p50", "p99", "max")
    rows = [
        [f"{side}, {label}", *(f"{data[side][which][key]:,.0f}" for key in keys)]
        for which, label in (("step_ms", "all"), ("decode_step_ms", "without prompts"))
        for side in sides
    ]
    rows += [
        [f"elastic - held, {kind}", *(f"{found[key]:,.1f}" for key in keys)]
        for kind, found in data["longer_ms"].items()
        if found["count"]
    ]
    table("Steps, ms", ["", *keys], rows)
    counts = ("grown", "shrunk", "waits", "waited_ms")
    rows = [[side, *(f"{data[side][key]:,.0f}" for key in counts)] for side in sides]
    table("Changes of the pool, and steps that waited for its memory", ["", *counts], rows)


def plot(path: Path, title: str, rounds: Sequence[Round]) -> None:
    """Memory over the time of the first round's waves, and the times of steps without prompts."""
    with drawing(path, title, (8, 7), 2) as (left, right):
        for name, color in (("held", "tab:gray"), ("elastic", "tab:orange")):
            times: list[float] = []
            samples: list[dict[str, Any]] = []
            for wave in rounds[0][name]:
                begin = times[-1] if times else 0.0
                times += [begin + sample["at"] for sample in wave]
                samples += wave
            for key, style, label in (("memory", "-", "process"), ("pool", "--", "pool")):
                values = [sample[key] / MIB for sample in samples]
                left.plot(times, values, style, color=color, label=f"{name}, {label}")
            waves = [wave for round_ in rounds for wave in round_[name]]
            draw_curve(right, curve(milliseconds(waves, DECODING)), name, color=color)
        left.set_ylim(bottom=0)
        left.set_ylabel("MiB")
        left.set_xlabel("seconds, turns of the other side left out")
        right.set_xlabel("step time without prompts, ms")
        for axes in (left, right):
            axes.legend()
