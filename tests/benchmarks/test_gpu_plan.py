"""Plans of the GPU check: calls of some minutes, each stage with a limit, one page at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import copy_gather, exactness, memory, overlap, pinning
from benchmarks.gpu.harness.compute import compute_of
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.models import SMALL, WINDOWS, config_of
from benchmarks.gpu.harness.plans import CLOSING_SECONDS, DRY_STRETCH, PLANS, Entry, Plan, jobs_of
from benchmarks.gpu.harness.process import Options
from benchmarks.gpu.harness.records import Reporter, collect
from benchmarks.gpu.harness.stages import STAGES, Stage, parse_stages
from benchmarks.gpu.harness.summary import FIGURES, summary
from benchmarks.harness.builds import ROOT
from pie_vllm.engine.gather import GatherImage, NoGather
from tests.helpers import standin as builds
from tests.helpers.gather_kernel import gather_kernel
from tests.helpers.standin import Standin, load

PARTS = ("good", "wrong", "hangs", "raises")


def context_of(
    tmp_path: Path, driver: str = "host", parts: tuple[str, ...] = (), limit: float = 100
) -> Context:
    report = Reporter(tmp_path / "records.jsonl")
    return Context(driver, True, parts, limit, time.monotonic() + limit, tmp_path, report)


def tables(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = collect(tmp_path / "records.jsonl")["tables"]
    return found


# Which stages, with which limits.


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_stages_of_a_plan_fit_its_call(plan: Plan) -> None:
    """With what closing takes; none is above its stage's own limit or unknown."""
    assert sum(entry.limit for entry in plan.entries) + CLOSING_SECONDS <= plan.limit <= 600
    for entry in plan.entries:
        for wanted in parse_stages(entry.stages):
            assert entry.limit <= wanted.stage.limit


def test_the_plans_are_those_that_were_written_down() -> None:
    """And quick only where figures may be few."""
    first = [(entry.stages, entry.limit) for entry in PLANS["first"].entries]
    assert first == [
        ("memory", 24),
        ("facts,aliases:self_test,stream", 55),
        ("graphs:engine", 65),
        ("copies:real,gather", 65),
        ("overlap:ring3", 65),
        ("pinning:chunks,beside,tables", 28),
        ("aliases:graph", 18),
        ("exactness:v2,triton_attn,float32,eager", 95),
    ]
    second = [(entry.stages, entry.limit) for entry in PLANS["second"].entries]
    assert second == [
        ("exactness:v2,flash_attn,bfloat16,full,async,control", 145),
        ("graphs:full", 165),
    ]
    quick = [entry.stages for plan in PLANS.values() for entry in plan.entries if entry.quick]
    assert quick == ["graphs:full"]


@pytest.mark.parametrize("limit", [95, 145, 540])
def test_a_comparison_of_engines_is_begun_under_any_limit(tmp_path: Path, limit: float) -> None:
    """Of two engines; where there is much time each is counted on for its own."""
    context = context_of(tmp_path, "cuda", limit=limit)
    assert context.has_time(2 * exactness.engine_seconds(context), "a setting")
    assert exactness.engine_seconds(context) == min(75, limit / 4)


def test_limits_are_what_is_left_of_an_entry_and_of_the_call() -> None:
    options = Options("cuda", False, None, Path(), "")
    plan = Plan("p", 100, (Entry("facts,aliases", 30), Entry("copies", 50, True)), "Why?")
    begin = time.monotonic()
    first, second, third = jobs_of(plan, options, begin)
    assert [job.key for job in (first, second, third)] == ["facts", "aliases", "copies"]
    assert [job.options.quick for job in (first, second, third)] == [False, False, True]
    for job, limit in ((first, 30), (second, 30), (third, 50)):
        assert limit - 1 < (job.options.limit or 0) <= limit
    late = list(jobs_of(plan, options, begin - 60))
    assert [round(job.options.limit or 0) for job in late] == [30, 30, 36]
    assert list(jobs_of(plan, options, begin - 200))[-1].options.limit == 0
    dry = next(jobs_of(plan, options._replace(driver="host"), time.monotonic()))
    assert dry.options.quick
    assert round(dry.options.limit or 0) == 30 * DRY_STRETCH


