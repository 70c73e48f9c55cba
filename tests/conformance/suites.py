"""Which of vLLM's tests are run, and in which modes."""

from __future__ import annotations

CORE = (
    "tests/v1/core",
    "tests/v1/streaming_input/test_scheduler_streaming.py",
    "--ignore=tests/v1/core/test_scheduler_e2e.py",
    "--ignore=tests/v1/core/test_reset_prefix_cache_e2e.py",
    "--ignore=tests/v1/core/prefix_cache/test_hybrid_prefix_cache_hit_rate.py",
)
"""Scheduler, block manager and block pool without a model."""

MODES = ("idle", "forced", "churn")
"""Modes of the core tests beside stock; see ``plug/sizes.py``."""

MORE_MODES = ("half", "tiny", "parked", "idlecap")

WHOLE_MODES = ("stock", "idle")
"""Modes in which all core tests run; the others run those only in which pie's classes are built."""

SECONDS = 900.0
"""Limit of a mode of the core tests."""

ENGINE_SECONDS = 600.0
"""Limit of a mode of a suite that starts engines."""

ENGINE_SUITES = {
    "engine": (
        "tests/v1/sample/test_sampling_params_e2e.py",
        "tests/v1/core/test_scheduler_e2e.py",
        "tests/v1/core/test_reset_prefix_cache_e2e.py",
        "tests/entrypoints/llm/test_generate.py",
        "tests/v1/e2e/general/test_min_tokens.py",
        "tests/v1/e2e/general/test_context_length.py",
        "tests/samplers/test_ignore_eos.py",
        "tests/samplers/test_no_bad_words.py",
        "tests/v1/engine/test_llm_engine.py",
        "tests/v1/sample/test_logprobs.py",
        "tests/v1/engine/test_engine_core.py",
        "tests/basic_correctness/models/test_basic_correctness.py::test_vllm_gc_ed",
    ),
    "async": (
        "tests/v1/e2e/general/test_streaming_input.py",
        "tests/v1/engine/test_abort_final_step.py",
        "tests/v1/engine/test_async_llm.py",
        "-k",
        "not engine_args1 and not test_dp",
    ),
    "server": (
        "tests/entrypoints/openai/completion/test_completion.py",
        "tests/entrypoints/openai/chat_completion/test_chat.py",
        "tests/entrypoints/openai/test_return_token_ids.py",
        "tests/entrypoints/openai/test_chunked_prompt.py",
    ),
}
"""Tests that start engines of a small model; run with stock and with pie in mode ``pool``."""
