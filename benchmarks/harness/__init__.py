"""What the benchmarks of `real`, of `simulated` and the demo share."""
