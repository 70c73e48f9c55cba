"""Rule 21: what ``begin_step`` leaves to the first gate, and that nothing of it is lost."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, GateError, TransferError
from tests.engine.driving import View, host_only, inject, plan, run_step
from tests.engine.test_order import LAYERS, NEW, OLD, rows_hold
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

FULL = {"stores": ((3, 0, 1),), "promotions": ((4, 1, 1),), "loads": ((8, 2, 1),)}
cuda_only = pytest.mark.parametrize("driver", ["cuda"], indirect=True)


def batches() -> int:
    """Batches of copies that were submitted so far."""
    return load().calls("cuMemcpyBatchAsync")


def at_start(engine: TransferEngine, number: int = 1) -> int:
    """Batches that the begin of a step submits; each layer has one out, and two in."""
    before = batches()
    engine.begin_step(plan(number, **FULL))  # type: ignore[arg-type]
    return batches() - before


def pass_gates(engine: TransferEngine) -> None:
    for layer in LAYERS:
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    engine.end_step()


@cuda_only
@pytest.mark.parametrize("first", ["before_write", "before_attention", "after_attention"])
def test_the_first_gate_submits_the_rest(engine: TransferEngine, first: str) -> None:
    """The head alone goes ahead: a store, and a promotion and a load of one layer."""
    before = batches()
    assert at_start(engine) == 3
    getattr(engine, first)(0)
    # Stores of six layers, copies in of two: the ring has two slots.
    with_next = 2 if first == "after_attention" else 0
    assert batches() - before == 6 + 4 + with_next
    engine.abort_step()


@cuda_only
def test_all_at_once_where_it_is_asked_for(engine: TransferEngine) -> None:
    """All is submitted at once; the option is one of whole steps."""
    engine.submit_head_first(False)
    assert at_start(engine) == 6 + 4
    with pytest.raises(TransferError, match="inside a step"):
        engine.submit_head_first(True)
    pass_gates(engine)
    engine.submit_head_first(True)
    assert at_start(engine, 2) == 3
    pass_gates(engine)


@pytest.mark.parametrize("missed", [False, True])
def test_an_abort_before_the_first_gate_stores_and_promotes(
    engine: TransferEngine, view: View, missed: bool
) -> None:
    """Rows and pages are as the tables say, of a step that ended without gates too."""
    view.write_all(3, OLD)
    view.write_row(1, NEW)
    inject(engine, "late", direction="store", milliseconds=3)
    # The promotion fills the page that the store reads.
    engine.begin_step(plan(1, stores=((3, 0, 1),), promotions=((3, 1, 1),)))
    if missed:
        with pytest.raises(GateError):
            engine.end_step()
    else:
        engine.abort_step()
    assert rows_hold(view, 0, OLD) == []
    assert all(view.holds(layer, 3, NEW) for layer in LAYERS)


@pytest.mark.parametrize("head_first", [True, False])
def test_loads_of_rows_that_the_step_stores(
    engine: TransferEngine, stream: DriverStream, view: View, head_first: bool
) -> None:
    """In the layers that the first gate submits as in the head."""
    engine.submit_head_first(head_first)
    view.write_all(3, NEW)
    view.write_row(0, OLD)
    inject(engine, "late", direction="store", milliseconds=5)
    seen: list[bool] = []
    for number in (1, 2):
        step = plan(number, stores=((3, 0, 1),), loads=((8, 0, 1),))
        run_step(
            engine, step, attend=lambda layer: seen.append(view.holds(layer, 8, NEW)), stream=stream
        )
    stream.synchronize()
    assert seen == [True] * 12


@cuda_only
@pytest.mark.alone
@pytest.mark.parametrize("head_first", [True, False])
def test_small_copies_before_the_first_gate_are_not_kept_waiting(
    make_engine: Callable[..., TransferEngine], head_first: bool
) -> None:
    """Copy engines serve what is ready: behind loads of several layers the inputs come late."""
    engine = make_engine(page_bytes=65_536, ring_slots=5)
    engine.submit_head_first(head_first)
    stream = DriverStream(engine)
    target = engine.arena.address + engine.geometry.page_offset(0, 0)
    source = ctypes.addressof(engine_row(engine))
    run_step(engine, plan(1), stream=stream)
    load().set(copy_engines=1)
    load().link(65_536 / 0.02)  # A page takes 20 ms.
    engine.begin_step(plan(2, loads=((8, 0, 1),)), stream.id)
    time.sleep(0.005)  # The inputs are made.
    begin = time.perf_counter()
    stream.copy("load", target, source, 64)
    stream.synchronize()
    seconds = time.perf_counter() - begin
    load().link(0)
    engine.abort_step()
    assert (seconds < 0.05) is head_first
    assert (seconds > 0.07) is not head_first


def engine_row(engine: TransferEngine) -> ctypes.Array[ctypes.c_uint8]:
    """A row that no step of the test names."""
    from pie_vllm.engine.streams import row_page

    found: ctypes.Array[ctypes.c_uint8] = row_page(engine, 9, 0)
    return found


@host_only
def test_an_unknown_option_is_refused(engine: TransferEngine) -> None:
    library, handle = engine.handle.library, engine.handle.opened()
    assert library.pie_set_option(handle, 7, 1) != 0
    with pytest.raises(ConfigError, match="no option 7"):
        engine.handle.check(library.pie_set_option(handle, 7, 1))


@cuda_only
@pytest.mark.parametrize("on", [True, False])
def test_batches_ask_for_overlap_or_not(engine: TransferEngine, on: bool) -> None:
    engine.prefer_overlap(on)
    load().set(batch_flags=-1)
    run_step(engine, plan(1, loads=((8, 0, 1),)))
    engine.drain()
    assert load().get("batch_flags") == int(on)
