"""Engines with vLLM's V2 runner on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import cuda_on_cpu, v2_on_cpu
from tests.helpers.engine import Engines


@contextmanager
def v2_engines(folder: Path, in_flight: int) -> Iterator[Engines]:
    """Engines that keep one step in flight, or two with asynchronous scheduling.

    The latter run over the CUDA driver, on its stand-in, as on a GPU by default; no access of
    theirs may be unordered.
    """
    more = {}
    if in_flight == 2:
        more = {v2_on_cpu.ASYNC: "1", **cuda_on_cpu.environment(folder / "report")}
    shared = Engines(folder, {**v2_on_cpu.ENVIRONMENT, **more})
    yield shared
    shared.close()
    assert cuda_on_cpu.found_wrong(folder / "report") == []
