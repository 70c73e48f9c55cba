"""The native library: found, of the right version, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness.builds import CSRC
from pie_vllm.engine.native import (
    ABI_VERSION,
    DEBUG_FLAGS,
    PLAN_AFTER_ALL,
    PLAN_STORES_FIRST,
    load_library,
)
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import NativeLibraryError, TransferError
from tests.engine.driving import geometry, inject, plan, run_step
from tests.helpers.builds import build_program
from tests.helpers.standin import library_folder
from tests.helpers.streams import DriverEvent, DriverStream


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(NativeLibraryError, match="missing: build it with"):
        TransferEngine(geometry(), library_path=tmp_path / "libpie.so")


def test_not_a_library(tmp_path: Path) -> None:
    path = tmp_path / "libpie.so"
    path.write_text("text")
    with pytest.raises(NativeLibraryError, match="cannot be used"):
        load_library(path)


def test_another_abi_version(tmp_path: Path) -> None:
    path = tmp_path / "libpie.so"
    source = "int pie_abi_version(void) { return 99; }"
    compiler = os.environ.get("CC", "gcc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)],
        input=source,
        text=True,
        check=True,
    )
    with pytest.raises(NativeLibraryError, match=f"version 99, this package expects {ABI_VERSION}"):
        load_library(path)


def test_library_without_our_symbols(tmp_path: Path) -> None:
    path = tmp_path / "libpie.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(path)], check=True)
    with pytest.raises(NativeLibraryError, match="cannot be used"):
        load_library(path)


def test_header_and_binding_agree() -> None:
    header = (CSRC / "pie.h").read_text()
    assert f"#define PIE_ABI_VERSION {ABI_VERSION}" in header
    for word, flag in DEBUG_FLAGS.items():
        assert f"PIE_DEBUG_{word.upper()} = {flag}," in header
    assert f"PIE_PLAN_STORES_FIRST = {PLAN_STORES_FIRST}," in header
    assert f"PIE_PLAN_AFTER_ALL = {PLAN_AFTER_ALL}," in header


def _open_things() -> tuple[int, int, int]:
    with open("/proc/self/maps") as maps:
        mapped = sum("pie-device" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mapped


def _use(fail: bool) -> None:
    with TransferEngine(geometry()) as engine:
        stream, event = DriverStream(engine), DriverEvent(engine)
        event.record(stream)
        run_step(engine, plan(1, loads=((8, 0, 1),), stores=((0, 0, 1),)), stream=stream)
        if fail:
            inject(engine, "fail")
            with contextlib.suppress(TransferError):  # a copy of step 1 may be the one
                engine.begin_step(plan(2, loads=None))


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_after_close(fail: bool) -> None:
    _use(fail)
    before = _open_things()
    for _ in range(5):
        _use(fail)
    assert _open_things() == before


def test_nothing_is_left_of_an_engine_that_could_not_be_made() -> None:
    before = _open_things()
    with pytest.raises(TransferError):
        TransferEngine(geometry(rows=1 << 40, chunk_rows=1 << 40))
    gc.collect()
    assert _open_things() == before


def test_close_waits_for_work_in_flight() -> None:
    engine = TransferEngine(geometry())
    inject(engine, "late", milliseconds=10)
    stream, seen = DriverStream(engine), []
    run_step(
        engine,
        plan(1, loads=((8, 0, 1),), stores=((0, 0, 1),)),
        attend=lambda layer: seen.append(layer),
        stream=stream,
    )
    engine.close()
    assert seen == list(range(6))


@pytest.mark.sanitizer
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_random_plans_under_a_sanitizer(
    tmp_path: Path, sanitize: str, run_native: Callable[..., str]
) -> None:
    """Over both drivers; the stand-in for libcuda finds no violation either."""
    program = build_program("random_plans", tmp_path, sanitize)
    for driver in ("host", "cuda"):
        output = run_native(program, "1", "40", driver, libraries=library_folder(sanitize))
        assert "40 seeds, no wrong byte" in output
