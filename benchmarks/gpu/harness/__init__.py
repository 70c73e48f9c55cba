"""What the stages of `benchmarks.gpu_check` share. Needs torch, vLLM and this repository alone."""
