"""The one command for GPU machines, as far as it can be run without one.

Dry runs over the host driver show that the stages run and report; their figures mean nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import overlap
from benchmarks.gpu.harness import native
from benchmarks.gpu.harness.process import Options
from benchmarks.gpu.harness.records import Reporter, collect
from benchmarks.gpu.harness.sides import Side, groups
from benchmarks.gpu.harness.stages import LIMIT_SECONDS_MAX, STAGES, Stage, Wanted, parse_stages

ROOT = native.ROOT
DRY_STAGES = ("facts", "memory", "copies", "pinning", "overlap")
ABSENT = ("rich", "matplotlib", "hypothesis", "gguf", "openai", "pytest")
"""Packages of this environment that a GPU machine lacks."""

KEYS = {"question", "parts", "quick", "date", "command", "commit", "sources", "status"}
KEYS |= {"seconds", "limit", "facts", "tables", "checks", "notes"}


def command(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def read(folder: Path) -> dict[str, Any]:
    """The results that lie in a folder."""
    found: dict[str, Any] = json.loads((folder / "gpu_check.json").read_text())
    return found


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of a dry run, on a machine that lacks what a GPU machine lacks."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for name in ABSENT:
        package = folder / "absent" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ImportError('there is no {name} here')\n")
    before = {path: path.stat().st_mtime_ns for path in gpu_check.RESULTS.iterdir()}
    done = command(
        *("--driver", "host", "--quick", "--stages", ",".join(DRY_STAGES)),
        *("--out", str(folder / "out"), "--commit", "abc"),
        path=folder / "absent",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in gpu_check.RESULTS.iterdir()}
    return folder / "out"


def test_results_have_all_that_a_reader_needs(dry: Path) -> None:
    found = read(dry)
    assert found["dry_run"] is True
    assert {"device", "driver", "CUDA of the driver", "torch", "vllm"} <= set(found["machine"])
    assert tuple(found["stages"]) == DRY_STAGES
    for stage in found["stages"].values():
        assert set(stage) >= KEYS
        assert stage["status"] == "passed"
        assert stage["commit"] == "abc"
        assert "--driver host" in stage["command"]
        for rows in stage["tables"].values():
            assert all(isinstance(row, dict) for row in rows)
        for check in stage["checks"]:
            assert set(check) == {"name", "found", "asked", "ok", "target"}
    assert str(ROOT) not in json.dumps(found)


def test_figures_are_there(dry: Path) -> None:
    stages = read(dry)["stages"]
    copies = stages["copies"]["tables"]
    assert {row["direction"] for row in copies["plans: a batch for each layer"]} == {
        *("load", "store", "both")
    }
    assert all(row["GBps"] > 0 for row in copies["single copies: one driver call each"])
    assert "gather kernel: needs a GPU" in stages["copies"]["notes"]
    steps = stages["overlap"]["tables"]["steps with loads beside the same steps without"]
    assert {row["ring_slots"] for row in steps} == {2, 3, 4}
    small = stages["overlap"]["tables"][
        "small copies on the compute stream between a step's begin and its first gate"
    ]
    assert {(row["head_first"], row["prefer_overlap"]) for row in small} == set(overlap.WAYS)
    assert {bool(row["blocks"]) for row in small} == {False, True}
    assert all(row["copies"] == overlap.QUICK.steps * overlap.QUICK.turns for row in small)
    checks = {check["name"]: check for check in stages["overlap"]["checks"]}
    assert checks["ring pages that held other bytes"]["found"] == 0
    assert checks["pages found wrong with skip_loads"]["found"] > 0
    assert checks["pages found wrong with skip_stores"]["found"] > 0
    assert "engine: commit and release of chunks" in stages["pinning"]["tables"]


def test_markdown_says_the_same(dry: Path) -> None:
    text = (dry / "gpu_check.md").read_text()
    assert "dry run" in text.splitlines()[2]
    for name in DRY_STAGES:
        assert f"\n## {name}\n" in text
        assert f"| {name} | **passed** |" in text
    assert "| check | found | asked |" in text


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_parking_runs_dry_over_vllm(tmp_path: Path) -> None:
    """Its own checks: pie restores KV, and computes less than a third of stock's prompt tokens."""
    wanted = "parking:returning,stock,pie"
    done = command("--driver", "host", "--quick", "--stages", wanted, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    stage = read(tmp_path)["stages"]["parking"]
    assert [check["ok"] for check in stage["checks"]] == [True, True]
    rows = stage["tables"]["returning: runs"]
    assert [row["name"] for row in rows] == ["stock", "pie", "pie", "stock"]
    for row in rows:
        # Whoever computes a prompt token has not found it in a cache.
        found = row["hit_device"] + row["hit_pooled"] + row["hit_cpu"]
        assert row["prefill_tokens"] + found == row["prompt_tokens"]
        assert (row["restored_MiB"] > 0) == (row["name"] == "pie")


@pytest.mark.vllm
@pytest.mark.soak
def test_a_model_with_windows_runs_dry_over_vllm(tmp_path: Path) -> None:
    """Stock's answers, and others where loads are left out."""
    wanted = "exactness:windows,control"
    done = command("--driver", "host", "--stages", wanted, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    stage = read(tmp_path)["stages"]["exactness"]
    assert all(check["ok"] for check in stage["checks"])
    (row,) = stage["tables"]["settings"]
    assert row["equal_logprobs"]
    assert row["pooled_peak"] > 20


def test_a_dry_run_is_never_written_among_results() -> None:
    done = command("--driver", "host", "--stages", "facts", "--out", "benchmarks/results")
    assert done.returncode == 2
    assert "no measurement" in done.stderr


def test_without_a_gpu_the_error_says_so(tmp_path: Path) -> None:
    done = command("--stages", "aliases:graph", "--out", str(tmp_path))
    stage = read(tmp_path)["stages"]["aliases"]
    if stage["status"] == "passed":
        pytest.skip("a CUDA device answers")
    assert done.returncode == 1
    assert "no CUDA device" in stage["error"]


def test_wrong_names_are_refused_with_the_valid_ones() -> None:
    done = command("--stages", "facts,speed")
    assert done.returncode == 2
    assert "unknown stage 'speed'" in done.stderr
    assert all(name in done.stderr for name in STAGES)
    with pytest.raises(ValueError, match="valid parts are stock, pie"):
        parse_stages("serving:fast")
    with pytest.raises(ValueError, match="valid parts are none"):
        parse_stages("facts:fast")


def test_parts_follow_their_stage() -> None:
    assert [wanted.text for wanted in parse_stages("serving:pie,stock,facts")] == [
        "facts",
        "serving:pie,stock",
    ]
    (many,) = parse_stages("serving:pie,stock,connector,pie_full")
    assert many.parts == ("pie", "stock", "connector", "pie_full")
    assert [wanted.text for wanted in parse_stages("serving:pie,serving:pie")] == ["serving:pie"]
    assert [wanted.stage for wanted in parse_stages("")] == list(STAGES.values())
    assert max(stage.limit for stage in STAGES.values()) <= LIMIT_SECONDS_MAX


def stage(part: str, limit: int = 60) -> Wanted:
    """A stage of the helpers'."""
    code = "tests.helpers.gpu_stages"
    return Wanted(Stage(part, "How does it end?", limit, (part,), False, code), (part,))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options("host", True, None, tmp_path / "scratch", str(ROOT))


def test_what_fails_stops_nothing_else(tmp_path: Path, options: Options) -> None:
    parts = ("raises", "crashes", "wrong", "leaves", "good")
    assert not gpu_check.run([stage(part) for part in parts], options, tmp_path, None)
    stages = read(tmp_path)["stages"]
    ends = {name: (found["status"], found.get("error", "")) for name, found in stages.items()}
    assert ends == {
        "raises": ("failed", "ValueError: this went wrong"),
        "crashes": ("failed", "ended by signal 11"),
        "wrong": ("failed", "does not hold: what must hold"),
        "leaves": ("skipped", ""),
        "good": ("passed", ""),
    }
    assert "Traceback" in stages["raises"]["log"]
    assert stages["leaves"]["skip"] == "not on this machine"
    row = {"part": "good", "number": 0.333333, "infinite": None, "text": "a | b\nc"}
    assert stages["good"]["tables"]["rows"] == [row]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "a \\| b c" in text
    assert "**does not hold**" in text
    assert "missed" in text


def test_a_stage_killed_at_its_limit_keeps_what_it_reported(
    tmp_path: Path, options: Options
) -> None:
    begin = time.monotonic()
    assert not gpu_check.run([stage("hangs", 4), stage("good")], options, tmp_path, None)
    assert time.monotonic() - begin < 60
    stages = read(tmp_path)["stages"]
    assert stages["hangs"]["status"] == "timed out"
    assert stages["hangs"]["tables"]["rows"][0]["part"] == "hangs"
    assert stages["good"]["status"] == "passed"
    child = Path("/proc") / str(stages["hangs"]["facts"]["child"])
    assert not child.exists() or "State:\tZ" in (child / "status").read_text()


def test_a_command_that_is_killed_leaves_what_there_was(tmp_path: Path, options: Options) -> None:
    text = (
        "from tests.benchmarks.test_gpu_check import *\n"
        f"options = Options('host', True, None, Path({str(options.scratch)!r}), {str(ROOT)!r})\n"
        f"gpu_check.run([stage('hangs')], options, Path({str(tmp_path)!r}), None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], cwd=ROOT) as process:
        while not (tmp_path / "gpu_check.md").exists():
            assert process.poll() is None
            time.sleep(0.1)
        found = read(tmp_path)["stages"]["hangs"]
        while not found["tables"]:
            time.sleep(0.1)
            found = read(tmp_path)["stages"]["hangs"]
        process.kill()
    assert found["status"] == "running"
    assert found["tables"]["rows"][0]["part"] == "hangs"
    child = Path("/proc") / str(found["facts"]["child"])
    if child.exists():  # The stage ended with the command; its own children may outlive both.
        os.kill(int(child.name), 9)


def test_stages_of_earlier_commands_stay(tmp_path: Path, options: Options) -> None:
    for part in ("good", "leaves"):
        assert gpu_check.run([stage(part)], options, tmp_path, None)
    assert set(read(tmp_path)["stages"]) == {"good", "leaves"}
    other = tmp_path / "other"
    gpu_check.merge([tmp_path / "gpu_check.json"], other, dry=True)
    assert read(other)["stages"] == read(tmp_path)["stages"]
    with pytest.raises(ValueError, match="dry run"):
        gpu_check.merge([tmp_path / "gpu_check.json"], other, dry=False)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Reporter(path).note("whole")
    path.write_text(path.read_text() + '{"kind": "note", "te')
    assert collect(path)["notes"] == ["whole"]


def test_the_engine_is_built_where_it_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libpie.so"
    assert "missing" in native.reason_to_build("host", library)
    library.write_bytes(b"")
    os.utime(library, (1, 1))
    assert "older" in native.reason_to_build("host", library)
    os.utime(library)
    assert native.reason_to_build("host", library) == ""
    assert "without the CUDA driver" in native.reason_to_build("cuda", library)
    library.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="no C"):
        native.ensure_built("host", library)


def test_engines_share_the_device_while_they_fit() -> None:
    gib = 1 << 30
    sides = {name: Side({}, None, 20 * gib, {}) for name in "abc"}
    assert groups(sides, 140 * gib) == [["a", "b", "c"]]
    assert groups(sides, 60 * gib) == [["a", "b"], ["c"]]
    assert groups(sides, 20 * gib) == [["a"], ["b"], ["c"]]


def test_vllm_finds_the_plugin_without_an_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "entry_points", lambda **_: [])
    folder = native.plugin_folders(tmp_path)[-1]
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    (point,) = found.entry_points
    assert (point.group, point.name) == ("vllm.general_plugins", "pie")
    assert callable(point.load())
