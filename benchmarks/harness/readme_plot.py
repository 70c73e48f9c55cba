"""The README's picture: throughput of stock vLLM, of pie, and of stock with memory for all.

    python -m benchmarks.harness.readme_plot

It is drawn from a result file of `benchmarks.throughput`, whose date and commit it carries.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/throughput.json")
PICTURE = Path("docs/throughput.png")
BARS = (
    ("stock_equal", "stock vLLM", "#9aa5b1"),
    ("pie_starved", "pie,\nsame device memory", "#2f7d5b"),
    ("stock_all", "stock vLLM,\nmemory for all", "#d5dbe1"),
)
"""Configuration of the benchmark, its label, its colour."""


def provenance(result: dict[str, Any]) -> dict[str, str]:
    """What the picture carries as PNG text: day and commit of the run it shows."""
    machine = result["machine"]
    return {"Result date": machine["date"], "Result commit": machine["commit"]}


def draw(result: dict[str, Any], picture: Path) -> None:
    """Draw the medians of tokens per second, with the range of the runs.

    Args:
        result: of `benchmarks.throughput`, with all of BARS in it.
        picture: path of the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")  # No window: benchmarks run on servers.
    from matplotlib import pyplot

    rates = [result["medians"][name]["tok_s"] for name, _, _ in BARS]
    medians = [rate["median"] for rate in rates]
    below = [rate["median"] - rate["low"] for rate in rates]
    above = [rate["high"] - rate["median"] for rate in rates]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.0), layout="constrained")
    places = range(len(BARS))
    labels, colours = [label for _, label, _ in BARS], [colour for _, _, colour in BARS]
    axes.barh(places, medians, xerr=(below, above), color=colours, ecolor="#4a5560", capsize=3)
    for place, median, more in zip(places, medians, above, strict=True):
        axes.text(median + more + 2, place, f"{median:.0f}", va="center", fontweight="bold")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(medians))
    axes.set_xlabel("tokens per second (median, range of the runs)")
    axes.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    figure.suptitle(
        f"{result['question']}; {machine['cores']} CPU cores, no GPU; {machine['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(picture, dpi=110, metadata={"Software": None, **provenance(result)})
    pyplot.close(figure)


def main() -> None:
    """Draw it anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


if __name__ == "__main__":
    main()
