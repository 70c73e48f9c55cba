"""Builds the engine with a C++17 compiler alone.

``python csrc/build.py --out DIR`` writes ``DIR/libpie.so``, with ``--sanitize address|thread``
under that sanitizer. The compiler is ``$CXX`` or g++.

The CUDA driver is part of it where cuda.h of CUDA 12.8 or newer is found, in ``$CUDA_HOME``, in
the package nvidia-cuda-runtime or under /usr/local/cuda. No library of CUDA is linked. Where there
is an nvcc (``$NVCC``, or the one in the path; ``NVCC=`` for none) the gather kernel is compiled
too, to ``DIR/gather.fatbin``. ``--cuda DIR`` does only what is for CUDA, with a report.
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
SOURCES = sorted(CSRC.rglob("*.cpp"))
CUDA_SOURCES = sorted(CSRC.glob("drivers/cuda/*.cpp"))
HEADERS = sorted(CSRC.rglob("*.h"))
GATHER = CSRC / "kernels" / "gather.cu"
GATHER_FILES = ("gather.cu", "gather.fatbin")  # beside the library
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100 and H200, B200
PTX = "compute_90"  # for what none of them covers: the CUDA driver compiles it
# No host code is made, so the C++ compiler's version, which nvcc checks, is all the same.
CUDA_FLAGS = ["-std=c++17", "-allow-unsupported-compiler", "-Xptxas", "-v"]
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-iquote", str(CSRC)]

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


def run(*command: str) -> str:
    """The command's output, both streams.

    Raises:
        RuntimeError: it failed; the text has its output.
    """
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


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

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as workers:
        objects = [f"{scratch}/{i}.o" for i in range(len(sources))]
        jobs = [
            workers.submit(run, compiler, *flags, "-c", str(source), "-o", obj)
            for source, obj in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            print(job.result(), end="")
        new = f"{scratch}/{target.name}"
        link = ["-shared"] if shared else []
        print(run(compiler, *flags, *link, *objects, "-ldl", "-o", new), end="")
        # A new file, not new bytes in the old one: a process may have that mapped.
        staged = target.with_name(target.name + ".new")
        shutil.copy(new, staged)
        staged.replace(target)


def build_library(target: Path, sanitize: str | None = None) -> None:
    """Builds the shared library and, but for a sanitizer, puts the gather kernel beside it."""
    build(target, SOURCES, shared=True, sanitize=sanitize)
    if sanitize is None:
        shutil.copy(GATHER, target.with_name(GATHER.name))
        build_fatbin(target.with_name("gather.fatbin"))


def cuda_targets() -> tuple[str, list[str]] | None:
    """The CUDA compiler, and those of our architectures that it knows; None without either."""
    nvcc = os.environ.get("NVCC", shutil.which("nvcc"))
    if not nvcc:
        return None
    known = run(nvcc, "--list-gpu-code").split()
    targets = [arch for arch in ARCHITECTURES if arch in known]
    return (nvcc, targets) if targets else None


def build_fatbin(target: Path) -> bool:
    """Compiles the gather kernel for all architectures; without a CUDA compiler there is no file.

    Raises:
        RuntimeError: the compiler failed; the text has its output.
    """
    target.unlink(missing_ok=True)  # Of an older text, perhaps.
    found = cuda_targets()
    if found is None:
        return False
    nvcc, targets = found
    code = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in targets]
    if PTX.replace("compute", "sm") in targets:
        code.append(f"-gencode=arch={PTX},code={PTX}")
    run(nvcc, *CUDA_FLAGS, "--threads=2", "-fatbin", *code, "-o", str(target), str(GATHER))
    return True


def check_cuda(folder: Path) -> None:
    """Compiles all that is for CUDA, the kernel by itself for each architecture, and reports.

    Raises:
        RuntimeError: a compiler failed, or the kernel keeps registers in memory.
    """
    found = cuda_targets()
    if found is None:
        print(f"skipped: there is no nvcc that knows one of {', '.join(ARCHITECTURES)}")
        return
    nvcc, targets = found
    folder.mkdir(parents=True, exist_ok=True)
    for arch in targets:
        target = folder / f"gather.{arch}.cubin"
        log = run(nvcc, *CUDA_FLAGS, "-cubin", f"-arch={arch}", "-o", str(target), str(GATHER))
        used = re.search(r"Used (\d+) registers", log)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        if used is None or spills is None:
            raise RuntimeError(f"nvcc does not say what {target.name} uses:\n{log}")
        print(f"{target}: {target.stat().st_size} bytes, {used[1]} registers, {spills[0]}")
        if spills.groups() != ("0", "0"):
            raise RuntimeError(f"{target.name} keeps registers in memory:\n{log}")
    fatbin = folder / "gather.fatbin"
    build_fatbin(fatbin)
    print(f"{fatbin}: {fatbin.stat().st_size} bytes")
    if cuda_headers():
        library = folder / "libpie.so"
        build(library, SOURCES, shared=True, sanitize=None)
        print(f"{library}: {library.stat().st_size} bytes")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR")
    where.add_argument("--cuda", type=Path, metavar="DIR")
    parser.add_argument("--sanitize", choices=["address", "thread"])
    args = parser.parse_args()
    if args.cuda:
        check_cuda(args.cuda)
    else:
        build_library(args.out / "libpie.so", args.sanitize)


if __name__ == "__main__":
    main()
