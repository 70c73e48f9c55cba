"""Policy without vLLM: a scheduler, a machine and traces of the simulator's own."""
