"""Builds the native engine where it must be, and makes vLLM find the plugin without an install."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

from benchmarks.harness.builds import ROOT, build_script

LIBRARY = ROOT / "pie_vllm" / "_native" / "libpie.so"

CUDA_MARK = b"cuMemcpyBatchAsync"
"""A name that the library holds when the CUDA driver is part of it."""


def reason_to_build(driver: str, library: Path = LIBRARY) -> str:
    """Why the library must be built; empty where it is there, newer than its sources, and fits."""
    script = build_script()
    if not library.exists():
        return "it is missing"
    sources = [*script.SOURCES, *script.HEADERS, script.GATHER, ROOT / "csrc" / "build.py"]
    if max(source.stat().st_mtime for source in sources) > library.stat().st_mtime:
        return "it is older than its sources"
    if driver == "cuda" and CUDA_MARK not in library.read_bytes():
        return "it was built without the CUDA driver"
    if driver == "cuda" and not library.with_name(script.GATHER.name).exists():
        return "the gather kernel is not beside it"
    return ""


def ensure_built(driver: str, library: Path = LIBRARY) -> str:
    """Build the library where there is reason to; returns what was done, for the results.

    Raises:
        RuntimeError: there is no compiler or no cuda.h, or the compiler failed.
    """
    reason = reason_to_build(driver, library)
    if not reason:
        return "the native engine is there and newer than its sources"
    script = build_script()
    headers = script.cuda_headers()
    if driver == "cuda" and headers is None:
        raise RuntimeError(
            "the native engine must be built, and cuda.h of CUDA 12.8 or newer was not found: set "
            "CUDA_HOME to a toolkit, or install the package nvidia-cuda-runtime"
        )
    script.build_library(library)
    return f"the native engine was built, because {reason}, with " + (
        "the CUDA driver" if headers else "the host driver alone: no cuda.h was found"
    )


def plugin_folders(scratch: Path) -> list[Path]:
    """What PYTHONPATH needs so that vLLM loads this checkout's plugin in all of its processes.

    vLLM finds plugins by the metadata of installed packages. Where pie_vllm is not installed, a
    folder with its metadata alone stands for that.
    """
    folders = [ROOT]
    if not any(point.name == "pie" for point in entry_points(group="vllm.general_plugins")):
        info = scratch / "plugin" / "pie_vllm-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pie-vllm\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\npie = pie_vllm.vllm.plugin:register\n"
        )
        folders.append(info.parent)
    return folders


def python_path(scratch: Path) -> str:
    """PYTHONPATH for the stages: this checkout first, then what the caller set."""
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([*map(str, plugin_folders(scratch)), *filter(None, [before])])
