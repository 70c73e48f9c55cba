"""The machine code of the gather kernel: compiled with the package, or now, or not to be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

ENTRY = "pie_gather"
"""The kernel's name in an image; its arguments are described in ``gather.cu``."""

NATIVE = Path(__file__).resolve().parent.parent / "_native"


class GatherImage(NamedTuple):
    """What the CUDA driver loads as a module."""

    image: bytes
    origin: Literal["ahead", "nvrtc"]


class NoGather(NamedTuple):
    """There is no image; the copy engines do all copies. The caller logs why."""

    reason: str


def gather_image(
    arch: str | None, *, ahead: bool = True, folder: Path = NATIVE
) -> GatherImage | NoGather:
    """The kernel for a device; asks neither torch nor the CUDA driver, and raises nothing.

    Args:
        arch: the device's architecture, as ``"sm_90"``; None when it is not known, which leaves
            what was compiled with the package.
        ahead: False after the driver refused that image: it may lack the device's architecture.
        folder: where the package keeps the kernel, for tests.
    """
    compiled = folder / "gather.fatbin"
    if ahead and compiled.exists():
        return GatherImage(compiled.read_bytes(), "ahead")
    if arch is None:
        return NoGather("it was not compiled with the package, and no device was named")
    source = folder / "gather.cu"
    if not source.exists():
        return NoGather(f"{source} is missing: reinstall pie_vllm")
    try:
        return GatherImage(_compile(source.read_bytes(), arch), "nvrtc")
    except ImportError as error:
        return NoGather(
            f"it was not compiled with the package, and cuda-python is missing ({error}): "
            "install pie-vllm[cuda], or reinstall pie_vllm where nvcc is"
        )
    except (RuntimeError, OSError) as error:  # NVRTC is not found, too old, or fails
        return NoGather(f"NVRTC does not compile it for {arch}: {error}")


def _compile(source: bytes, arch: str) -> bytes:
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...], about: Any = None) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{result[0].name} {about() if about else ''}".rstrip())
        return result[1] if len(result) > 1 else None

    def text(size: Any, fill: Any) -> bytes:
        length: int = check(size(program))
        buffer = b" " * length
        check(fill(program, buffer))
        return buffer

    def log() -> str:
        text_of_log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        return text_of_log.rstrip(b"\0 \n").decode(errors="replace")

    program = check(nvrtc.nvrtcCreateProgram(source, b"gather.cu", 0, [], []))
    try:
        options = [b"--std=c++17", f"--gpu-architecture={arch}".encode()]
        check(nvrtc.nvrtcCompileProgram(program, len(options), options), log)
        return text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
