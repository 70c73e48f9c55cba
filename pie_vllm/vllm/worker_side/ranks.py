"""What the ranks of tensor parallelism agree on at start.

All ranks carry out the same plans, each on its share of every page and with a
pool of its own, so sizes must be equal and the slowest link counts.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d
from vllm.logger import init_logger

from pie_vllm.engine.host_memory import check_pool_fits, resolve_pool_bytes
from pie_vllm.engine.pool_board import Board
from pie_vllm.errors import UnsupportedError
from pie_vllm.plan import Prior
from pie_vllm.vllm.worker_side.step_board import StepBoard

logger = init_logger("vllm.pie")

SHARED_MEMORY = Path("/dev/shm")  # Linux keeps its files in memory.


def least(*values: float) -> tuple[float, ...]:
    """The least of each of these numbers over all ranks, which call it together."""
    from vllm.distributed.parallel_state import get_tp_group

    group: Any = get_tp_group()
    if group.world_size == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return tuple(shared.tolist())


def least_bytes(*sizes: int) -> Sequence[int]:
    """The least of each of these sizes over all ranks; up to 2**53 they stay exact."""
    return [int(size) for size in least(*sizes)]


def pool_board(first_chunks: int) -> Board | None:
    """Where the ranks note what their pools hold; all ranks call it together. None for one rank.

    vLLM returns the output of the first rank of the tensor-parallel group
    (v1/executor/multiproc_executor.py:548, ``_get_output_rank``).

    Args:
        first_chunks: number of chunks that each rank holds from the start.

    Raises:
        UnsupportedError: this torch does not show the store that its ranks share.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group: Any = get_tp_group()
    if group.world_size == 1:
        return None
    store_of = getattr(distributed_c10d, "_get_default_store", None)
    if store_of is None:
        raise UnsupportedError(
            f"--block-manager pie on several ranks needs torch's default store, which torch "
            f"{torch.__version__} does not show. Use one rank, or --block-manager default."
        )
    (name,) = least_bytes(secrets.randbelow(2**50))  # No engine before this one had it.
    board = f"pie-pool-{name}"
    return Board(store_of(), group.rank_in_group, group.world_size, board, first_chunks)


def step_board() -> StepBoard | None:
    """Where the ranks note how each step ended; all ranks call it together. None for one rank.

    All ranks are on one host: ``refusals`` leaves no other kind of several ranks. The file's name
    is gone as soon as all have opened it.

    Raises:
        OSError: the file cannot be made.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group: Any = get_tp_group()
    rank, number = group.rank_in_group, group.world_size
    if number == 1:
        return None
    (name,) = least_bytes(secrets.randbelow(2**50))
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"pie-steps-{name}"
    memory = StepBoard.create(path, number) if rank == 0 else None
    try:
        least(0.0)  # Returns once all ranks have called it: the file is there.
        if memory is None:
            memory = StepBoard.join(path, number)
        least(0.0)
    finally:
        if rank == 0:
            path.unlink()
    return StepBoard(memory, rank, number)


def slowest(prior: Prior) -> Prior:
    """The prior that holds on all ranks: the slowest link, and the longest step.

    A bandwidth that one rank could not measure is known to none.
    """
    bandwidth, step, attention, by_request, by_token = least(
        prior.bandwidth or 0.0,
        -(prior.step_seconds or 0.0),
        -prior.attention_seconds,
        -prior.request_seconds,
        -prior.prompt_seconds,
    )
    return prior._replace(
        bandwidth=bandwidth or None,
        step_seconds=None if prior.step_seconds is None else -step,
        attention_seconds=-attention,
        request_seconds=-by_request,
        prompt_seconds=-by_token,
    )


def share_of_pool(pool_gib: float | None, number: int, device_bytes: int, taken: int) -> int:
    """Bytes of the CPU pool that each of so many ranks may take.

    Args:
        pool_gib: size of the pool of all ranks together, in GiB; None for ``auto``.
        number: number of ranks.
        device_bytes: bytes for KV on each rank's device.
        taken: CPU bytes that vLLM itself is still going to take on all ranks.

    Raises:
        ConfigError: the pool of all ranks does not fit.
    """
    pool_bytes = resolve_pool_bytes(pool_gib, number * device_bytes, taken)
    if pool_gib is None:
        logger.info(
            "Pie: --pie-pool-gib auto is %.2f GiB for %d ranks, the smaller of four times their "
            "%.2f GiB for KV and half of the CPU memory that is left",
            pool_bytes / 2**30,
            number,
            number * device_bytes / 2**30,
        )
    check_pool_fits(pool_bytes, taken)
    (share,) = least_bytes(pool_bytes // number)
    return share
