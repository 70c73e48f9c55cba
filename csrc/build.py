"""Builds the engine with a C++17 compiler alone: the library, or the C++ test program.

``python csrc/build.py --out DIR`` writes ``DIR/libpie.so``, with ``--sanitize address|thread``
under that sanitizer; ``--test`` builds ``DIR/random_plans``. The compiler is ``$CXX`` or g++.

The CUDA driver is part of it where cuda.h of CUDA 12.8 or newer is found, in ``$CUDA_HOME``, in
the package nvidia-cuda-runtime or under /usr/local/cuda. No library of CUDA is linked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
SOURCES = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("drivers/*.cpp")])
CUDA_SOURCES = sorted(CSRC.glob("drivers/cuda*.cpp"))
HEADERS = sorted([*CSRC.glob("*.h"), *CSRC.glob("drivers/*.h")])
TEST_SOURCES = sorted(CSRC.glob("test/*.cpp"))
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]

OLDEST_CUDA_HEADER = 12080
"""Declares cuMemcpyBatchAsync."""


def cuda_headers() -> Path | None:
    """The folder of the first cuda.h that is new enough."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [Path(entry or ".") / "nvidia" for entry in sys.path]
    roots += [folder / name for folder in packages for name in ("cu13", "cuda_runtime")]
    for root in [*roots, Path("/usr/local/cuda")]:
        header = root / "include" / "cuda.h"
        if header.is_file():
            found = re.search(r"^#define CUDA_VERSION (\d+)", header.read_text(), re.MULTILINE)
            if found and int(found[1]) >= OLDEST_CUDA_HEADER:
                return header.parent
    return None


def build(target: Path, sources: list[Path], *, shared: bool, sanitize: str | None) -> None:
    """Compiles the sources, two at a time, and links them to ``target``.

    Raises:
        RuntimeError: there is no compiler, or it failed; the text has its output.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++17 compiler: install g++ or set CXX")
    headers = cuda_headers()
    flags = [*FLAGS, *(["-O1", "-g1", f"-fsanitize={sanitize}"] if sanitize else [])]
    flags += ["-DPIE_WITH_CUDA=1", "-isystem", str(headers)] if headers else []
    if headers is None:
        sources = [source for source in sources if source not in CUDA_SOURCES]

    def run(*command: str) -> None:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        if result.stderr:
            print(result.stderr)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as workers:
        objects = [f"{scratch}/{i}.o" for i in range(len(sources))]
        jobs = [
            workers.submit(run, compiler, *flags, "-c", str(source), "-o", obj)
            for source, obj in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
        new = f"{scratch}/{target.name}"
        link = ["-shared"] if shared else []
        run(compiler, *flags, *link, *objects, "-ldl", "-o", new)
        # A new file, not new bytes in the old one: a process may have that mapped.
        staged = target.with_name(target.name + ".new")
        shutil.copy(new, staged)
        staged.replace(target)


def build_library(target: Path, sanitize: str | None = None) -> None:
    """Builds the shared library."""
    build(target, SOURCES, shared=True, sanitize=sanitize)


def build_test(target: Path, sanitize: str | None = None) -> None:
    """Builds the C++ test program."""
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "all.cpp"  # in one piece: a third of the time
        without = set() if cuda_headers() else set(CUDA_SOURCES)
        files = [file for file in [*SOURCES, *TEST_SOURCES] if file not in without]
        unit.write_text("".join(f'#include "{file}"\n' for file in files))
        build(target, [unit], shared=False, sanitize=sanitize)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sanitize", choices=["address", "thread"])
    parser.add_argument("--test", action="store_true")
    args = parser.parse_args()
    if args.test:
        build_test(args.out / "random_plans", args.sanitize)
    else:
        build_library(args.out / "libpie.so", args.sanitize)


if __name__ == "__main__":
    main()
