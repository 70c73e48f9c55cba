"""Do blocks that a step loads still lie together after hours?

In simulation: chats of three turns come, return and go, somewhat more of them than both tiers
hold. Every so many steps the mean run of loaded blocks is printed: blocks and rows that follow each
other are one copy in each layer, and a link of hundreds of GB/s wants copies of megabytes.

    python -m benchmarks.run_lengths [--machine gh200_70b] [--steps 100000] [--no-parking]
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.simulated.run_churn import GPUS, Window, churn

WINDOWS = 10
"""Number of rows of the table."""


def show(windows: list[Window]) -> None:
    """Print a table."""
    rows = [
        [
            f"{w.step:,}",
            f"{w.seconds / 60:,.0f}",
            f"{w.pooled:,}",
            f"{w.parked:,}",
            *(f"{copies.mean:.1f}" for copies in (w.loads, w.promotions, w.stores)),
        ]
        for w in windows
    ]
    heads = ["step", "minutes", "pooled", "parked", "mean run: loads", "promotions", "stores"]
    table("Blocks copied in one piece", heads, rows)


def main() -> None:
    """The command line."""
    parser = plain_parser("run_lengths", __doc__)
    parser.add_argument("--machine", choices=GPUS, default="gh200_70b")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--no-parking", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "run_lengths")
    args = parser.parse_args()
    every = max(1, args.steps // WINDOWS)
    simulation = churn(GPUS[args.machine], args.steps, every, parking=not args.no_parking)
    sizes = simulation.residency.geometry
    console.print(
        f"{args.machine}: {sizes.resident_blocks:,} resident and {sizes.pooled_blocks:,} pooled "
        f"blocks, {sizes.rows:,} rows in chunks of {sizes.chunk_rows}"
    )
    with working(f"{args.steps:,} steps"):
        windows = simulation.play()
    show(windows)
    found = [
        {"step": w.step, "seconds": w.seconds, "loads": w.loads.mean, "stores": w.stores.mean}
        for w in windows
    ]
    run = {"machine": facts(), "simulated": args.machine, "parking": not args.no_parking}
    write_result(args.output, {**run, "windows": found})


if __name__ == "__main__":
    main()
