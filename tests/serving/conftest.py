"""What the servers of these tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.serving.process import Server
from tests.serving.settings import LOADED, make_server, one_thread


class Pair(NamedTuple):
    """Two servers with pie."""

    loaded: Server
    killed: Server


@pytest.fixture(scope="session", autouse=True)
def engines_have_one_thread() -> Iterator[None]:
    """The cores are shared with the API servers and the clients."""
    patch = one_thread()
    yield
    patch.undo()


@pytest.fixture(scope="session")
def pair(model: Path) -> Iterator[Pair]:
    """Both, started side by side: starting is most of what their tests cost."""
    with make_server(model, "load", *LOADED) as loaded, make_server(model, "crash") as killed:
        servers = Pair(loaded, killed)
        for server in servers:
            server.launch()
        for server in servers:
            server.await_healthy()
        yield servers
