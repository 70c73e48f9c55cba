"""All that depends on a version of vLLM, and every patch of it."""
