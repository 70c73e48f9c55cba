"""The gather kernel: its machine code, compiled ahead or now, and an engine's use of it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pie_vllm.engine import nvrtc
from pie_vllm.errors import PieError

if TYPE_CHECKING:
    from pie_vllm.engine.transfer_engine import TransferEngine

ENTRY = "pie_gather"
"""The kernel's name in an image; its arguments are described in ``gather.cu``."""

SECONDS = 60.0
"""Seconds that NVRTC may take; it needs one."""

NATIVE = Path(__file__).resolve().parent.parent / "_native"


class GatherImage(NamedTuple):
    """What the CUDA driver loads as a module."""

    image: bytes
    origin: Literal["ahead", "nvrtc"]


class NoGather(NamedTuple):
    """There is no image; the copy engines do all copies. The caller logs why."""

    reason: str


class Images(Protocol):
    """``gather_image``, or what stands in for it in tests."""

    def __call__(self, arch: str | None, *, ahead: bool = True) -> GatherImage | NoGather:
        """The kernel for a device."""


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
        return GatherImage(_compile(source, arch), "nvrtc")
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return NoGather(
            f"it was not compiled with the package, and NVRTC does not compile it for {arch}: "
            f"{error}. Install pie-vllm[cuda], or reinstall pie_vllm where nvcc is"
        )


def device_arch(engine: TransferEngine) -> str | None:
    """The architecture of the engine's device, as ``"sm_90"``; None: it runs no kernels."""
    text = ctypes.create_string_buffer(32)
    engine.handle.call("pie_device_arch", text, len(text))
    return text.value.decode() or None


def load_gather(
    engine: TransferEngine, threshold_bytes: int, *, images: Images = gather_image, blocks: int = 8
) -> GatherImage | NoGather:
    """Give the engine the kernel for its device; raises nothing.

    Arguments as ``TransferEngine.use_gather``; ``images`` is for tests.
    """

    def use(image: bytes) -> None:
        engine.use_gather(image, threshold_bytes, blocks)

    try:
        return install_image(engine, use, images=images)
    except PieError as error:
        return NoGather(str(error))


def install_image(
    engine: TransferEngine, use: Callable[[bytes], None], *, images: Images = gather_image
) -> GatherImage | NoGather:
    """Give ``use`` the kernel for an engine's device; ``images`` is for tests.

    Raises:
        PieError: what ``use`` raised; of two images, for the first, whose reason is the one to
            mend, unless the second could be had and fails too.
    """
    arch = device_arch(engine)
    if arch is None:
        return NoGather("the device runs no kernels")
    found = images(arch)
    if isinstance(found, NoGather):
        return found
    try:
        use(found.image)
    except PieError:
        again = images(arch, ahead=False) if found.origin == "ahead" else found
        if again == found or isinstance(again, NoGather):
            raise
        use(again.image)
        return again
    return found


def use_gather(
    engine: TransferEngine, threshold_bytes: int, *, images: Images = gather_image, blocks: int = 8
) -> str:
    """Have the engine load pieces below the threshold by the kernel where it can.

    Args:
        engine: before or between its steps.
        threshold_bytes: as ``LinkSpeed.gather_below``; 0 is no kernel.
        images: for tests.
        blocks: as ``TransferEngine.use_gather``.

    Returns:
        A sentence for the log: from when on the kernel is used, or why it is not.
    """
    if threshold_bytes <= 0:
        return "gather kernel not used: it was not measured to be faster than the copy engines"
    found = load_gather(engine, threshold_bytes, images=images, blocks=blocks)
    if isinstance(found, NoGather):
        return f"gather kernel not used: {found.reason}"
    return (
        f"gather kernel of {blocks} CTAs used for loads in pieces below "
        f"{threshold_bytes / 1024:.4g} KiB"
    )


def _compile(source: Path, arch: str) -> bytes:
    # In a process of its own: a compiler that breaks there breaks nobody else.
    command = [sys.executable, str(Path(nvrtc.__file__)), str(source), arch]
    done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise RuntimeError(lines)
    return done.stdout
