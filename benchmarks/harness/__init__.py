"""Parts that the benchmarks and the demo share."""
