"""Plots that go to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawing(
    path: Path, title: str, size: tuple[float, float], rows: int, columns: int, **more: Any
) -> Iterator[Any]:
    """The axes of a drawing (as `pyplot.subplots` returns them), written to `path` at the end.

    Args:
        path: of the file.
        title: above all axes.
        size: in inches.
        rows: of axes.
        columns: of axes.
        more: further arguments of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")  # No window: benchmarks run on servers.
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **more)
    figure.suptitle(title)
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
