"""The C interface and the engine over it: any argument is an error or an answer, never a crash."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pie_vllm.engine import native
from pie_vllm.engine.native import GeometryStruct, PlanStruct, load_library
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, IntegrityError, TransferError
from tests.engine.driving import PAGE, geometry, plan, run_step
from tests.helpers.builds import build_program, program_over_library
from tests.helpers.standin import ENVIRONMENT, include_folder, library_folder
from tests.helpers.streams import inject

CONFIG, PLAN, STATE = 1, 2, 5
MOST = 2**63 - 1
NUMBERS = (ctypes.c_double, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64)


def nothing(kind: Any) -> Any:
    """0, or a null pointer."""
    return 0 if issubclass(kind, NUMBERS) else None


def text() -> str:
    found: bytes = load_library().pie_last_error()
    return found.decode()


@pytest.mark.parametrize("name", sorted(native._SIGNATURES))
def test_null_pointers_are_errors(name: str) -> None:
    """In place of the engine, and of anything that the call would read or write."""
    function, kinds = getattr(load_library(), name), native._SIGNATURES[name]
    arguments = [nothing(kind) for kind in kinds]
    code = function(*arguments)
    closed = "the transfer engine is closed" in text()
    assert code == CONFIG if name in ("pie_granularity", "pie_open") else closed
    assert code in (CONFIG, STATE)
    pointers = [kind for kind in kinds[1:] if not issubclass(kind, NUMBERS)]
    if kinds[0] is not native._E or not pointers:
        return
    with TransferEngine(geometry()) as engine:
        arguments[0] = engine.handle.opened()
        code = function(*arguments)
        if name in ("pie_use_gather", "pie_use_graphs", "pie_device_arch"):
            assert code in (0, 6)  # a size of 0: nothing is read
            return
        assert code == CONFIG
        assert "null pointer" in text()
        engine.begin_step(plan(1))
        engine.abort_step()


def test_null_runs_impossible_counts_and_unknown_flags_are_refused() -> None:
    with TransferEngine(geometry()) as engine:
        library, handle = engine.handle.library, engine.handle.opened()
        runs = (ctypes.c_int64 * 3)(0, 0, 1)
        at = ctypes.addressof(runs)
        for wrong in (
            PlanStruct(1, None, 1, None, 0, None, 0),
            PlanStruct(1, at, -1, None, 0, None, 0),
            PlanStruct(1, None, 0, at, MOST, None, 0),
            PlanStruct(1, None, 0, None, 0, at, 1 << 40),
            PlanStruct(-1, None, 0, None, 0, None, 0),
            PlanStruct(MOST, None, 0, None, 0, None, 0),
            PlanStruct(1, None, 0, None, 0, None, 0, 16),
            PlanStruct(1, None, 0, None, 0, None, 0, -1),
            PlanStruct(1, None, 0, None, 0, None, 0, 1 << 40),
        ):
            assert library.pie_begin_step(handle, ctypes.byref(wrong), 0) == PLAN, text()
        right = PlanStruct(1, at, 1, None, 0, None, -1, 3)
        assert library.pie_begin_step(handle, ctypes.byref(right), 0) == 0
        engine.abort_step()


def test_a_closed_engine_is_an_error_for_every_call() -> None:
    """Gates too say so, whatever the step was that it was closed in."""
    for stores in ((), ((1, 1, 1),)):
        engine = TransferEngine(geometry())
        engine.begin_step(plan(1, stores=stores))
        library, handle = engine.handle.library, engine.handle.opened()
        engine.close()
        for gate in (engine.before_write, engine.before_attention, engine.after_attention):
            with pytest.raises(TransferError, match="closed"):
                gate(0)
        for call in (engine.end_step, engine.abort_step, engine.drain, engine.self_test):
            with pytest.raises(TransferError, match="closed"):
                call()
        assert library.pie_before_attention(handle, 0) == STATE
        assert library.pie_close(handle) == STATE


@pytest.mark.parametrize(
    ("sizes", "product"),
    [
        ({"chunk_rows": MOST}, r"chunk_rows \* \(L \+ D\) \* p"),
        ({"chunk_rows": 2**62}, r"chunk_rows \* \(L \+ D\) \* p"),
        ({"rows": 2**62}, r"rows \* \(L \+ D\) \* p"),
        ({"rows": 2**40, "chunk_rows": 1}, "1099511627776 chunks, at most 1048576 can be"),
        ({"resident_blocks": MOST}, r"R \* p "),
        ({"pooled_blocks": 2**61}, r"W \* p "),
        ({"pooled_blocks": 1 << 52}, r"N \* \(R \* p \+ W \* p\)"),
        ({"page_bytes": 2**60}, r"R \* p "),
        ({"num_layers": MOST, "ring_slots": 1}, r"N \* \(R \* p \+ W \* p\)"),
        ({"extra_regions": MOST - 6}, r"N \* \(R \* p \+ W \* p\)"),
        ({"granularity": 2**62}, r"R \* p \+ W \* p"),
        ({"granularity": 2**62 + PAGE, "num_layers": 1, "ring_slots": 1}, r"R \* p \+ W \* p"),
    ],
    ids=str,
)
def test_sizes_whose_products_overflow_are_refused(sizes: dict[str, int], product: str) -> None:
    """The error has all sizes, and names the product."""
    wanted = rf"geometry: L = \d+, .* g = \d+; .*{product}"
    with pytest.raises(ConfigError, match=wanted):
        TransferEngine(geometry(**sizes), chunks=1)


@pytest.mark.parametrize("size", [field[0] for field in GeometryStruct._fields_])
def test_sizes_beyond_64_bits_are_not_cut(size: str) -> None:
    value = 2**64 + getattr(geometry(), size)
    sizes = {"extra_regions": 2**64} if size == "num_regions" else {size: value}
    if size == "draft_layers":
        sizes["extra_regions"] = -value  # The number of regions fits.
    with pytest.raises(ConfigError, match=f"{size} of {value} does not fit 64 bits"):
        TransferEngine(geometry(**sizes))


def test_other_numbers_beyond_64_bits_are_not_cut() -> None:
    with pytest.raises(ctypes.ArgumentError, match="does not fit 64 bits"):
        TransferEngine(geometry(), chunks=2**64 + 1)
    with TransferEngine(geometry()) as engine:
        with pytest.raises(IntegrityError, match="64 bits"):
            engine.begin_step(plan(2**64 + 1))
        for call in (engine.commit_chunk, engine.release_chunk):
            with pytest.raises(ctypes.ArgumentError, match="does not fit 64 bits"):
                call(2**64)


@pytest.mark.parametrize(
    "sizes",
    [
        {"resident_blocks": 2**38},
        {"pooled_blocks": 2**38},
        {"rows": 2**38, "chunk_rows": 2**38},
        {"rows": 2**38, "chunk_rows": 2**36},
    ],
    ids=str,
)
def test_more_memory_than_is_free_is_refused_before_any_is_taken(sizes: dict[str, int]) -> None:
    """It would be taken page by page, until the kernel kills what runs here.

    These are beyond what can be addressed, so that this test is safe where it fails.
    """
    wanted = r"geometry: \d+ bytes of CPU memory .* are free .*--pie-pool-gib"
    with pytest.raises(TransferError, match=wanted):
        TransferEngine(geometry(**sizes))


def test_a_pool_larger_than_free_memory_begins_with_what_there_is() -> None:
    """Its chunks come one by one, and each may be refused."""
    with TransferEngine(geometry(rows=2**32, chunk_rows=2**13), chunks=1) as engine:
        run_step(engine, plan(1, stores=((1, 1, 1),)))


@pytest.mark.parametrize("link", [float("nan"), float("inf"), 1e-300, 999.0])
def test_a_link_that_copies_nothing_is_refused(link: float) -> None:
    with pytest.raises(ConfigError, match="use 1000 or more"):
        TransferEngine(geometry(), link_bytes_per_s=link)


def test_faults_that_would_last_for_ever_are_refused() -> None:
    with TransferEngine(geometry()) as engine:
        for fault in ("late", "torn"):
            for ms in (float("nan"), float("inf"), -1.0, 60_001.0):
                with pytest.raises(ConfigError, match="60000 can be"):
                    inject(engine, fault, milliseconds=ms)
        run_step(engine, plan(1, stores=((1, 1, 1),)))


def test_a_device_number_is_not_cut() -> None:
    for number in (2**32, 2**63, -1):
        with pytest.raises(native.UnsupportedError, match="names no device"):
            native.driver_granularity(f"cuda:{number}")


def test_self_test_needs_the_first_chunk() -> None:
    with TransferEngine(geometry()) as engine:
        engine.release_chunk(0)
        with pytest.raises(TransferError, match="the first chunk of the pool is not there"):
            engine.self_test()
        engine.commit_chunk(0)
        engine.self_test()


def test_a_chunk_given_back_inside_a_step_fails_the_step() -> None:
    """By name, where its layers still name the rows; the engine goes on."""
    with TransferEngine(geometry()) as engine:
        step = plan(1, promotions=((1, 1, 1),), loads=((8, 2, 1),))
        engine.begin_step(step)
        engine.release_chunk(0)
        with pytest.raises(IntegrityError, match="row 1: its chunk of the pool is not there"):
            engine.before_write(0)
        with pytest.raises(IntegrityError, match="row 1"):
            engine.abort_step()
        engine.commit_chunk(0)
        run_step(engine, step)


def run_fuzz(program: Path, first: int, seeds: int, *driver: str, **environment: str) -> None:
    """In a process of its own: a crash is a failure that names its seed."""
    # vLLM sets LD_PRELOAD.
    kept = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = ["setarch", "-R", str(program), str(first), str(seeds), *driver]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **environment}
    )
    last = "\n".join(done.stdout.splitlines()[-3:])
    assert done.returncode == 0, f"status {done.returncode} at {last}\n{done.stderr[-4000:]}"
    assert f"{seeds} seeds, " in last


@pytest.mark.fuzz
@pytest.mark.parametrize("driver", ["host", "cuda"])
def test_random_calls(tmp_path: Path, fuzz_seeds: range, driver: str) -> None:
    """Calls the installed library; CUDA's over the stand-in for libcuda, which is slower."""
    if driver == "cuda" and include_folder() is None:
        pytest.skip("no cuda.h: neither the package nvidia-cuda-runtime nor a toolkit")
    program = program_over_library("fuzz_interface", tmp_path)
    if driver == "host":
        run_fuzz(program, fuzz_seeds.start, len(fuzz_seeds))
        return
    settings = {"LD_LIBRARY_PATH": str(library_folder()), ENVIRONMENT: f"granularity={PAGE}"}
    run_fuzz(program, 1, max(1, len(fuzz_seeds) // 4), driver, **settings)


@pytest.mark.sanitizer
@pytest.mark.fuzz
@pytest.mark.timeout(900)
def test_random_calls_under_the_address_sanitizer(tmp_path: Path, fuzz_seeds: range) -> None:
    """What does not crash may still read and write where nothing is."""
    program = build_program("fuzz_interface", tmp_path, "address")
    run_fuzz(program, 1, max(1, len(fuzz_seeds) // 4))


def test_the_fuzz_names_the_seed_that_crashed(tmp_path: Path) -> None:
    program = tmp_path / "crash"
    source = """#include <cstdio>
    int main() { std::puts("seed 7"); std::fflush(stdout); __builtin_trap(); }"""
    subprocess.run(
        ["g++", "-x", "c++", "-", "-o", str(program)], input=source, text=True, check=True
    )
    with pytest.raises(AssertionError, match=r"status -\d+ at seed 7"):
        run_fuzz(program, 1, 20)
