"""How much CPU memory this process can take, and how large a pool of it is."""

from __future__ import annotations

from pathlib import Path

from pie_vllm.errors import ConfigError

GIB = 2**30

POOL_PER_DEVICE = 4
"""``auto``: the pool is at most this many times the device's KV bytes."""

_UNLIMITED_V1 = 1 << 60
"""cgroup v1 writes a number near 2**63 for "no limit"."""


def mem_available_bytes(root: Path = Path("/")) -> int:
    """``MemAvailable`` of ``/proc/meminfo`` in bytes, without that of NUMA nodes without CPUs.

    The memory of a GPU can be such a node (GH200), which the kernel counts as its own. Not the sum
    over the other nodes: memory that a virtual machine gets when it touches it is in no node yet.

    Args:
        root: the directory that stands for ``/``; for tests.

    Raises:
        OSError: there is no such file.
        ValueError: it has no ``MemAvailable`` line.
    """
    found = _meminfo(root / "proc/meminfo").get("MemAvailable")
    if found is None:
        raise ValueError(f"{root / 'proc/meminfo'} has no MemAvailable line")
    return max(0, found - sum(map(_node_available, _nodes_without_cpus(root))))


def attainable_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can take now or once its host gives the virtual machine more.

    What a balloon has taken from the machine (``Balloon`` of ``/proc/meminfo``) comes back when it
    is wanted; a limit of the cgroup stands.

    Args:
        root: the directory that stands for ``/``; for tests.
    """
    machine = mem_available_bytes(root) + _meminfo(root / "proc/meminfo").get("Balloon", 0)
    group = cgroup_available_bytes(root)
    return machine if group is None else min(machine, group)


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name, of the machine's file or that of a node, whose lines begin with its name."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words[1:] == ["kB"]:
            found[name.split()[-1]] = int(words[0]) * 1024
    return found


def _nodes_without_cpus(root: Path) -> list[Path]:
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    try:
        return [node for node in nodes if not (node / "cpulist").read_text().strip()]
    except OSError:  # A container may hide it.
        return []


def _node_available(node: Path) -> int:
    """Bytes of a node that ``MemAvailable`` counts: free ones, and cached files."""
    try:
        found = _meminfo(node / "meminfo")
    except OSError:
        return 0
    return max(0, found.get("MemFree", 0) + found.get("FilePages", 0) - found.get("Shmem", 0))


def cgroup_available_bytes(root: Path = Path("/")) -> int | None:
    """Least ``limit - usage`` over this process's cgroup and its parents, v2 and v1.

    Page cache that the kernel can drop (``inactive_file``) does not count as
    used, as in the kernel's own ``MemAvailable``. Never below 0.

    Args:
        root: the directory that stands for ``/``; for tests.

    Returns:
        Bytes, or ``None`` where no limit is set or none can be read.
    """
    rooms = [
        room
        for base, path, names in _memory_groups(root)
        for group in _with_parents(base, path)
        if (room := _room(group, *names)) is not None
    ]
    return min(rooms, default=None)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: the least of machine and cgroups.

    Args:
        root: the directory that stands for ``/``; for tests.
    """
    machine = mem_available_bytes(root)
    group = cgroup_available_bytes(root)
    return machine if group is None else min(machine, group)


def auto_pool_bytes(device_bytes: int, available: int) -> int:
    """The pool size that ``auto`` means.

    ``min(4 * device_bytes, available // 2)``: beyond some multiple of the
    device's own KV memory the link cannot feed more, and half of the free
    memory stays with the page cache and everything else on the machine.

    Args:
        device_bytes: the device's KV memory, ring included.
        available: from ``available_host_bytes()``.
    """
    return max(0, min(POOL_PER_DEVICE * device_bytes, available // 2))


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


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_groups(root: Path) -> list[tuple[Path, str, tuple[str, str, str]]]:
    """Mount point, path inside it and file names of the cgroups that limit memory."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups.append((mount, path, _V2))
        elif "memory" in controllers.split(","):
            groups.append((mount / "memory", path, _V1))
    return groups


def _with_parents(base: Path, path: str) -> list[Path]:
    """The group's directory and all above it, up to the mount point.

    Inside a container the path may be the host's and lie outside the mount;
    what does not exist is passed over by the reader.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """``limit - usage`` of one group, ``None`` without a limit."""
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
    except (OSError, ValueError):  # v2 writes "max" for no limit
        return None
    if limit >= _UNLIMITED_V1:
        return None
    return max(0, limit - usage + _cache(group, cache_name))


def _cache(group: Path, name: str) -> int:
    """Bytes of page cache that the kernel drops first."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
