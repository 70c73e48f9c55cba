"""How large the CPU pool is, and whether it fits."""

from __future__ import annotations

from pie_vllm.engine.host_memory import attainable_bytes, auto_pool_bytes, available_host_bytes
from pie_vllm.errors import ConfigError

GIB = 2**30


def resolve_pool_bytes(pool_gib: float | None, device_bytes: int, taken: int) -> int:
    """Bytes of the CPU pool.

    Args:
        pool_gib: what the user gave, or None for ``auto``.
        device_bytes: the device's KV bytes.
        taken: CPU bytes that vLLM itself is still going to take.
    """
    if pool_gib is not None:
        return int(pool_gib * GIB)
    return auto_pool_bytes(device_bytes, max(0, available_host_bytes() - taken))


def check_pool_fits(pool_bytes: int, taken: int) -> None:
    """Refuse a pool that free CPU memory cannot hold, before anything is allocated.

    What a virtual machine's balloon can give back counts as free: the pool grows as it is needed,
    and is smaller where memory does not come.

    Args:
        pool_bytes: bytes of the pool.
        taken: CPU bytes that vLLM itself is still going to take.

    Raises:
        ConfigError: states the amounts.
    """
    available = attainable_bytes()
    if pool_bytes > available - taken:
        room = max(0, available - taken)
        raise ConfigError(
            f"--pie-pool-gib {pool_bytes / GIB:.3f} does not fit: {available / GIB:.3f} GiB of CPU "
            f"memory are free (system and cgroup limit), of which vLLM itself will take "
            f"{taken / GIB:.3f} GiB. Give at most {room / GIB:.3f}, or free memory."
        )
