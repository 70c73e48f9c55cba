"""Faults in a served engine's worker: copies that fail, and chunks of the pool that are refused.

A plugin of vLLM, so that it is loaded in the process that needs it. ``plugin_folder`` writes the
metadata that make it one; ``environment`` says which faults.
"""

from __future__ import annotations

import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

SWITCH = "PIE_TEST_SOAK_FAULTS"
DIRECTIONS = ("load", "store")
CHUNK_BYTES = 8 << 20
NEXT_COPIES = 40
"""A step's copy that fails is one of so many that come next."""


def plugin_folder(folder: Path) -> Path:
    """Write the metadata of a distribution with this plugin; the folder is for PYTHONPATH."""
    info = folder / "pie_soak_faults-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pie-soak-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\npie_soak_faults = tests.helpers.soak_faults:register\n"
    )
    (info / "RECORD").write_text("")
    return folder


def environment(folder: Path, root: Path, *, copies: float, chunks: float) -> dict[str, str]:
    """Of a server whose worker has faults.

    Args:
        folder: from ``plugin_folder``.
        root: of the repository.
        copies: share of the steps with copies in which one fails.
        chunks: share of the chunks that are refused.
    """
    return {
        "PYTHONPATH": os.pathsep.join((str(folder), str(root))),
        SWITCH: json.dumps({"copies": copies, "chunks": chunks}),
    }


def register() -> None:
    """Patch pie's cache engine, in a process that was asked to; it is made in workers only."""
    if not os.environ.get(SWITCH):
        return
    from pie_vllm.vllm.compat.loading import once_loaded

    once_loaded("pie_vllm.vllm.worker_side.cache_engine", _patch)
    once_loaded("pie_vllm.vllm.worker_side.worker", _small_chunks)


def _small_chunks(module: Any) -> None:
    """So that a small pool has many chunks."""
    module.plan_geometry = partial(module.plan_geometry, chunk_bytes=CHUNK_BYTES)


def _patch(module: Any) -> None:
    from pie_vllm.errors import TransferError
    from tests.helpers.streams import inject

    shares = json.loads(os.environ[SWITCH])
    rng = random.Random(7)
    made = module.PieCacheEngine.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        engine = self._engine
        begin, commit = engine.begin_step, engine.commit_chunk

        def begin_step(*args: Any, **kwargs: Any) -> Any:
            if rng.random() < shares["copies"]:
                direction, nth = rng.choice(DIRECTIONS), rng.randint(1, NEXT_COPIES)
                inject(engine, "fail", direction=direction, nth=nth)
            return begin(*args, **kwargs)

        def commit_chunk(chunk: int) -> None:
            if rng.random() < shares["chunks"]:
                raise TransferError("no memory, says the test.")
            commit(chunk)

        engine.begin_step, engine.commit_chunk = begin_step, commit_chunk

    module.PieCacheEngine.__init__ = init
