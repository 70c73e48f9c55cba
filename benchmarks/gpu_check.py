"""One command on a GPU machine: is pie right and fast there?

Each stage runs in a process of its own and is killed at its limit; what it had reported until then
is kept, and the other stages go on. Needs torch, vLLM and this checkout, nothing else, and builds
the native engine where it must. Stages are facts, aliases, copies, pinning, overlap, exactness,
serving, parking and graphs:

    python benchmarks/gpu_check.py [--stages facts,aliases,serving:pie,stock] [--quick]

writes gpu_check.json and gpu_check.md into --out; stages that are there from an earlier command and
were not asked for again stay. The status is 1 where a stage failed or ran out of time.

`--driver host` is a dry run of this script itself on a machine without a GPU: its figures say
nothing about one, are marked so, and are never written under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu.harness.machine import provenance, short_machine
from benchmarks.gpu.harness.markdown import markdown
from benchmarks.gpu.harness.native import ROOT, ensure_built, python_path
from benchmarks.gpu.harness.process import Options, run_stage
from benchmarks.gpu.harness.stages import STAGES, Stage, Wanted, parse_stages

STEM = "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / STEM


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
    found.add_argument("--out", type=Path, help="folder of the results (benchmarks/results)")
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
        staged = folder / f"{STEM}{suffix}.new"
        staged.write_text(text)
        staged.replace(folder / f"{STEM}{suffix}")


def build(driver: str) -> tuple[str, str]:
    """Build what must be; what was done and, where that failed, why."""
    try:
        return ensure_built(driver), ""
    except (RuntimeError, OSError) as error:
        return "", f"the native engine could not be built: {error}"


def run(wanted: Sequence[Wanted], options: Options, folder: Path, commit: str | None) -> bool:
    """Run the stages and write what they report; whether none failed."""
    dry = options.driver != "cuda"
    results = read(folder / f"{STEM}.json", dry)
    built, trouble = build(options.driver) if any(w.stage.native for w in wanted) else ("", "")
    results["machine"] = short_machine() | ({"native engine": built} if built else {})
    if trouble:
        print(trouble, flush=True)
    good = True
    for each in wanted:
        stage = each.stage
        head = {"question": stage.question, "parts": list(each.parts), "quick": options.quick}
        head |= provenance(commit)

        def keep(found: dict[str, Any], stage: Stage = stage, head: dict[str, Any] = head) -> None:
            results["stages"][stage.name] = head | {"status": "running"} | found
            write(folder, results)

        print(f"{each.text} ...", flush=True)
        if trouble and stage.native:
            found: dict[str, Any] = {"facts": {}, "tables": {}, "checks": [], "notes": []}
            found |= {"status": "failed", "seconds": 0.0, "error": trouble}
        else:
            found = run_stage(each, options, keep)
        keep(found)
        good = good and found["status"] in ("passed", "skipped")
        why = found.get("error") or found.get("skip") or ""
        print(f"{each.text}: {found['status']}, {found['seconds']:.0f} s. {why}", flush=True)
        if found.get("log"):
            print(found["log"], flush=True)
    print(f"written: {folder / STEM}.json, {folder / STEM}.md", flush=True)
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
        folder = folder_of(args.out, dry).resolve()
        if args.limit is not None and args.limit <= 0:
            raise ValueError("--limit must be above 0 seconds")
        if args.merge:
            merge(args.merge, folder, dry)
            return 0
    except (ValueError, OSError) as error:
        command.error(str(error))
    options = Options(args.driver, args.quick, args.limit, SCRATCH, python_path(SCRATCH))
    return 0 if run(wanted, options, folder, args.commit) else 1


if __name__ == "__main__":
    sys.exit(main())
