"""Loads the native engine, names its functions and turns its codes into errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from pie_vllm.errors import (
    ConfigError,
    CopyError,
    GateError,
    IntegrityError,
    NativeLibraryError,
    PieError,
    TransferError,
    UnsupportedError,
)
from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, Runs, StepPlan

ABI_VERSION = 11
"""What this package expects of ``pie_abi_version()``."""

DEFAULT_LIBRARY = Path(__file__).resolve().parent.parent / "_native" / "libpie.so"

HOW_TO_BUILD = (
    "build it with 'pip install --no-build-isolation -e .' in the source tree "
    "(needs a C++17 compiler), or reinstall pie_vllm"
)

DEBUG_FLAGS = {
    "skip_loads": 1,
    "skip_stores": 2,
    "skip_gate": 4,
    "late_submit": 8,
    "poison": 16,
    "skip_drafts": 32,
}

_ERRORS: dict[int, type[PieError]] = {
    1: ConfigError,
    2: IntegrityError,
    3: CopyError,
    4: GateError,
    5: TransferError,
    6: UnsupportedError,
}


class GeometryStruct(ctypes.Structure):
    """``pie_geometry``."""

    _fields_ = [
        (name, c_int64)
        for name in (
            "num_layers",
            "page_bytes",
            "resident_blocks",
            "pooled_blocks",
            "ring_slots",
            "rows",
            "chunk_rows",
            "granularity",
            "num_regions",
            "draft_layers",
        )
    ]


class PlanStruct(ctypes.Structure):
    """``pie_plan``; addresses are those of int64 triples."""

    _fields_ = [
        ("step", c_int64),
        ("stores", c_void_p),
        ("num_stores", c_int64),
        ("promotions", c_void_p),
        ("num_promotions", c_int64),
        ("loads", c_void_p),
        ("num_loads", c_int64),
        ("flags", c_int64),
    ]


class StatsStruct(ctypes.Structure):
    """``pie_stats``."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                "step",
                "bytes_loaded",
                "bytes_stored",
                "bytes_promoted",
                "bytes_finished",
                "gates",
                "copies",
                "stall_step",
            )
        ),
        ("load_seconds", c_double),
        ("store_seconds", c_double),
        ("stall_seconds", c_double),
    ]


class CountersStruct(ctypes.Structure):
    """``pie_counters``."""

    _fields_ = [("bytes", c_int64), ("copies", c_int64), ("seconds", c_double)]


_LIMIT = 1 << 63
"""Numbers of the C interface are below it, and not below its negative: ctypes would cut others."""


class _Int64(c_int64):
    """A ``c_int64`` argument that is not cut to 64 bits silently."""

    @classmethod
    def from_param(cls, value: int) -> c_int64:
        """The argument; raises ConfigError where it does not fit."""
        return c_int64(_fitting("a number", value))


def _fitting(name: str, value: int) -> int:
    if -_LIMIT <= value < _LIMIT:
        return value
    raise ConfigError(f"{name} of {value} does not fit 64 bits; it must be below 2**63")


OPTION_HEAD_FIRST, OPTION_OVERLAP = 0, 1
"""Numbers of the options in ``pie.h``."""

PLAN_STORES_FIRST, PLAN_AFTER_ALL, PLAN_STORES_AFTER_ALL, PLAN_PROMOTIONS_FIRST = 1, 2, 4, 8
"""Flags of a plan in ``pie.h``."""

_E = c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pie_granularity": (c_char_p, POINTER(c_int64)),
    "pie_open": (POINTER(GeometryStruct), c_char_p, c_double, c_uint32, _Int64, POINTER(c_void_p)),
    "pie_close": (_E,),
    "pie_arena": (_E, POINTER(c_uint64), POINTER(c_int64)),
    "pie_bytes": (_E, POINTER(c_int64), POINTER(c_int64)),
    "pie_commit_chunk": (_E, _Int64),
    "pie_release_chunk": (_E, _Int64),
    "pie_row_page": (_E, _Int64, _Int64, POINTER(c_uint64)),
    "pie_set_option": (_E, c_int, c_int),
    "pie_begin_step": (_E, POINTER(PlanStruct), c_uint64),
    "pie_begin_graph_step": (_E, POINTER(PlanStruct), c_uint64, POINTER(c_int)),
    "pie_enter_graph": (_E,),
    "pie_before_write": (_E, c_int64),
    "pie_before_attention": (_E, c_int64),
    "pie_after_attention": (_E, c_int64),
    "pie_end_step": (_E, POINTER(StatsStruct)),
    "pie_run_idle": (_E, POINTER(PlanStruct), c_uint64, POINTER(StatsStruct)),
    "pie_abort_step": (_E,),
    "pie_drain": (_E,),
    "pie_self_test": (_E,),
    "pie_zero_ring": (_E,),
    "pie_device_arch": (_E, c_char_p, c_int64),
    "pie_use_gather": (_E, c_char_p, _Int64, _Int64, c_int),
    "pie_use_graphs": (_E, c_char_p, _Int64, _Int64, c_int),
    "pie_begin_capture": (_E, c_uint64),
    "pie_end_capture": (_E,),
    "pie_counters_of": (_E, c_int, POINTER(CountersStruct)),
    "pie_stream_create": (_E, POINTER(c_uint64)),
    "pie_stream_destroy": (_E, c_uint64),
    "pie_stream_synchronize": (_E, c_uint64),
    "pie_copy": (_E, c_uint64, c_int, c_uint64, c_uint64, _Int64),
    "pie_event_create": (_E, POINTER(c_uint64)),
    "pie_event_destroy": (_E, c_uint64),
    "pie_event_record": (_E, c_uint64, c_uint64),
    "pie_event_elapsed": (_E, c_uint64, c_uint64, POINTER(c_double)),
}


