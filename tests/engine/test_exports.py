"""libpie.so exports what its header declares, and each of that is called by the package."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from benchmarks.harness.builds import CSRC, ROOT
from pie_vllm.engine import native
from tests.helpers.builds import interface_library

PACKAGE = ROOT / "pie_vllm"
DIAGNOSTICS = "/* Diagnostics: what the GPU check (benchmarks/gpu) needs"
"""Begins the functions of the header that serving does not call."""


def exported(library: Path) -> set[str]:
    """Names of our functions that the library exports."""
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines() if " T pie_" in line}


def declared(header: str) -> set[str]:
    """Names of the functions that the text of a header declares."""
    return set(re.findall(r"^PIE_API [\w* ]+?\b(pie_\w+)\(", header, re.MULTILINE))


def called(*files: Path) -> set[str]:
    """Names of the functions that Python files call, by the handle or by the library."""
    text = "\n".join(file.read_text() for file in files)
    pairs = re.findall(r"\bcall\(\s*\"(pie_\w+)\"|\blibrary\.(pie_\w+)", text)
    return {name for pair in pairs for name in pair if name}


def test_the_library_exports_what_the_header_declares() -> None:
    functions = declared((CSRC / "pie.h").read_text())
    assert exported(native.DEFAULT_LIBRARY) == functions
    assert set(native._SIGNATURES) == functions - {"pie_abi_version", "pie_last_error"}


def test_every_exported_function_is_called_by_the_package() -> None:
    """What only tests call is in their own library."""
    functions = exported(native.DEFAULT_LIBRARY)
    assert functions - called(*PACKAGE.rglob("*.py")) == set()
    assert exported(interface_library()) & functions == set()


def test_diagnostics_are_what_the_streams_module_calls_for_the_gpu_check() -> None:
    """And serving calls none of them."""
    header = (CSRC / "pie.h").read_text()
    diagnostics = declared(header[header.index(DIAGNOSTICS) :])
    streams = PACKAGE / "engine" / "streams.py"
    assert diagnostics == called(streams) - {"pie_counters_of"}
    assert not diagnostics & called(*(f for f in PACKAGE.rglob("*.py") if f != streams))
    users = [f for f in PACKAGE.rglob("*.py") if "engine.streams import" in f.read_text()]
    assert [f.name for f in users] == ["link_calibration.py"]
    assert "import counters\n" in users[0].read_text()
