"""Everything that depends on a version of vLLM, and every patch of it.

``patching`` says how vLLM is patched. The others are named for the part of vLLM that they know:
``engine_core``, ``loggers``, ``weights``, ``cuda_graphs``, and ``runner_v1`` and ``runner_v2``, of
which ``model_runner`` picks one. ``loading`` waits for vLLM's own imports.
"""
