"""Compiles a CUDA file with NVRTC, by cuda-python: ``python nvrtc.py FILE sm_90`` prints the cubin.

A program of its own, run by its path: it imports nothing of this package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def compiled(source: bytes, arch: str) -> bytes:
    """The machine code for a device's architecture, as ``"sm_90"``; needs no device.

    Raises:
        ImportError: cuda-python is missing.
        RuntimeError: NVRTC is missing, too old, or refuses; the text has its log.
    """
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


def main() -> None:
    """The command line."""
    try:
        image = compiled(Path(sys.argv[1]).read_bytes(), sys.argv[2])
    except ImportError as error:
        sys.exit(f"cuda-python is missing ({error})")
    except Exception as error:  # cuda-python has errors of its own for a library that is missing
        sys.exit(str(error))
    sys.stdout.buffer.write(image)


if __name__ == "__main__":
    main()
