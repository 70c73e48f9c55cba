"""The stages of `benchmarks.gpu_check`, a module each; what they share is in `harness`."""
