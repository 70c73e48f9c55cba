"""One command on a GPU machine: is pie right and fast there?

Each stage runs in a process of its own and is killed at its limit; what it had reported until then
is kept, and the other stages go on. Needs torch, vLLM and this checkout, nothing else, and builds
the native engine where it must. Stages are facts, memory, aliases, copies, pinning, overlap,
exactness, serving, parking and graphs:

    python benchmarks/gpu_check.py [--stages facts,aliases,serving:pie,stock] [--quick]

writes gpu_check.json and gpu_check.md into --out ($OUT where it is set); stages that are there
from an earlier command and were not asked for again stay. The status is 1 where a stage failed or
ran out of time.

`--plan first`, `second` or `fallback` runs the stages of one call on a machine that is lent for
minutes, each with a limit of its own, and writes one page beside them: gpu_check_first.md.

`--driver host` is a dry run of this script itself on a machine without a GPU: its figures say
nothing about one, are marked so, and are never written under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu.harness.machine import provenance, short_machine
from benchmarks.gpu.harness.markdown import markdown
from benchmarks.gpu.harness.native import ensure_built, python_path
from benchmarks.gpu.harness.plans import PLANS, Job, Plan, jobs_of
from benchmarks.gpu.harness.process import Options, run_stage
from benchmarks.gpu.harness.stages import STAGES, Wanted, parse_stages
from benchmarks.gpu.harness.summary import summary
from benchmarks.harness.builds import ROOT

STEM = "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / STEM
LEAST_SECONDS = 3.0
"""A stage with fewer is not begun: it would be killed while it imports torch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python benchmarks/gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages, their questions and parts:\n"
        + "\n".join(
            f"  {s.name:10} {s.question}" + (f"\n{'':13}{', '.join(s.parts)}" if s.parts else "")
            for s in STAGES.values()
        ),
    )
    found.add_argument("--stages", default="", metavar="NAMES", help="NAME or NAME:PART,PART; all")
    found.add_argument("--plan", choices=PLANS, help="the stages of one call on a lent machine")
    found.add_argument(
        "--out", type=Path, help="folder of the results ($OUT, else benchmarks/results)"
    )
    found.add_argument("--limit", type=float, metavar="SECONDS", help="of each stage")
    found.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    found.add_argument("--driver", default="cuda", choices=("cuda", "host"))
    found.add_argument("--commit", help="of this checkout, where it is a copy without .git")
    found.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="run nothing")
    return found


def folder_of(out: Path | None, dry: bool) -> Path:
    """Where the results go.

    Raises:
        ValueError: a dry run's would lie among the real ones.
    """
    if out is None and os.environ.get("OUT"):
        out = Path(os.environ["OUT"])
    if out is None:
        return SCRATCH / "dry-run" if dry else RESULTS
    if dry and RESULTS in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"a dry run is no measurement and is not written under {RESULTS}")
    return out


def read(path: Path, dry: bool) -> dict[str, Any]:
    """Results that are there, empty ones else; those of the other kind of run are not kept."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["dry_run"] == dry:
            return found
    return {"dry_run": dry, "machine": {}, "stages": {}}


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write both files, whole or not at all."""
    order = [name for name in STAGES if name in results["stages"]]
    order += [name for name in results["stages"] if name not in order]
    results["stages"] = {name: results["stages"][name] for name in order}
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json.dumps(results, indent=1) + "\n"),
        (".md", markdown(results)),
    ):
        write_whole(folder / f"{STEM}{suffix}", text)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: a command that is killed leaves no half of it."""
    staged = path.with_name(path.name + ".new")
    staged.write_text(text)
    staged.replace(path)


def build(driver: str) -> tuple[str, str]:
    """Build what must be; what was done and, where that failed, why."""
    try:
        return ensure_built(driver), ""
    except (RuntimeError, OSError) as error:
        return "", f"the native engine could not be built: {error}"


class Results:
    """What the command's files hold; written anew whenever a stage has reported something.

    Attributes:
        found: all of it.
        built: what was done about the native engine; None before it was looked at.
        trouble: why there is no native engine, if that failed.
    """

    def __init__(
        self, folder: Path, dry: bool, page: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Read what there is.

        Args:
            folder: folder of the files.
            dry: whether this is a dry run.
            page: called whenever the files were written, to write one more.
        """
        self.folder, self.dry, self._page = folder, dry, page
        self.found = read(folder / f"{STEM}.json", dry)
        self.found["machine"] = short_machine()
        self.built: str | None = None
        self.trouble = ""

    def build(self) -> None:
        """Build the native engine where it must be, once."""
        if self.built is not None:
            return
        self.built, self.trouble = build("host" if self.dry else "cuda")
        if self.built:
            self.found["machine"]["native engine"] = self.built
        print(self.trouble or self.built, flush=True)

    def keep(self, key: str, stage: dict[str, Any]) -> None:
        """Put a stage's results among the others."""
        self.found["stages"][key] = stage
        write(self.folder, self.found)
        if self._page is not None:
            self._page(self.found)

    def forget(self, keys: Iterable[str]) -> None:
        """Leave out what an earlier command reported."""
        for key in keys:
            self.found["stages"].pop(key, None)


