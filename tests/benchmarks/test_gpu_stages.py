"""What the stages of the GPU check import, and that their rounds see what they are to see."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import parking
from benchmarks.gpu.aliases import BATCH, LAYERS, SLOTS, Rounds
from benchmarks.gpu.copy_plans import mixed_runs
from benchmarks.gpu.harness.compute import compute_of, granularity, shape
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineError
from benchmarks.gpu.harness.records import Reporter, collect, failed_checks
from benchmarks.harness.builds import ROOT
from pie_vllm.engine.transfer_engine import TransferEngine


def modules() -> list[Path]:
    """All files of the check, and those of this repository that they import."""
    found: list[Path] = []
    waiting = [ROOT / "benchmarks" / "gpu_check.py", *(ROOT / "benchmarks/gpu").rglob("*.py")]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in imported(path):
            there = ROOT / (name.replace(".", "/") + ".py")
            package = ROOT / name.replace(".", "/") / "__init__.py"
            waiting += [each for each in (there, package) if each.exists()]
    return found


def imported(path: Path) -> list[str]:
    """Names of the modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def test_nothing_else_is_imported() -> None:
    """Torch, vLLM, what vLLM itself needs, and two packages that may be missing."""
    files = modules()
    assert ROOT / "pie_vllm" / "engine" / "native.py" in files
    allowed = {"torch", "numpy", "vllm", "safetensors", "packaging", "benchmarks", "pie_vllm"}
    optional = {"pynvml", "cuda"}
    for path in files:
        for name in imported(path):
            top = name.partition(".")[0]
            if top in optional:
                assert path.name in ("facts.py", "nvrtc.py")
            else:
                assert top in allowed | sys.stdlib_module_names, f"{path}: {name}"
    assert not any(path.name in ("display.py", "drawing.py") for path in files)


@pytest.mark.parametrize("aliased", [True, False])
def test_alias_rounds_see_memory_that_is_not_shared(aliased: bool) -> None:
    sizes = shape(LAYERS, 4096, 8, 4, SLOTS, BATCH, granularity("host"))
    with TransferEngine(sizes, driver="host") as engine:
        rounds = Rounds(engine, compute_of("host"))
        if not aliased:
            rounds.pooled = [page.clone() for page in rounds.pooled]
        wrong = [way(0, 8) for way in rounds.ways().values()]
        rounds.close()
    assert len(wrong) == 3
    assert all((count == 0) == aliased for count in wrong)


@pytest.mark.parametrize("longest", [1, 16])
def test_runs_of_a_real_plan_fill_all_blocks_and_stay_apart(longest: int) -> None:
    blocks, rows = 256, 512
    runs = mixed_runs(blocks, 4, rows, longest)
    assert sorted(run.block + i for run in runs for i in range(run.count)) == list(
        range(4, 4 + blocks)
    )
    used = sorted(run.row + i for run in runs for i in range(run.count))
    assert len(set(used)) == blocks
    assert used[-1] < rows
    ends = {run.row + run.count for run in runs}
    assert not ends & {run.row for run in runs}


@pytest.mark.parametrize("size", [parking.FULL, parking.QUICK, parking.DRY])
def test_chats_of_parking_outgrow_the_device_and_those_under_way_fit(size: parking.Size) -> None:
    turns = size.turns.outgrowing(size.device)
    assert turns.working_set == pytest.approx(4 * size.device, rel=0.01)
    assert turns.at_once * turns.longest < 0.8 * size.device
    # In `preempted` more than fit run at the same time, and no chat alone is too long.
    asks = size.single.asks(None)
    assert sum(len(ask.prompt) + ask.tokens for ask in asks) > 2 * size.device
    assert 4 * size.single.longest < size.device


