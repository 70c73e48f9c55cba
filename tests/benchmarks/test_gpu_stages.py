"""What the stages of the GPU check import, and that their rounds see what they are to see."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.aliases import BATCH, LAYERS, SLOTS, Rounds
from benchmarks.gpu.copy_plans import mixed_runs
from benchmarks.gpu.harness.compute import compute_of, granularity, shape
from benchmarks.gpu.harness.native import ROOT
from pie_vllm.transfer.engine import TransferEngine


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
    assert ROOT / "pie_vllm" / "transfer" / "native.py" in files
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
