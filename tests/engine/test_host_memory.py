"""Facts about host memory, read from a made-up root."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_vllm.engine.host_memory import (
    attainable_bytes,
    auto_pool_bytes,
    available_host_bytes,
    cgroup_available_bytes,
    mem_available_bytes,
)

GIB = 1 << 30
V1_UNLIMITED = str(2**63 - 4096)


def make(root: Path, files: dict[str, str], available: int = 16 * GIB) -> Path:
    files = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {available // 1024} kB\nX: 1\n",
        **files,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(path: str, limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup{path}"
    return {
        f"{base}/memory.max": limit + "\n",
        f"{base}/memory.current": f"{usage}\n",
        f"{base}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def v1(path: str, limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory{path}"
    return {
        f"{base}/memory.limit_in_bytes": limit,
        f"{base}/memory.usage_in_bytes": str(usage),
        f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


def test_no_cgroup(tmp_path: Path) -> None:
    root = make(tmp_path, {})
    assert cgroup_available_bytes(root) is None
    assert available_host_bytes(root) == 16 * GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", **v2("", "max", GIB)}, None),
        ({"proc/self/cgroup": "0::/\n", **v2("", str(8 * GIB), GIB)}, 7 * GIB),
        ({"proc/self/cgroup": "0::/\n", **v2("", str(8 * GIB), 3 * GIB, GIB)}, 6 * GIB),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                **v2("/a/b", "max", 0),
                **v2("/a", str(4 * GIB), GIB),
            },
            3 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                **v2("/a/b", str(2 * GIB), GIB),
                **v2("/a", str(4 * GIB), GIB),
            },
            GIB,
        ),
        ({"proc/self/cgroup": "0::/gone/away\n", **v2("", str(4 * GIB), GIB)}, 3 * GIB),
        ({"proc/self/cgroup": "0::/../../x\n", **v2("", str(4 * GIB), GIB)}, 3 * GIB),
        ({"proc/self/cgroup": "0::/\n", **v2("", str(GIB), 2 * GIB)}, 0),
        (
            {
                "proc/self/cgroup": "9:memory:/docker/1\n1:cpu:/\n0::/\n",
                **v1("", V1_UNLIMITED, 0),
                **v1("/docker/1", str(6 * GIB), 2 * GIB, GIB),
            },
            5 * GIB,
        ),
        ({"proc/self/cgroup": "9:memory:/\n", **v1("", V1_UNLIMITED, GIB)}, None),
        ({"proc/self/cgroup": "0::/\n", **v2("", "garbage", GIB)}, None),
    ],
)
def test_cgroups(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert cgroup_available_bytes(make(tmp_path, files)) == expected


def test_the_least_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **v2("", str(8 * GIB), GIB)}
    assert available_host_bytes(make(tmp_path, files)) == 7 * GIB
    assert available_host_bytes(make(tmp_path, files, available=5 * GIB)) == 5 * GIB


def node(number: int, cpus: str, **kib: int) -> dict[str, str]:
    base = f"sys/devices/system/node/node{number}"
    lines = [f"Node {number} {name}:  {value} kB\n" for name, value in kib.items()]
    return {f"{base}/cpulist": f"{cpus}\n", f"{base}/meminfo": "".join(lines)}


def test_memory_of_nodes_without_cpus_does_not_count(tmp_path: Path) -> None:
    """A GH200's GPU memory is such a node; its files in memory are no free memory."""
    kib = GIB >> 10
    files = {
        **node(0, "0-71", MemTotal=480 * kib, MemFree=5 * kib, FilePages=2 * kib, Shmem=kib),
        **node(1, "", MemTotal=96 * kib, MemFree=8 * kib, FilePages=3 * kib, Shmem=kib),
        **node(2, "", MemTotal=0),
    }
    root = make(tmp_path, files)
    assert mem_available_bytes(root) == available_host_bytes(root) == (16 - 10) * GIB
    (root / "sys/devices/system/node/node0/cpulist").unlink()
    assert mem_available_bytes(root) == 16 * GIB, "nothing is known of the nodes"


def test_memory_in_no_node_yet_counts(tmp_path: Path) -> None:
    """A virtual machine whose memory grows when it is touched shows the node less than all."""
    root = make(tmp_path, node(0, "0-1", MemFree=GIB >> 10, FilePages=0, Shmem=0))
    assert mem_available_bytes(root) == 16 * GIB


def test_a_balloon_can_give_back_what_it_took(tmp_path: Path) -> None:
    """But not more than the cgroup may have."""
    meminfo = f"MemAvailable: {2 * GIB // 1024} kB\nBalloon: {5 * GIB // 1024} kB\n"
    root = make(tmp_path, {"proc/meminfo": meminfo})
    assert (available_host_bytes(root), attainable_bytes(root)) == (2 * GIB, 7 * GIB)
    make(root, {"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n", **v2("", str(4 * GIB), GIB)})
    assert attainable_bytes(root) == 3 * GIB


def test_no_mem_available_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MemAvailable"):
        mem_available_bytes(make(tmp_path, {"proc/meminfo": "MemTotal: 1 kB\n"}))


def test_this_machine() -> None:
    assert 0 < available_host_bytes() <= mem_available_bytes() * 1.05


@pytest.mark.parametrize(
    ("device", "available", "pool"),
    [(GIB, 100 * GIB, 4 * GIB), (10 * GIB, 16 * GIB, 8 * GIB), (GIB, 0, 0), (0, GIB, 0)],
)
def test_auto_pool(device: int, available: int, pool: int) -> None:
    assert auto_pool_bytes(device, available) == pool
