"""What every result carries: machine, driver, CUDA version, commit, command. Without torch."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.harness.builds import ROOT
from benchmarks.harness.machine import commit as described
from benchmarks.harness.machine import facts as machine_facts

SMI_FIELDS = ("name", "driver_version", "memory.total")


def smi(fields: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of the first device; empty where it is missing or has none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    done = subprocess.run(
        [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not done.stdout.strip():
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


def load_cuda() -> ctypes.CDLL | None:
    """The CUDA driver's library, where there is one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def device_free_bytes() -> int:
    """Free memory of the device whose context is current on this thread.

    Raises:
        RuntimeError: there is none.
    """
    library, free, total = load_cuda(), ctypes.c_size_t(), ctypes.c_size_t()
    if library is None or library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) != 0:
        raise RuntimeError("cuMemGetInfo: no CUDA context is current")
    return free.value


def driver_cuda_version() -> str:
    """The newest CUDA version that the driver knows, such as 13.0."""
    library, version = load_cuda(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "none"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def short_machine() -> dict[str, Any]:
    """Machine, device, driver and versions."""
    device = smi(SMI_FIELDS)
    facts = machine_facts()
    for key in ("date", "command", "commit", "bfloat16_instructions"):
        facts.pop(key)
    return {
        "device": device.get("name", "none"),
        "driver": device.get("driver_version", "none"),
        "CUDA of the driver": driver_cuda_version(),
        "device memory": device.get("memory.total", "none"),
        **facts,
    }


def sources_digest() -> str:
    """A digest of the code: says which it was where a copy of the checkout has no .git."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "**/*"), ("pie_vllm", "**/*.py"), ("benchmarks", "**/*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def provenance(commit: str | None) -> dict[str, str]:
    """Provenance of one stage: date, command, commit, digest of the sources."""
    facts = machine_facts()
    arguments = " ".join(sys.argv[1:])
    return {
        "date": str(facts["date"]),
        "command": f"python benchmarks/gpu_check.py {arguments}".strip(),
        "commit": commit or described(),
        "sources": sources_digest(),
    }