def load_library(path: str | Path | None = None) -> ctypes.CDLL:
    """The native library with its signatures set; calls release the interpreter lock.

    Args:
        path: another build of the library, for tests.

    Raises:
        NativeLibraryError: no such file, not loadable, or of another ABI version.
    """
    where = Path(path) if path is not None else DEFAULT_LIBRARY
    if not where.exists():
        raise NativeLibraryError(f"the native engine {where} is missing: {HOW_TO_BUILD}")
    try:
        library = ctypes.CDLL(str(where))
        version = library.pie_abi_version
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"the native engine {where} cannot be used ({error}): {HOW_TO_BUILD}"
        ) from error
    version.restype = c_int
    version.argtypes = ()
    found = version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"the native engine {where} has ABI version {found}, this package expects "
            f"{ABI_VERSION}: {HOW_TO_BUILD}"
        )
    library.pie_last_error.restype = c_char_p
    library.pie_last_error.argtypes = ()
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = c_int
    return library


def error_of(library: ctypes.CDLL, code: int) -> PieError:
    """The error for a code other than 0, with the text of this thread's last failure."""
    text = library.pie_last_error()
    return _ERRORS.get(code, TransferError)(text.decode(errors="replace"))


def driver_granularity(driver: str = "host", library_path: str | Path | None = None) -> int:
    """Bytes that the driver maps in one piece, ``g`` of the geometry.

    Raises:
        UnsupportedError: the build lacks this driver.
        NativeLibraryError: the native engine is missing or does not fit.
    """
    library = load_library(library_path)
    size = c_int64()
    code = library.pie_granularity(driver.encode(), ctypes.byref(size))
    if code:
        raise error_of(library, code)
    return size.value


class PlanArrays:
    """A plan as the C interface takes it; keeps its arrays alive and copies none.

    Raises:
        IntegrityError: a number of the plan does not fit 64 bits, or its runs are no C-contiguous
            int64 array of shape (runs, 3).
    """

    def __init__(self, plan: StepPlan) -> None:
        if not -_LIMIT <= plan.step < _LIMIT:
            raise IntegrityError(f"a step with the number {plan.step}, which does not fit 64 bits")
        self._plan = plan
        loads = NO_RUNS if plan.loads is None else plan.loads
        self.struct = PlanStruct(
            plan.step,
            _address("stores", plan.stores),
            len(plan.stores),
            _address("promotions", plan.promotions),
            len(plan.promotions),
            _address("loads", loads),
            -1 if plan.loads is None else len(loads),
            plan_flags(plan),
        )


def plan_flags(plan: StepPlan) -> int:
    """The bits of a plan's flags."""
    return (
        PLAN_STORES_FIRST * plan.stores_first
        | PLAN_AFTER_ALL * plan.after_all
        | PLAN_STORES_AFTER_ALL * plan.stores_after_all
        | PLAN_PROMOTIONS_FIRST * plan.promotions_first
    )


def _address(name: str, runs: Runs) -> int:
    """Where the first run lies: a row of the array is a ``pie_run``."""
    if not isinstance(runs, np.ndarray):
        raise IntegrityError(f"a plan whose {name} are a {type(runs).__name__}, not an array")
    if not (runs.dtype == np.int64 and runs.shape[1:] == (3,) and runs.flags.c_contiguous):
        raise IntegrityError(
            f"a plan whose {name} are {runs.dtype} of shape {runs.shape} and strides "
            f"{runs.strides}, not C-contiguous int64 of shape (runs, 3)"
        )
    return int(runs.ctypes.data)


def geometry_struct(geometry: Geometry) -> GeometryStruct:
    """A geometry as the C interface takes it. Raises ConfigError for a size beyond 64 bits."""
    names = [field[0] for field in GeometryStruct._fields_]
    return GeometryStruct(
        *(_fitting(f"geometry: {name}", getattr(geometry, name)) for name in names)
    )


def debug_flags(words: Iterable[str]) -> int:
    """The bits of debug words. Raises ConfigError for an unknown one."""
    flags = 0
    for word in words:
        if word not in DEBUG_FLAGS:
            raise ConfigError(
                f"unknown debug word {word!r}; valid words are {', '.join(sorted(DEBUG_FLAGS))}"
            )
        flags |= DEBUG_FLAGS[word]
    return flags
