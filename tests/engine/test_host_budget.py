"""One budget a host: who takes memory looks first, and nobody else takes it meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pie_vllm.engine.host_budget import LEFT_ALONE, lock_path, taking
from pie_vllm.errors import TransferError

MIB = 1 << 20


def test_more_than_is_free_is_refused_before_anything_is_taken(tmp_path: Path) -> None:
    """With the amounts; a little is always left alone."""
    path = tmp_path / "lock"
    with taking(64 * MIB, lambda: 64 * MIB + LEFT_ALONE, path=path):
        pass
    with (
        pytest.raises(TransferError, match="64 MiB are needed and 191 MiB of CPU memory are free"),
        taking(64 * MIB, lambda: 63 * MIB + LEFT_ALONE, path=path),
    ):
        pytest.fail("it was taken")


def test_two_that_look_together_do_not_take_together(tmp_path: Path) -> None:
    """Memory for one of them: the second looks when the first has taken."""
    path = tmp_path / "lock"
    free = [64 * MIB + LEFT_ALONE]
    refused = []

    def take() -> None:
        try:
            with taking(64 * MIB, lambda: free[0], path=path):
                time.sleep(0.05)
                free[0] -= 64 * MIB
        except TransferError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert free == [LEFT_ALONE]
    assert len(refused) == 3


def test_another_process_that_stopped_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """And one that ended is not waited for at all: its lock goes with it."""
    path = tmp_path / "lock"
    code = (
        "import sys, time, pathlib\n"
        "from pie_vllm.engine.host_budget import taking\n"
        "with taking(1, lambda: 1 << 40, path=pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with (
        pytest.raises(TransferError, match="another process has held"),
        taking(1, lambda: 1 << 40, path=path, seconds=0.1),
    ):
        pytest.fail("both took")
    other.kill()
    other.wait()
    other.stdout.close()
    with taking(1, lambda: 1 << 40, path=path, seconds=5):
        pass


def test_all_processes_of_a_host_share_the_lock() -> None:
    """Whatever their working folder; where the file may not be opened the look alone counts."""
    assert lock_path().is_absolute()
    with taking(1, lambda: 1 << 40):
        assert os.path.exists(lock_path())
    with taking(1, lambda: 1 << 40, path=Path("/nowhere/lock")):
        pass