# How a call ends.


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose parts end in every way."""
    stage = Stage("fake", "How does it end?", 60, PARTS, False, "tests.helpers.gpu_stages")
    monkeypatch.setitem(STAGES, "fake", stage)
    monkeypatch.setattr(gpu_check.Results, "build", lambda _: None)


@pytest.mark.usefixtures("fake_stages")
def test_a_call_leaves_one_page_whatever_its_stages_do(tmp_path: Path) -> None:
    """What ran, what did not, what does not hold, and the ends of logs."""
    entries = (
        Entry("fake:good", 20),
        Entry("fake:wrong", 20),
        Entry("fake:hangs", 5 / DRY_STRETCH),
        Entry("fake:raises", 20),
    )
    options = Options("host", False, None, tmp_path / "scratch", str(ROOT))
    out = tmp_path / "out"
    assert not gpu_check.run_plan(Plan("try", 90, entries, "How?"), options, out, "abc")
    found = json.loads((out / "gpu_check.json").read_text())["stages"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        "fake:good": "passed",
        "fake:wrong": "failed",
        "fake:hangs": "timed out",
        "fake:raises": "failed",
    }
    page = (out / "gpu_check_try.md").read_text()
    assert page.startswith("# Plan try: 1 of 4 stages passed")
    assert "| fake:good | **passed** |" in page
    assert "killed at its limit" in page
    assert "fake:wrong: what must hold: 3, asked 0" in page
    assert "ValueError: this went wrong" in page
    assert "dry run" in page
    assert len(page.splitlines()) < 100


@pytest.mark.usefixtures("fake_stages")
def test_stages_without_time_say_so_and_old_results_go(tmp_path: Path) -> None:
    """Of a call whose time is up."""
    options = Options("host", False, None, tmp_path / "scratch", str(ROOT))
    plan = Plan("try", 90, (Entry("fake:good", 20),), "How?")
    assert gpu_check.run_plan(plan, options, tmp_path, "abc")
    short = plan._replace(limit=(CLOSING_SECONDS + 1) / DRY_STRETCH)
    begin = time.monotonic()
    assert not gpu_check.run_plan(short, options, tmp_path, "abc")
    assert time.monotonic() - begin < 10
    page = (tmp_path / "gpu_check_try.md").read_text()
    assert "| fake:good | **timed out** |" in page
    assert "no time was left" in page


def test_a_page_names_stages_that_were_not_reached() -> None:
    found = {"dry_run": False, "machine": {"device": "H200"}, "stages": {}}
    page = summary(PLANS["second"], ["exactness", "graphs:full"], found)
    assert "| graphs:full | not reached |" in page


def row_for(figure: Any) -> dict[str, Any]:
    """A row that has a value for a figure."""
    found = {"share_of_peak": 0.9, "longest_run": 1, "page_KiB": 64, "share_of_link": 0}
    found |= {"step_with_loads_ms": 5.15, "step_ms": 5.0, "in_graph_ratio": 1.3, "ratio": 1.001}
    found |= {"device_MiB_per_GiB": 2.0, "head_first": True, "prefer_overlap": True}
    found |= {"median_us": 7.0, "slowdown": 1.1, "ctas": 1}
    if "half" in figure.name:
        found["share_of_link"] = 0.5
    if "merged" in figure.name:
        found["longest_run"] = 16
    if "all first" in figure.name:
        found["head_first"] = False
    if " CTAs" in figure.name:
        found["ctas"] = int(figure.name.split(" CTAs")[0].split()[-1])
    return found


def test_figures_are_judged_by_what_was_predicted() -> None:
    """Each finds its row; those outside of the range are surprises."""
    verdicts = {f.name: f.verdict(f.value([row_for(f)])) for f in FIGURES}
    values = {f.name: f.value([row_for(f)]) for f in FIGURES}
    assert None not in values.values()
    assert verdicts["merged runs, share of the peak, least"] == "**surprise**"
    assert verdicts["single pages of 64 KiB, share of the peak"] == "as predicted"
    assert values["gates alone, beside a step of 5 ms"] == pytest.approx(1.03)
    assert verdicts["a graph's loads at half of the link, beside the graph alone"] == "**surprise**"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_plan_takes_no_stages_beside_it() -> None:
    done = command("--plan", "first", "--stages", "facts")
    assert done.returncode == 2
    assert "give no others beside it" in done.stderr


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_first_call_runs_dry(tmp_path: Path) -> None:
    """All of its stages, vLLM's too, into $OUT."""
    done = command("--plan", "first", "--driver", "host", OUT=str(tmp_path))
    page = (tmp_path / "gpu_check_first.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    wanted = [w.text for e in PLANS["first"].entries for w in parse_stages(e.stages)]
    assert sorted(found) == sorted(wanted)
    assert page.startswith("# Plan first: 9 of 9 stages passed")
    assert "dry run" in page
    assert str(ROOT) not in page


# What stages measure that was not seen before.


@pytest.fixture
def standin() -> Iterator[Standin]:
    if builds.include_folder() is None:
        pytest.skip("no cuda.h")
    found = load()
    found.set(race_check=0)
    yield found
    found.clear()
    found.reset()


@pytest.mark.parametrize(("share", "ok"), [(512, True), (256, False)])
def test_device_memory_of_a_pool_is_found(
    standin: Standin, tmp_path: Path, share: int, ok: bool
) -> None:
    """Page tables that come while it grows; more of them than the budget is a missed target."""
    standin.set(page_table_share=share)
    context = context_of(tmp_path, "cuda", ("tables",))
    pinning.tables(context, 2 << 20)
    (row,) = tables(tmp_path)["device memory of the pool"]
    assert row["device_MiB_per_GiB"] == pytest.approx(1024 / share)
    (check,) = collect(tmp_path / "records.jsonl")["checks"]
    assert check["ok"] is ok
    assert check["target"]


def test_compute_beside_the_kernel_is_compared_for_each_width(tmp_path: Path) -> None:
    """Here a kernel that slows compute down by its CTAs."""
    context, busy = context_of(tmp_path), [0]

    class Slow(copy_gather.Products):
        def run(self) -> None:
            time.sleep(0.002 * (1 + 0.1 * busy[0]))
            busy[0] = 0

    def launch(ctas: int) -> Any:
        busy[0] = ctas
        return lambda: 0.004 / ctas

    products = Slow(compute_of("host"), 2, 8, 8)
    copy_gather.beside(context, compute_of("host"), products, launch, 1 << 20)
    rows = tables(tmp_path)[copy_gather.BESIDE]
    assert [row["ctas"] for row in rows] == [1, 2, 4, 8, 12]
    assert rows[0]["slowdown"] < rows[2]["slowdown"] < rows[4]["slowdown"]
    assert rows[0]["GBps"] == pytest.approx(2**20 / 0.004 / 1e9, rel=1e-4)


def test_tables_of_the_check_are_those_of_the_kernel(standin: Standin) -> None:
    """Every second piece is copied, to the same place, and nothing else."""
    assert standin.violations() == []
    kernel = gather_kernel()
    source = torch.arange(40 * 1000, dtype=torch.int64).to(torch.int8) | 1
    target = torch.zeros_like(source)
    table = copy_gather.pieces(target, source, 1000, 20)
    count = torch.tensor([20])
    kernel.run([table.entries.data_ptr(), count.data_ptr(), 0, table.base, table.page, 0], 2)
    kernel.reset()
    there, wanted = target.view(20, 2, 1000), source.view(20, 2, 1000)
    assert torch.equal(there[:, 0], wanted[:, 0])
    assert not there[:, 1].any()


class WidthsBench:
    """Steps that the copy engines do not slow down, and the kernel by 10 % a CTA."""

    row_bytes, sizes = 1 << 20, overlap.QUICK
    longest_run, load_seconds, submission = overlap.LONGEST_RUN, 0.002, 0.0001

    def __init__(self) -> None:
        self.engine = self
        self.ctas, self.runs = 0, set[int]()

    def use_gather(self, image: bytes | None, threshold: int, blocks: int = 8) -> None:
        assert image is None
        self.ctas = blocks if threshold > 1 else 0

    def timed(self, loads: int | None, reads: int) -> float:
        assert reads == 20
        self.runs.add(self.longest_run)
        return 0.01 * (1 + 0.1 * self.ctas if loads else 1)


def test_loads_by_the_kernel_are_compared_for_each_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they take from compute, beside the copy engines."""
    context, bench = context_of(tmp_path), WidthsBench()
    monkeypatch.setattr(overlap, "load_gather", lambda *_: GatherImage(b"", "ahead"))
    overlap.by_kernel(context, bench, 3, 32, 0.5, 20)  # type: ignore[arg-type]
    rows = tables(tmp_path)[overlap.KERNEL]
    assert [row["ctas"] for row in rows] == [0, 1, 2, 4, 8]
    assert [row["slowdown"] for row in rows] == pytest.approx([1.0, 1.1, 1.2, 1.4, 1.8])
    assert rows[0]["GBps"] == pytest.approx(20 * 2**20 / 0.002 / 1e9, rel=1e-4)
    assert (bench.runs, bench.longest_run, bench.ctas) == ({1}, overlap.LONGEST_RUN, 0)
    monkeypatch.setattr(overlap, "load_gather", lambda *_: NoGather("there is none"))
    overlap.by_kernel(context, bench, 3, 32, 0.5, 20)  # type: ignore[arg-type]
    assert len(tables(tmp_path)[overlap.KERNEL]) == 5


def test_memory_is_touched_while_enough_is_left(tmp_path: Path) -> None:
    context, mib = context_of(tmp_path), 1 << 20
    left = [memory.KEPT + 9 * mib]

    def available() -> int:
        left[0] -= 2 * mib
        return left[0]

    assert memory.touch(6 * mib, context, mib, lambda: memory.KEPT + 5 * mib) == 6 * mib
    begin = time.monotonic()
    assert 0 < memory.touch(64 * mib, context, mib, available, wait=0.2) < 10 * mib
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (("v2", "triton_attn", "float32", "eager"), ["v2 triton_attn float32 eager async"]),
        (("windows", "eager"), ["v1 triton_attn float32 eager sync windows"]),
    ],
)
def test_settings_of_exactness_follow_their_parts(
    tmp_path: Path, parts: tuple[str, ...], names: list[str]
) -> None:
    """A model with windows is none of those that a short call has time for."""
    found = exactness.choose(context_of(tmp_path, "cuda", parts=parts))
    assert [setting.name for setting in found] == names


def test_a_model_with_windows_has_groups_of_equal_size() -> None:
    """Blocks of its windows are resident, and a block has a page in each layer of one group."""
    kinds = config_of(WINDOWS)["layer_types"]
    assert [kinds.count(kind) for kind in ("full_attention", "sliding_attention")] == [4, 8]
    assert WINDOWS.regions == 4
    assert WINDOWS.window_blocks(32) == 2 * 3
    assert "layer_types" not in config_of(SMALL)
    assert (SMALL.regions, SMALL.window_blocks(32)) == (SMALL.layers, 0)
