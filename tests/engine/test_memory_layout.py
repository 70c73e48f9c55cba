"""Arena and pool lie as Geometry says."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pie_vllm.engine.native import driver_granularity
from pie_vllm.engine.streams import row_page
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, IntegrityError, PieError, TransferError, UnsupportedError
from pie_vllm.geometry import Geometry
from tests.engine.driving import PAGE, View, content, geometry, host_only, plan, run_step

SIZES = [
    {},
    {"page_bytes": 4096},
    {"page_bytes": 1, "resident_blocks": 1, "pooled_blocks": 1},
    {"page_bytes": 98304, "resident_blocks": 5, "num_layers": 3, "ring_slots": 3},
    {"page_bytes": 12345, "granularity": 2 * PAGE},
    {"num_layers": 1, "ring_slots": 1},
    {"num_layers": 7, "ring_slots": 3, "page_bytes": 4097},
    {"num_layers": 5, "ring_slots": 5, "rows": 1, "chunk_rows": 1},
    {"rows": 7, "chunk_rows": 3},
    {"extra_regions": 1},
    {"num_layers": 2, "ring_slots": 2, "extra_regions": 7},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_page_lies_where_the_geometry_says(
    make_engine: Callable[..., TransferEngine], sizes: dict[str, int]
) -> None:
    engine = make_engine(**sizes)
    g, view = engine.geometry, View(engine)
    assert engine.arena.size == g.virtual_bytes
    assert engine.arena.address % driver_granularity() == 0
    assert (engine.arena.address + g.page_offset(0, g.resident_blocks)) % g.granularity == 0
    assert (engine.host_bytes, engine.device_bytes) == (g.host_bytes, g.device_bytes)
    assert not view.bytes.any()
    for layer in range(g.num_regions):
        for block in range(g.resident_blocks):
            view.write(layer, block, 1 + layer * g.resident_blocks + block)
    for layer in range(g.num_regions):
        for block in range(g.resident_blocks):
            assert view.holds(layer, block, 1 + layer * g.resident_blocks + block)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_layers_share_ring_slots(
    make_engine: Callable[..., TransferEngine], sizes: dict[str, int]
) -> None:
    """Regions beyond the layers, too: each byte of a tensor over one has memory."""
    engine = make_engine(**sizes)
    g, view = engine.geometry, View(engine)
    last = g.num_blocks - 1
    for layer in range(g.num_regions):
        tag = 100 + layer
        view.write(layer, last, tag)
        written = content(g, tag, layer)
        for other in range(g.num_regions):
            same = bool((view.page(other, last) == written).all())
            assert same == (other % g.ring_slots == layer % g.ring_slots)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_are_apart_and_runs_are_contiguous(
    make_engine: Callable[..., TransferEngine], sizes: dict[str, int]
) -> None:
    engine = make_engine(**sizes)
    g, view = engine.geometry, View(engine)
    for row in range(g.rows):
        view.write_row(row, row + 1)
    for row in range(g.rows):
        assert all(view.row_holds(row, layer, row + 1) for layer in range(g.num_layers))
    starts = {
        (row, layer): view.row(row, layer).ctypes.data
        for row in range(g.rows)
        for layer in range(g.num_layers)
    }
    for row in range(g.rows - 1):
        if (row + 1) % g.chunk_rows:
            for layer in range(g.num_layers):
                assert starts[row + 1, layer] - starts[row, layer] == g.page_bytes


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_self_test_passes_and_leaves_zeros(
    make_engine: Callable[..., TransferEngine], sizes: dict[str, int]
) -> None:
    engine = make_engine(**sizes)
    view = View(engine)
    for _ in range(2):
        engine.self_test()
    assert not view.bytes.any()
    for row in range(engine.geometry.rows):
        assert not any(view.row(row, i).any() for i in range(engine.geometry.num_layers))


@host_only
def test_tensor_is_a_view(engine: TransferEngine) -> None:
    tensor = engine.arena.tensor()
    assert tensor.numel() == engine.arena.size
    assert tensor.data_ptr() == engine.arena.address
    tensor[engine.geometry.page_offset(2, 3)] = 7
    assert View(engine).page(2, 3)[0] == 7


def test_view_keeps_the_engine_alive() -> None:
    tensor = TransferEngine(geometry()).arena.tensor()
    tensor.fill_(3)
    assert int(tensor.min()) == 3
    tensor.untyped_storage()


def test_zero_ring(engine: TransferEngine) -> None:
    g, view = engine.geometry, View(engine)
    view.bytes[:] = 0xFF
    engine.zero_ring()
    for layer in range(g.num_layers):
        for block in range(g.num_blocks):
            assert bool(view.page(layer, block).any()) == (block < g.resident_blocks)


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("stores", (0, 4, 2)),  # rows 4 and 5 lie in two chunks
        ("loads", (8, 4, 2)),
        ("promotions", (0, 3, 3)),
        ("stores", (7, 0, 2)),  # block 8 is pooled
        ("promotions", (8, 0, 1)),
        ("loads", (7, 0, 1)),  # resident
        ("loads", (11, 0, 2)),  # beyond the last block
        ("loads", (8, 9, 2)),  # beyond the last row
        ("loads", (8, -1, 1)),
        ("stores", (-1, 0, 1)),
        ("stores", (0, 0, 0)),
        ("stores", (0, 0, -1)),
        ("stores", (0, 0, 2**62)),
        ("stores", (2**62, 2**62, 2**62)),
    ],
)
def test_bad_run_is_refused_and_changes_nothing(
    engine: TransferEngine, kind: str, run: tuple[int, int, int]
) -> None:
    view = View(engine)
    view.write_row(0, 5)
    bad = plan(1, **{"loads": ((8, 0, 1),), kind: (run,)})
    for call in (engine.begin_step, engine.run_idle):
        with pytest.raises(IntegrityError, match="run"):
            call(bad)
    seen = []
    step = plan(1, loads=((8, 0, 1),))
    run_step(engine, step, attend=lambda layer: seen.append(view.holds(layer, 8, 5)))
    assert seen == [True] * 6


def test_runs_at_chunk_edges(engine: TransferEngine) -> None:
    view = View(engine)
    for row in range(10):
        view.write_row(row, row + 1)
    seen = []

    def attend(layer: int) -> None:
        seen.append([view.holds(layer, 8 + i, tag) for i, tag in enumerate((4, 5, 6, 10))])

    run_step(engine, plan(1, loads=((8, 3, 2), (10, 5, 1), (11, 9, 1))), attend=attend)
    assert seen == [[True] * 4] * 6


def test_promotion_from_a_stored_row_is_refused(engine: TransferEngine) -> None:
    for row in (2, 3, 4):
        with pytest.raises(IntegrityError, match="same step"):
            engine.begin_step(plan(1, stores=((0, 2, 3),), promotions=((5, row, 1), (6, 9, 1))))
    engine.begin_step(plan(1, stores=((0, 2, 2),), promotions=((5, 0, 2), (7, 4, 1))))
    engine.abort_step()


@pytest.mark.parametrize(
    "sizes",
    [
        {"ring_slots": 7},
        {"num_layers": 0},
        {"pooled_blocks": 0},
        {"rows": 0},
        {"granularity": 100},
        {"page_bytes": -1},
        {"extra_regions": -1},
    ],
    ids=str,
)
def test_bad_geometry(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="geometry"):
        TransferEngine(geometry(**sizes))


def test_memory_that_cannot_be_had_is_an_error_and_rolls_back() -> None:
    before = _mappings()
    for sizes in ({"pooled_blocks": 1 << 42}, {"rows": 1 << 40, "chunk_rows": 1 << 40}):
        with pytest.raises(TransferError):
            TransferEngine(geometry(**sizes))
    assert _mappings() == before


def _mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("pie-device" in line for line in maps)


def test_row_page_is_checked(engine: TransferEngine) -> None:
    for row, layer in ((10, 0), (-1, 0), (0, 6)):
        with pytest.raises(IntegrityError):
            row_page(engine, row, layer)


def test_unknown_driver_and_debug_word() -> None:
    with pytest.raises(UnsupportedError, match='"cuda:x" names no device'):
        TransferEngine(geometry(), driver="cuda:x")
    with pytest.raises(UnsupportedError, match="host"):
        driver_granularity("tpu")
    with pytest.raises(ConfigError, match="late_submit, poison, skip_drafts, skip_gate"):
        TransferEngine(geometry(), debug=("skip_everything",))


def test_random_geometries_pass_the_self_test(driver: str) -> None:
    draw = random.Random(5)
    for _ in range(10):
        layers = draw.randint(1, 9)
        sizes = Geometry(
            num_layers=layers,
            page_bytes=draw.randint(1, 20000),
            resident_blocks=draw.randint(1, 9),
            pooled_blocks=draw.randint(1, 9),
            ring_slots=draw.randint(1, layers),
            rows=(rows := draw.randint(1, 20)),
            chunk_rows=draw.randint(1, rows),
            granularity=PAGE * draw.choice((1, 16)),
            extra_regions=draw.randint(0, 3),
        )
        with TransferEngine(sizes, driver=driver) as engine:
            engine.self_test()


def test_errors_are_pie_errors() -> None:
    assert issubclass(ConfigError, PieError)
