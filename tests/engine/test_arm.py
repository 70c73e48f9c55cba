"""The engine on Arm, with pages of 4 and of 64 KiB: built by a cross compiler, run by an emulator.

Arm servers, a GH200's CPU among them, often have 64 KiB pages. The emulator orders memory as the
machine below it does: what Arm may reorder is left to the thread sanitizer.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.helpers.builds import build_program
from tests.helpers.standin import ENVIRONMENT, include_folder, library_folder

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ROOT = "/usr/aarch64-linux-gnu"
PACKAGES = "g++-aarch64-linux-gnu, qemu-user-static"
PAGES = [4096, 65536]

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
        reason=f"no {COMPILER} or no {EMULATOR}: install the Debian packages {PACKAGES}",
    ),
]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the test programs, which contain the engine; no warning was given."""
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        patch.setenv("NVCC", "")
        printed = io.StringIO()
        with redirect_stdout(printed):
            for name in ("random_plans", "fuzz_interface", "gather"):
                build_program(name, folder)
        assert printed.getvalue() == ""
    return folder


@pytest.fixture(scope="module")
def emulate(compiled: Path) -> Run:
    """Runs one of the programs with pages of that size."""

    def run(name: str, page: int, *arguments: str, **environment: str) -> str:
        command = [EMULATOR, "-L", ROOT, "-p", str(page)]
        for key, value in environment.items():
            command += ["-E", f"{key}={value}"]
        done = subprocess.run(
            [*command, str(compiled / name), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={"PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.parametrize("page", PAGES)
def test_random_plans(emulate: Run, page: int) -> None:
    assert "40 seeds, no wrong byte" in emulate("random_plans", page, "1", "40")


@pytest.mark.parametrize("page", PAGES)
def test_random_plans_over_the_stand_in_for_cuda(
    emulate: Run, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CUDA's own granularity, which is no matter of pages."""
    if include_folder() is None:
        pytest.skip("no cuda.h: neither the package nvidia-cuda-runtime nor a toolkit")
    monkeypatch.setenv("CXX", COMPILER)
    settings = {"LD_LIBRARY_PATH": str(library_folder()), ENVIRONMENT: f"granularity={2 << 20}"}
    assert "20 seeds, no wrong byte" in emulate("random_plans", page, "1", "20", "cuda", **settings)


@pytest.mark.parametrize("page", PAGES)
def test_random_calls(emulate: Run, page: int) -> None:
    """The engine asks the system for its pages."""
    wanted = f"no crash; granularity {page}\n"
    assert emulate("fuzz_interface", page, "1", "40").endswith(wanted)


def test_the_gather_kernel(emulate: Run) -> None:
    assert "10 seeds, no wrong byte" in emulate("gather", 65536, "1", "10")
