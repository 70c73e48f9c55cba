"""The native engine's look at free memory sees what Python's sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pie_vllm.engine.host_memory import available_host_bytes
from tests.helpers.builds import build_program

MEMINFO = "MemTotal:  9000000 kB\nMemFree: 1 kB\nMemAvailable:  8000000 kB\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
LIMITED = {
    "proc/self/cgroup": "0::/a/b\n",
    f"{V2}/a/memory.max": "2000000",
    f"{V2}/a/memory.current": "1900000",
    f"{V2}/a/memory.stat": "anon 7\ninactive_file 50000\n",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program("free_memory", tmp_path_factory.mktemp("free_memory"))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8_000_000 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 8_000_000 * 1024),
        (LIMITED, 150_000),
        ({**LIMITED, f"{V2}/a/b/memory.max": "max", f"{V2}/a/b/memory.current": "5"}, 150_000),
        ({**LIMITED, f"{V2}/a/b/memory.max": "90", f"{V2}/a/b/memory.current": "95"}, 0),
        ({**LIMITED, "proc/self/cgroup": "0::/elsewhere\n"}, 8_000_000 * 1024),
        (
            {
                "proc/self/cgroup": "3:cpu,memory:/c\n1:name=systemd:/\n",
                f"{V1}/c/memory.limit_in_bytes": "5000",
                f"{V1}/c/memory.usage_in_bytes": "1000",
                f"{V1}/memory.limit_in_bytes": str(2**63 - 4096),
                f"{V1}/memory.usage_in_bytes": "1000",
            },
            4000,
        ),
    ],
)
def test_both_looks_see_the_same(
    program: Path, tmp_path: Path, files: dict[str, str], wanted: int
) -> None:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = subprocess.run([program, tmp_path], capture_output=True, text=True, check=True)
    assert (int(found.stdout), available_host_bytes(tmp_path)) == (wanted, wanted)


def test_this_machine(program: Path) -> None:
    found = subprocess.run([program], capture_output=True, text=True, check=True)
    assert int(found.stdout) == pytest.approx(available_host_bytes(), rel=0.1)
