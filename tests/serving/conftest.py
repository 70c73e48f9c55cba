"""One thread for the engines of all these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.settings import one_thread


@pytest.fixture(scope="session", autouse=True)
def engines_have_one_thread() -> Iterator[None]:
    """The cores are shared with the API servers and the clients."""
    patch = one_thread()
    yield
    patch.undo()
