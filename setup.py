"""Builds ``pie_vllm/_native``, engine and gather kernel; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("pie_csrc_build", ROOT / "csrc" / "build.py")
assert _spec is not None
assert _spec.loader is not None
native: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


def relative(paths: list[Path]) -> list[str]:
    """Paths as setuptools wants them, for the source distribution as well."""
    return [str(path.relative_to(ROOT)) for path in paths]


class BuildEngine(build_ext):
    """Builds the engine as a plain shared library, not as a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """No interpreter tag: ctypes loads it."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:  # noqa: ARG002
        """There is no PyInit function."""
        return []

    def copy_extensions_to_source(self) -> None:
        """For an editable install; the folder holds nothing else."""
        target = ROOT / "pie_vllm" / "_native"
        target.mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        for name in native.GATHER_FILES:
            built = Path(self.build_lib) / "pie_vllm" / "_native" / name
            (target / name).unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, target)

    def build_extension(self, ext: Extension) -> None:
        """Compiles with csrc/build.py."""
        native.build_library(Path(self.get_ext_fullpath(ext.name)))


setup(
    ext_modules=[
        Extension(
            "pie_vllm._native.libpie",
            sources=relative(native.SOURCES),
            depends=relative([*native.HEADERS, native.GATHER, ROOT / "csrc" / "build.py"]),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
