"""What machine, device, link and software this is."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.machine import driver_cuda_version, load_cuda, smi
from benchmarks.gpu.harness.native import LIBRARY, reason_to_build
from benchmarks.harness.builds import build_script
from pie_vllm.engine.host_memory import available_host_bytes, mem_available_bytes

ATTRIBUTES = {
    "multiprocessors": 16,
    "L2 bytes": 38,
    "copy engines": 40,
    "pageable memory access": 88,
    "host pointer usable for registered memory": 91,
    "host registration supported": 99,
    "pageable access by host page tables (NVLink-C2C)": 100,
    "virtual memory management": 102,
    "fabric handles": 128,
    "device is a NUMA node": 130,
    "host NUMA node": 134,
    "host NUMA virtual memory management": 141,
}
"""Numbers of CUdevice_attribute, cuda.h 13.0."""

LINK_FIELDS = (
    "pci.bus_id",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.max.memory",
    "compute_mode",
    "mig.mode.current",
)
"""Fields of nvidia-smi that are asked for. An idle device may have its link at a lower generation:
see the greatest too."""

PACKAGES = (
    *("torch", "vllm", "triton", "transformers", "flashinfer-python", "numpy", "safetensors"),
    *("cuda-bindings", "cuda-python", "nvidia-ml-py", "nvidia-cuda-runtime"),
)


def run(context: Context) -> None:
    """Report everything that can be found out; what cannot is left out."""
    report = context.report
    for name, value in host_facts().items():
        report.fact(name, value)
    for name, value in software_facts().items():
        report.fact(name, value)
    report.fact("native engine to be built", reason_to_build(context.driver) or "no")
    if LIBRARY.exists():
        report.fact("mapping granularity, bytes", granularity_text(context.driver))
    if context.dry:
        report.note("no GPU facts in a dry run")
        return
    device = torch_facts()
    device |= attributes()
    link = smi(LINK_FIELDS)
    device |= {f"nvidia-smi {name}": value for name, value in link.items()}
    device |= nvml_facts()
    device["CUDA of the driver"] = driver_cuda_version()
    device["NUMA node of the PCI device"] = numa_node(link.get("pci.bus_id", ""))
    for name, value in device.items():
        report.fact(name, value)
    mapped = device.get("virtual memory management")
    report.check("virtual memory management", mapped, "1", mapped == 1)


def host_facts() -> dict[str, Any]:
    """Cores, memory, NUMA nodes, limits."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "NUMA nodes": len(nodes) or 1,
        "memory available, GiB": mem_available_bytes() / 2**30,
        "memory available to this process, GiB": available_host_bytes() / 2**30,
        "lockable memory": "unlimited" if limit == resource.RLIM_INFINITY else limit,
        "transparent huge pages": huge.read_text().strip() if huge.exists() else "unknown",
    }


def software_facts() -> dict[str, Any]:
    """Versions, and which compilers are here."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found["nvcc"] = said(shutil.which("nvcc") or f"{home}/bin/nvcc", "--version")
    found["NVRTC"] = nvrtc()
    compiler = os.environ.get("CXX") or "g++"
    found["C++ compiler"] = said(compiler, "--version", last=False)
    headers = build_script().cuda_headers()
    text = (headers / "cuda.h").read_text() if headers else ""
    version = re.search(r"^#define CUDA_VERSION (\d+)", text, re.MULTILINE)
    found["cuda.h"] = version[1] if version else "none"
    return found


def said(*command: str, last: bool = True) -> str:
    """The last or first line that a command prints, or "none"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    lines = done.stdout.strip().splitlines()
    return lines[-1 if last else 0] if lines else "none"


def nvrtc() -> str:
    """How NVRTC can be had: by a library of the system or by cuda-python."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    try:
        from cuda.bindings import nvrtc as bindings

        _, major, minor = bindings.nvrtcVersion()
        return f"cuda-python, {major}.{minor}"
    except Exception as error:
        return f"none ({type(error).__name__})"


def granularity_text(driver: str) -> int | str:
    """What the engine's driver maps in one piece, or why it cannot tell."""
    from pie_vllm.engine.native import driver_granularity
    from pie_vllm.errors import PieError

    try:
        return driver_granularity(driver)
    except PieError as error:
        return str(error)


def torch_facts() -> dict[str, Any]:
    """What torch says of the device.

    Raises:
        RuntimeError: there is none.
    """
    import torch

    from benchmarks.gpu.harness.compute import CudaCompute

    CudaCompute()
    properties: Any = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "device memory, GiB": total / 2**30,
        "device memory free, GiB": free / 2**30,
        "CUDA of torch": torch.version.cuda,
        "devices": torch.cuda.device_count(),
    }


def attributes() -> dict[str, int]:
    """Attributes of the first device, by the driver's own library."""
    library, device, value = load_cuda(), ctypes.c_int(), ctypes.c_int()
    if library is None or library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        return {}
    return {
        name: value.value
        for name, number in ATTRIBUTES.items()
        if library.cuDeviceGetAttribute(ctypes.byref(value), number, device) == 0
    }


def nvml_facts() -> dict[str, Any]:
    """The link as NVML tells it, where its Python package is here."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "PCIe generation, now and at most": [
                pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
                pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            ],
            "PCIe lanes, now and at most": [
                pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
                pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
            ],
        }
    except Exception as error:  # Not installed, or a device that does not tell.
        return {"NVML": f"not asked ({type(error).__name__})"}


def numa_node(bus: str) -> str:
    """The node that the device hangs on, by the PCI bus; -1 is none."""
    # nvidia-smi writes the domain with eight digits, the kernel with four.
    path = Path("/sys/bus/pci/devices") / bus.lower()[4:] / "numa_node"
    return path.read_text().strip() if bus and path.exists() else "unknown"
