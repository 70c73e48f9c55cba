"""What is for CUDA compiles without a device: by nvcc where there is one, and by NVRTC."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.builds import CSRC, build_script
from pie_vllm.engine.gather import ENTRY, GatherImage, NoGather, gather_image
from tests.helpers.standin import include_folder

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

KERNEL = CSRC / "kernels" / "gather.cu"

FAKE_CXX = """#!/bin/sh
all="$*"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "$all" >"$2"; shift; done
"""
"""Only writes down its arguments: set-up has compiled the library, from the same files."""

FAKE_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo {known}; exit; fi
all="$*"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "$all" >"$2"; shift; done
echo 'ptxas info: {spills} bytes spill stores, 0 bytes spill loads'
echo 'ptxas info: Used 64 registers'
exit {status}
"""


def _build(option: str, folder: Path, nvcc: str | None) -> subprocess.CompletedProcess[str]:
    compilers = {"CXX": _script(folder / "cxx", FAKE_CXX)}
    if nvcc is not None:
        compilers["NVCC"] = nvcc
    return subprocess.run(
        [sys.executable, str(CSRC / "build.py"), option, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **compilers},
    )


def _fake_nvcc(folder: Path, known: str = "sm_80 sm_90", spills: int = 0, status: int = 0) -> str:
    text = FAKE_NVCC.format(known=known, spills=spills, status=status)
    return _script(folder / "nvcc", text)


def _script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def _is_for(image: bytes, arch: str) -> bool:
    """A CUDA binary (ELF; e_flags has the architecture in its second byte) with the kernel."""
    flags = int.from_bytes(image[48:52], "little")
    named = f".text.{ENTRY}\0".encode() in image
    return image[:4] == b"\x7fELF" and named and f"sm_{flags >> 8 & 0xFF}" == arch


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_compiles_the_kernel(tmp_path: Path) -> None:
    done = _build("--cuda", tmp_path, None)
    assert done.returncode == 0, done.stderr
    for arch in ARCHITECTURES:
        assert _is_for((tmp_path / f"gather.{arch}.cubin").read_bytes(), arch)
        assert f"gather.{arch}.cubin" in done.stdout
    assert done.stdout.count("0 bytes spill stores, 0 bytes spill loads") == len(ARCHITECTURES)
    fatbin = (tmp_path / "gather.fatbin").read_bytes()
    assert gather_image(None, folder=tmp_path) == GatherImage(fatbin, "ahead")


def test_without_nvcc_the_check_is_skipped_and_says_so(tmp_path: Path) -> None:
    done = _build("--cuda", tmp_path, "")
    assert done.returncode == 0
    assert done.stdout.startswith("skipped: there is no nvcc")


def test_an_nvcc_that_fails_is_a_failure_with_its_output(tmp_path: Path) -> None:
    done = _build("--cuda", tmp_path, _fake_nvcc(tmp_path, status=1))
    assert done.returncode != 0
    assert "Used 64 registers" in done.stderr


def test_spills_are_a_failure(tmp_path: Path) -> None:
    done = _build("--cuda", tmp_path, _fake_nvcc(tmp_path, spills=8))
    assert "gather.sm_80.cubin keeps registers in memory" in done.stderr


def test_an_nvcc_that_lacks_an_architecture_compiles_the_others(tmp_path: Path) -> None:
    done = _build("--cuda", tmp_path, _fake_nvcc(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "sm_100" not in done.stdout
    if include_folder() is not None:
        assert "-DPIE_WITH_CUDA=1" in (tmp_path / "libpie.so").read_text()
    arguments = (tmp_path / "gather.fatbin").read_text()
    assert "code=sm_90" in arguments
    assert "code=sm_100" not in arguments
    done = _build("--cuda", tmp_path, _fake_nvcc(tmp_path, known="sm_50"))
    assert done.returncode == 0
    assert done.stdout.startswith("skipped")


def test_the_library_is_built_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not get the machine code of an older text."""
    monkeypatch.setenv("NVCC", "")
    native = build_script()
    empty = tmp_path / "empty.cpp"
    empty.touch()
    monkeypatch.setattr(native, "SOURCES", [empty])
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "gather.fatbin").write_bytes(b"old")
    native.build_library(folder / "libpie.so")
    assert sorted(path.name for path in folder.iterdir()) == ["gather.cu", "libpie.so"]


COMPILE = """
import sys
from pathlib import Path
from pie_vllm.engine.gather import gather_image
found = gather_image(sys.argv[1], folder=Path(sys.argv[2]))
assert "torch" not in sys.modules
assert "libcuda.so" not in Path("/proc/self/maps").read_text()
sys.stdout.buffer.write(found.image)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The kernel of an installed package that was built where there was no nvcc."""
    shutil.copy(KERNEL, tmp_path)
    return tmp_path


def _need_nvrtc() -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"there is no NVRTC: {error}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvrtc_compiles_without_a_driver(folder: Path, arch: str) -> None:
    _need_nvrtc()
    command = [sys.executable, "-c", COMPILE, arch, str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert _is_for(done.stdout, arch)


def test_nvrtc_that_refuses_is_a_reason(folder: Path) -> None:
    _need_nvrtc()
    found = gather_image("sm_1", folder=folder)
    assert isinstance(found, NoGather)
    assert "sm_1:" in found.reason
    assert "invalid value for --gpu-architecture" in found.reason
    (folder / "gather.cu").write_text("int x = ;")
    found = gather_image("sm_90", folder=folder)
    assert isinstance(found, NoGather)
    assert "expected an expression" in found.reason


@pytest.fixture
def no_cuda_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has cuda-python missing."""
    (tmp_path / "without" / "cuda").mkdir(parents=True)
    (tmp_path / "without" / "cuda" / "__init__.py").write_text("raise ImportError('no cuda')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))


@pytest.mark.usefixtures("no_cuda_python")
def test_what_was_compiled_ahead_comes_first(folder: Path) -> None:
    (folder / "gather.fatbin").write_bytes(b"code")
    assert gather_image("sm_90", folder=folder) == GatherImage(b"code", "ahead")
    assert isinstance(gather_image("sm_90", ahead=False, folder=folder), NoGather)


@pytest.mark.usefixtures("no_cuda_python")
def test_each_lack_has_its_reason(folder: Path) -> None:
    found = gather_image("sm_90", folder=folder)
    assert isinstance(found, NoGather)
    assert "cuda-python is missing" in found.reason
    found = gather_image(None, folder=folder)
    assert isinstance(found, NoGather)
    assert "no device was named" in found.reason
    (folder / "gather.cu").unlink()
    found = gather_image("sm_90", folder=folder)
    assert isinstance(found, NoGather)
    assert "gather.cu is missing" in found.reason


def test_the_package_has_the_kernel() -> None:
    """Whether nvcc is there or not."""
    kernel = Path(sys.modules[gather_image.__module__].__file__ or "").parents[1] / "_native"
    assert (kernel / "gather.cu").read_bytes() == (KERNEL).read_bytes()