class FakeEngine:
    """Answers each load with the figures it was made with; fails from a load on."""

    def __init__(self, fails_at: int = 99, **figures: float) -> None:
        self.figures, self.fails_at = figures, fails_at
        self.loads: list[dict[str, Any]] = []

    def ask(self, what: str, load: dict[str, Any]) -> dict[str, float]:
        assert what == "chats"
        self.loads.append(load)
        if len(self.loads) >= self.fails_at:
            raise EngineError("lost")
        keys = (*parking.COMPARED, *parking.COUNTED, *parking.TIERS, *parking.MOVED)
        found: dict[str, float] = dict.fromkeys((*keys, "prompt_tokens"), 100.0)
        return {**found, "seconds": 0.1, "requests_s": 5.0, "recomputed_tokens": 0, **self.figures}


def parking_of(
    tmp_path: Path, parts: tuple[str, ...] = (), **engines: FakeEngine
) -> dict[str, Any]:
    """What the stage reports of these engines."""
    deadline = time.monotonic() + 100
    path = tmp_path / "records.jsonl"
    context = Context("host", True, parts, 100, deadline, tmp_path, Reporter(path))
    size = parking.DRY._replace(repeats=3)
    rounds = parking.Rounds(context, size, parking.named(context, parking.LOADS))
    rounds.run(engines)  # type: ignore[arg-type]
    for load, figures in rounds.figures.items():
        parking.finish(context, load, figures)
    return collect(path)


def test_each_side_of_parking_gets_the_same_loads(tmp_path: Path) -> None:
    """New chats each round; chats of `preempted` come at one rate, found before."""
    stock, pie, everything = (FakeEngine() for _ in range(3))
    found = parking_of(tmp_path, stock=stock, pie=pie, stock_all=everything)
    assert stock.loads == pie.loads == everything.loads[1:]
    assert len({str(load) for load in everything.loads}) == 7
    single = [load for load in everything.loads if "single" in load]
    assert [load["rate"] for load in single] == [None, *[6.0] * 3]
    order = [row["name"] for row in found["tables"]["returning: runs"]]
    assert [order[i] for i in (0, 3, 6)] == ["stock", "pie", "stock_all"]


def test_a_side_of_parking_that_ends_leaves_the_others(tmp_path: Path) -> None:
    """Ratios are of the rounds that both sides had."""
    sides = {"stock": FakeEngine(), "connector": FakeEngine(fails_at=2), "pie": FakeEngine()}
    found = parking_of(tmp_path, ("returning",), **sides)
    assert failed_checks(found)[0] == "connector serves"
    rows = {row["name"]: row["runs"] for row in found["tables"]["returning: medians"]}
    assert rows == {"stock": 3, "connector": 1, "pie": 3}
    table = found["tables"]["returning: ratios, paired by round: median [least .. most]"]
    assert [row["ratio"] for row in table] == [
        "pie / stock",
        "connector / stock",
        "pie / connector",
    ]


@pytest.mark.parametrize(
    ("pie", "failed"),
    [
        ({"prefill_tokens": 29.0}, []),
        ({"prefill_tokens": 31.0}, ["returning: prefill_tokens, pie / stock"]),
        (
            {"prefill_tokens": 9.0, "bytes_restored": 0.0},
            ["returning: bytes that pie restored, least"],
        ),
    ],
)
def test_counts_of_parking_must_hold_and_times_are_aims(
    tmp_path: Path, pie: dict[str, float], failed: list[str]
) -> None:
    slow = FakeEngine(**pie, tok_s=99.0, ttft_p50_ms=101.0, recomputed_tokens=1.0)
    found = parking_of(tmp_path, stock=FakeEngine(), connector=FakeEngine(), pie=slow)
    assert failed_checks(found) == failed
    missed = [check["name"] for check in found["checks"] if not check["ok"] and check["target"]]
    assert missed == [
        "returning: pie / connector",
        "returning: ttft_p50_ms, pie / connector",
        "preempted: pie / connector",
        "preempted: ttft_p50_ms, pie / connector",
        "preempted: tokens that pie recomputed, most",
    ]
    fast = FakeEngine(prefill_tokens=9.0)
    found = parking_of(tmp_path, stock=FakeEngine(), connector=FakeEngine(), pie=fast)
    assert all(check["ok"] for check in found["checks"])
