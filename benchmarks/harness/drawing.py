"""Plots that go to a file, readable where a page shows them 800 pixels wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH_INCHES = 8
DOTS_PER_INCH = 100
"""800 pixels at the full width, so that a font of 11 points stays readable."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "lines.linewidth": 1.8,
}

COLORS = {
    "pie": "tab:orange",
    "stock": "tab:gray",
    "stock_equal": "tab:gray",
    "stock_all": "tab:blue",
    "device": "tab:blue",
    "pooled": "tab:orange",
    "parked": "moccasin",
}
"""Colours of sides and tiers, the same in all pictures."""


@contextmanager
def drawing(
    path: Path,
    title: str,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    mosaic: Sequence[Sequence[str]] | None = None,
    **more: Any,
) -> Iterator[Any]:
    """The axes of a drawing, written to `path` at the end.

    They come as `pyplot.subplots` returns them, or by name where a mosaic is given.

    Args:
        path: file to write.
        title: text above all axes.
        size: width and height in inches.
        rows: number of rows of axes.
        columns: number of columns of axes.
        mosaic: names of axes, as `pyplot.subplot_mosaic` takes them; rows and columns then count
            for nothing.
        more: further arguments of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")  # No window: benchmarks run on servers.
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        if mosaic is None:
            figure, axes = pyplot.subplots(
                rows, columns, figsize=size, layout="constrained", **more
            )
        else:
            figure, axes = pyplot.subplot_mosaic(
                [list(row) for row in mosaic], figsize=size, layout="constrained", **more
            )
        figure.suptitle(title)
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
        pyplot.close(figure)
