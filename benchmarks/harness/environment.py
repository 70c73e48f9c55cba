"""The environment that every measured vLLM process gets: the same for stock and pie."""

from __future__ import annotations

import os


def vllm_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with what vLLM needs on a closed machine.

    No usage reports and no look-ups on a model hub: on a machine without a network they wait
    for time-outs. Output is unbuffered, so that a log is complete when a server is killed. Numba,
    in which vLLM proposes n-grams, has as many threads as torch: with more, torch gets them, too.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        **os.environ,
        **({"NUMBA_NUM_THREADS": threads} if threads else {}),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **more,
    }