def run(wanted: Sequence[Wanted], options: Options, folder: Path, commit: str | None) -> bool:
    """Run the stages and write what they report; whether none failed."""
    results = Results(folder, options.driver != "cuda")
    return run_jobs([Job(each, each.stage.name, options) for each in wanted], results, commit)


def run_jobs(jobs: Iterable[Job], results: Results, commit: str | None) -> bool:
    """Run stages, each with options of its own; whether none failed."""
    good = True
    for job in jobs:
        found = run_job(job, results, commit)
        good = good and found["status"] in ("passed", "skipped")
    print(f"written: {results.folder / STEM}.json, {results.folder / STEM}.md", flush=True)
    return good


def run_job(job: Job, results: Results, commit: str | None) -> dict[str, Any]:
    """Run one stage and write what it reports."""
    wanted, key, options = job
    stage = wanted.stage
    head = {"question": stage.question, "parts": list(wanted.parts), "quick": options.quick}
    head |= provenance(commit)

    def keep(found: dict[str, Any]) -> None:
        results.keep(key, head | {"status": "running"} | found)

    if stage.native:
        results.build()
    print(f"{wanted.text} ...", flush=True)
    found: dict[str, Any] = {"facts": {}, "tables": {}, "checks": [], "notes": [], "seconds": 0.0}
    if results.trouble and stage.native:
        found |= {"status": "failed", "error": results.trouble}
    elif options.limit is not None and options.limit < LEAST_SECONDS:
        found |= {"status": "timed out", "error": "no time was left for it in this call"}
    else:
        found = run_stage(wanted, options, keep)
    keep(found)
    why = found.get("error") or found.get("skip") or ""
    print(f"{wanted.text}: {found['status']}, {found['seconds']:.0f} s. {why}", flush=True)
    if found.get("log"):
        print(found["log"], flush=True)
    return found


def run_plan(plan: Plan, options: Options, folder: Path, commit: str | None) -> bool:
    """Run the stages of a call and write its page; whether none failed.

    Stages have the names of their parts among the results: one may come twice.
    """
    begin = time.monotonic()
    keys = [wanted.text for entry in plan.entries for wanted in parse_stages(entry.stages)]
    page = folder / f"{STEM}_{plan.name}.md"
    results = Results(
        folder,
        options.driver != "cuda",
        lambda found: write_whole(page, summary(plan, keys, found)),
    )
    results.forget(keys)
    results.build()  # On the call's clock, but on no stage's.
    good = run_jobs(jobs_of(plan, options, begin), results, commit)
    print(f"written: {page}", flush=True)
    return good


def merge(paths: Sequence[Path], folder: Path, dry: bool) -> None:
    """Write the stages of several result files into one; of equal stages the newest stays.

    Raises:
        ValueError: a file is of another kind of run.
    """
    results = read(folder / f"{STEM}.json", dry)
    for path in paths:
        other = json.loads(path.read_text())
        if other["dry_run"] != dry:
            raise ValueError(f"{path} is {'' if other['dry_run'] else 'not '}of a dry run")
        results["machine"] |= other["machine"]
        for name, stage in other["stages"].items():
            there = results["stages"].get(name)
            if there is None or there["date"] <= stage["date"]:
                results["stages"][name] = stage
    write(folder, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its status."""
    command = parser()
    args = command.parse_args(arguments)
    dry = args.driver != "cuda"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the stage is ended too.
    try:
        wanted = parse_stages(args.stages)
        if args.plan and (args.stages or args.limit or args.quick or args.merge):
            raise ValueError("--plan names stages, limits and sizes; give no others beside it")
        folder = folder_of(args.out, dry).resolve()
        if args.limit is not None and args.limit <= 0:
            raise ValueError("--limit must be above 0 seconds")
        if args.merge:
            merge(args.merge, folder, dry)
            return 0
    except (ValueError, OSError) as error:
        command.error(str(error))
    options = Options(args.driver, args.quick, args.limit, SCRATCH, python_path(SCRATCH))
    if args.plan:
        return 0 if run_plan(PLANS[args.plan], options, folder, args.commit) else 1
    return 0 if run(wanted, options, folder, args.commit) else 1


if __name__ == "__main__":
    sys.exit(main())
