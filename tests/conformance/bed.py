"""All that vLLM's tests need to run here, in one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conformance.hubs import make_hubs

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "pytest-asyncio==1.4.0",
    "tblib",
    "pytest-mock",
    "pytest-rerunfailures",
    "orjson",  # vLLM 0.33's server needs it.
    "pytest-forked",
    "py",
)
"""Plugins of pytest that vLLM's tests use, and what its newer releases need."""

FOR_GPUS = (
    "v1/engine/test_engine_core.py",
    "v1/engine/test_engine_core_client.py",
    "v1/engine/test_abort_final_step.py",
    "v1/engine/test_async_llm.py",
    "v1/e2e/general/test_streaming_input.py",
)
"""Files that skip themselves off a GPU, though they need none."""


def say(text: str) -> None:
    """Print progress."""
    print(f"conformance: {text}", file=sys.stderr, flush=True)


class Bed:
    """vLLM's tests, an environment on top of the checkout's, and two offline model hubs.

    Attributes:
        work: folder of it all.
        jobs: number of modes that run at a time.
    """

    def __init__(
        self, checkout: Path, work: Path, version: str, jobs: int = 1, overlay: Path | None = None
    ) -> None:
        """Make what is missing in ``work``.

        Args:
            checkout: a checkout with ``.venv`` and the real model.
            work: folder of the bed.
            version: release of vLLM whose tests run.
            jobs: number of modes that run at a time.
            overlay: folder with that release's Python, where it is not the installed one.
        """
        self.jobs = jobs
        self.version = version
        self._overlay = [] if overlay is None else [overlay.resolve()]
        self.checkout, self.work = checkout.resolve(), work.resolve()
        self._tests = self.work / "vllm"
        self._python = self.work / "venv/bin/python"
        for name in ("out", "log", "tmp"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        self._make_tests()
        self._make_environment()
        self._make_plugin()
        make_hubs(self.work / "hf", self.checkout / "build/models/smollm2-135m")

    def _make_tests(self) -> None:
        if (self._tests / "done").exists():
            return
        shutil.rmtree(self._tests, ignore_errors=True)
        self._tests.mkdir()
        shutil.copytree(self._source_distribution() / "tests", self._tests / "tests")
        self._adapt()
        # Or pytest takes the checkout's own settings for these tests.
        (self._tests / "pytest.ini").write_text("[pytest]\n")
        (self._tests / "done").touch()

    def _source_distribution(self) -> Path:
        """vLLM's unpacked source distribution; pip unpacks it, and nothing of it is built."""
        say(f"downloading the source distribution of vLLM {self.version}")
        folder = self.work / "tmp/sdist"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        env = {**os.environ, "TMPDIR": str(folder), "VLLM_TARGET_DEVICE": "empty"}
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-clean",
            "--no-deps",
            "-d",
            str(folder),
        ]
        # pip then asks the package for its metadata, which fails without torch; the unpacked
        # files stay.
        subprocess.run(
            [*pip, "--no-binary", "vllm", "--no-build-isolation", f"vllm=={self.version}"],
            env=env,
            capture_output=True,
            check=False,
        )
        for pattern in ("*/*/PKG-INFO", "*/PKG-INFO"):
            for found in folder.glob(pattern):
                return found.parent
        raise SystemExit(f"conformance: pip brought no source distribution of vLLM {self.version}")

    def _adapt(self) -> None:
        """Let a CPU run what needs no GPU, and keep tests off the network."""
        tests = self._tests / "tests"
        for name in FOR_GPUS:
            guard = r"(?m)^if not current_platform\.is_cuda(_alike)?\(\):$"
            _edit(tests / name, guard, "if False:")
        # A multimodal model in name only, which would need torchvision; and fewer steps, because
        # pie's books are checked from scratch after each.
        random = tests / "v1/core/test_priority_scheduler_random.py"
        _edit(random, '"Qwen/Qwen2.5-VL-3B-Instruct"', '"Qwen/Qwen3-0.6B"')
        _edit(random, r"range\(20000\)", "range(1000)")
        # An image that the test would download.
        image = '__import__("PIL.Image").Image.new("RGB", (8, 8))'
        _edit(tests / "v1/engine/test_async_llm.py", r'ImageAsset\("\w+"\)\.pil_image', image)
        server = '["--host", "127.0.0.1", "--port", str('
        _edit(tests / "utils.py", r'\["--port", str\(', server)

    def _make_environment(self) -> None:
        if (self.work / "venv/done").exists():
            return
        say("environment: the checkout's packages and a few plugins of pytest")
        theirs = self.checkout / ".venv/bin/python"
        make = [theirs, "-m", "venv", "--clear", "--without-pip", self.work / "venv"]
        subprocess.run(make, check=True)
        site = next((self.work / "venv/lib").glob("python3*/site-packages"))
        packages = next((self.checkout / ".venv/lib").glob("python3*/site-packages"))
        (site / "checkout.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
        pip = [theirs, "-m", "pip", "--python", self._python, "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
        (self.work / "venv/done").touch()

    def _make_plugin(self) -> None:
        """Metadata that make vLLM load ``plug/pie_e2e.py`` as a plugin."""
        info = self.work / "plugin/pie_conformance-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pie-conformance\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nzz_pie_conformance = pie_e2e:register\n"
        )
        (info / "RECORD").write_text("")

    def _environment(self, hub: str) -> dict[str, str]:
        own = [HERE / "plug", self.work / "plugin", self._tests, self.checkout]
        paths = [*self._overlay, *own]
        return {
            **os.environ,
            "HF_HOME": str(self.work / "hf" / hub),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CACHE_ROOT": str(self.work / "cache"),
            "TMPDIR": str(self.work / "tmp"),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PIE_E2E_BLOCK": "32",
            "PIE_E2E_FORK": "1",
            "PATH": f"{self.checkout / '.venv/bin'}:{os.environ['PATH']}",
        }

    def run(self, name: str, modes: list[str], seconds: float, tests: list[str]) -> None:
        """Run modes of a suite, each a fork of one process that imported vLLM."""
        if not modes:
            return
        command = [self._python, HERE / "forks.py", str(self.jobs), name, ",".join(modes)]
        began = time.monotonic()
        subprocess.run(
            [*command, str(seconds), self.work, *tests],
            env=self._environment("configs" if name == "core" else "alias"),
            cwd=self._tests,
            check=False,
        )
        say(f"{name}: {', '.join(modes)} in {time.monotonic() - began:.0f} s")

    def results(self, name: str, mode: str) -> dict[str, Any]:
        """What a run left: ``outcomes`` and ``notes`` by test."""
        path = self.work / "out" / f"{name}-{mode}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return {"outcomes": {}, "notes": {}, **found}


def _edit(path: Path, pattern: str, text: str) -> None:
    """Replace a pattern in one of vLLM's tests; it must be there."""
    changed, count = re.subn(pattern, lambda _: text, path.read_text())
    if not count:
        raise SystemExit(f"conformance: {path.name} of this vLLM has no {pattern!r}")
    path.write_text(changed)
