"""An engine per test, closed after it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.driving import PAGE, View, geometry
from tests.engine.graphing import GraphModel
from tests.engine.standin_fixtures import Graphs
from tests.helpers.cuda_calls import Cuda
from tests.helpers.gather_kernel import GatherKernel, gather_kernel
from tests.helpers.standin import include_folder, load
from tests.helpers.streams import DriverStream


@pytest.fixture(params=["host", "cuda"])
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each driver in turn; CUDA's over the stand-in for libcuda, which must find no fault."""
    name: str = request.param
    if name == "host":
        yield name
        return
    if include_folder() is None:
        pytest.skip("no cuda.h: neither the package nvidia-cuda-runtime nor a toolkit")
    standin = load()
    standin.set(granularity=PAGE)
    yield name
    races, live = standin.violations(), standin.live()
    standin.clear()
    standin.reset()
    assert live == []
    if request.node.get_closest_marker("races"):
        assert all("unordered" in line for line in races)
    else:
        assert races == []


@pytest.fixture
def make_engine(driver: str) -> Iterator[Callable[..., TransferEngine]]:
    """Makes engines of the small geometry; sizes and engine options by name."""
    engines: list[TransferEngine] = []

    def make(
        debug: tuple[str, ...] = (),
        link_bytes_per_s: float | None = None,
        chunks: int | None = None,
        **sizes: Any,
    ) -> TransferEngine:
        engine = TransferEngine(
            geometry(**sizes),
            driver=driver,
            debug=debug,
            link_bytes_per_s=link_bytes_per_s,
            chunks=chunks,
        )
        if driver == "cuda":
            load().link(link_bytes_per_s or 0)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., TransferEngine]) -> TransferEngine:
    """An engine of the small geometry."""
    return make_engine()


@pytest.fixture
def stream(engine: TransferEngine) -> DriverStream:
    """A stream of that engine's driver."""
    return DriverStream(engine)


@pytest.fixture
def view(engine: TransferEngine) -> View:
    """What its pages and rows hold."""
    return View(engine)


@pytest.fixture
def capture(make_engine: object) -> Iterator[Callable[..., GraphModel]]:
    """Makes captured models, as ``GraphModel`` does, and ends them before their engine."""
    del make_engine
    made: list[GraphModel] = []

    def make(engine: TransferEngine, stream: DriverStream, **options: Any) -> GraphModel:
        made.append(GraphModel(engine, stream, **options))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.fixture
def model(
    capture: Callable[..., GraphModel], engine: TransferEngine, stream: DriverStream
) -> GraphModel:
    """One that writes nothing; the engine is prepared for graphs."""
    return capture(engine, stream)


@pytest.fixture
def run_native() -> Callable[..., str]:
    """Runs a sanitizer build without address randomisation, which old libtsan needs."""

    def run(*command: object, libraries: Path | None = None) -> str:
        # vLLM sets LD_PRELOAD.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        if libraries is not None:
            environment["LD_LIBRARY_PATH"] = str(libraries)
            environment["PIE_STANDIN"] = f"granularity={PAGE}"
        result = subprocess.run(
            ["setarch", "-R", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """The stand-in for libcuda with device 0 current; nothing of it may be live afterwards."""
    loaded = load()
    cuda = Cuda(loaded)
    cuda.start()
    yield cuda
    loaded.clear()
    cuda.close()
    live = loaded.live()
    loaded.reset()
    assert not live


@pytest.fixture
def graphs(cuda: Cuda) -> Iterator[Graphs]:
    """Captures on the stand-in, and what they made, ended after the test."""
    graphs = Graphs(cuda)
    yield graphs
    graphs.close()


@pytest.fixture
def kernel() -> Iterator[GatherKernel]:
    """The gather kernel on the stand-in; no table may be written over or hold a host's address."""
    if include_folder() is None:
        pytest.skip("no cuda.h: neither the package nvidia-cuda-runtime nor a toolkit")
    found = gather_kernel()
    found.reset()
    yield found
    wrong = found.changed, found.astray
    found.reset()
    assert wrong == (0, 0)
