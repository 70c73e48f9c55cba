"""Bad input: one clear error at start that names the flag, the value and the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

import pie_vllm
from pie_vllm.engine.host_memory import check_pool_fits
from pie_vllm.engine.native import load_library
from pie_vllm.errors import ConfigError, NativeLibraryError, UnsupportedError
from pie_vllm.vllm import layer_refusals, refusals
from pie_vllm.vllm.args import device_of, worker_class

pytestmark = pytest.mark.vllm


def configure(model: Path, pie: Any = None, **arguments: Any) -> Any:
    """The finished configuration of an engine with pie."""
    config = {"block_manager": "pie", "pie": {"pool_gib": 0.1} if pie is None else pie}
    arguments = {"kv_cache_memory_bytes": 1 << 28, "max_model_len": 512, **arguments}
    return EngineArgs(
        model=str(model), enforce_eager=True, additional_config=config, **arguments
    ).create_engine_config()


@pytest.mark.parametrize(
    ("pie", "words"),
    [
        ({"pool_gib": 0}, ["--pie-pool-gib", "0", "above 0"]),
        ({"pool_gib": -1.5}, ["--pie-pool-gib", "-1.5"]),
        ({"pool_gib": "much"}, ["--pie-pool-gib", "much", "auto"]),
        ({"pool_gib": float("nan")}, ["--pie-pool-gib", "nan"]),
        ({"pool_gib": True}, ["--pie-pool-gib", "True"]),
        ({"pool_gib": 1e6}, ["--pie-pool-gib", "does not fit", "GiB of CPU memory are free"]),
        ({"ring_slots": 0}, ['"ring_slots"] is 0', "1 or more"]),
        ({"ring_slots": 2.5}, ['"ring_slots"] is 2.5']),
        ({"ring_fraction": 1.0}, ['"ring_fraction"] is 1.0', "between 0 and 1"]),
        ({"ring_fraction": "half"}, ['"ring_fraction"] is', "half"]),
        ({"target_slowdown": 0}, ["--pie-target-slowdown", "between 0 and 1", "off"]),
        ({"target_slowdown": 1.5}, ["--pie-target-slowdown", "1.5"]),
        ({"target_slowdown": "none"}, ["--pie-target-slowdown", "none"]),
        ({"link_gbps": -1}, ['"link_gbps"] is -1', "GB/s above 0", "auto"]),
        ({"link_gbps": "fast"}, ['"link_gbps"] is', "fast"]),
        ({"parking": "mru"}, ["--pie-parking", "'mru'", "must be 'lru' or 'off'"]),
        ({"parking": "arc"}, ["--pie-parking is 'arc'", "gone: ", "traces", "Use 'lru'"]),
        ({"parking": True}, ["--pie-parking", "True"]),
        ({"full_graphs": "yes"}, ["--pie-full-graphs", "'yes'", "true or false"]),
        ({"full_graphs": 1}, ["--pie-full-graphs is 1"]),
        ({"emulated_link_gbps": 0}, ["emulated_link_gbps", "above 0"]),
        ({"pool_gb": 1}, ["setting pool_gb; did you mean pool_gib?"]),
        ({"pool": 1}, ["unknown pie setting pool", "pool_gib", "ring_slots", "ring_fraction"]),
        ([1], ["must be a mapping", "pool_gib"]),
        ({"debug": "poison"}, ["debug", "list of words"]),
        ({"limit_contention": "yes"}, ["limit_contention", "'yes'", "true or false"]),
        ({"pool_idle_seconds": 0}, ["pool_idle_seconds", "seconds above 0"]),
        ({"pool_idle_seconds": "soon"}, ["pool_idle_seconds", "'soon'"]),
    ],
)
def test_bad_settings_are_refused_before_the_model_loads(
    model: Path, pie: Any, words: list[str]
) -> None:
    """Each bad value is one error that names the setting and what it must be."""
    with pytest.raises(ConfigError) as caught:
        configure(model, pie)
    for word in words:
        assert word in str(caught.value)


def test_engine_args_checks_at_once() -> None:
    """Python users get the same errors where they write the value."""
    with pytest.raises(ConfigError, match="--pie-pool-gib is 0"):
        pie_vllm.engine_args(pool_gib=0)
    with pytest.raises(ConfigError, match="unknown pie setting poolgib"):
        pie_vllm.engine_args(poolgib=1)


def test_a_pool_beyond_free_memory_states_the_amounts() -> None:
    """What vLLM itself will take counts too."""
    with pytest.raises(ConfigError) as caught:
        check_pool_fits(1 << 30, taken=1 << 60)
    assert "GiB of CPU memory are free" in str(caught.value)
    assert "vLLM itself will take" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_gpu_blocks_override": 64}, ["--num-gpu-blocks-override"]),
        ({"pipeline_parallel_size": 2}, ["--pipeline-parallel-size 2"]),
        ({"data_parallel_size": 2}, ["--data-parallel-size 2"]),
        ({"kv_cache_dtype": "int8_per_token_head"}, ["--kv-cache-dtype int8_per_tok", "fp8_e5m2"]),
        ({"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill"]),
        ({"scheduler_cls": "mine.Scheduler"}, ["--scheduler-cls mine.Scheduler"]),
        ({"worker_cls": "mine.Worker"}, ["--worker-cls mine.Worker"]),
    ],
)
def test_features_are_refused_by_name(
    model: Path, arguments: dict[str, Any], words: list[str]
) -> None:
    """A refusal names the feature, the reason and the way out, before the model loads."""
    with pytest.raises(UnsupportedError) as caught:
        configure(model, **arguments)
    for word in [*words, "--block-manager default"]:
        assert word in str(caught.value)


def test_drafters_are_refused_by_kind(model: Path) -> None:
    """A plain draft model is not, nor what proposes tokens by looking at tokens alone."""
    speculation = {"model": str(model), "method": "draft_model", "num_speculative_tokens": 2}
    wanted = r"parallel drafting \(--speculative-config\).*eagle.*remove --speculative-config"
    with pytest.raises(UnsupportedError, match=wanted):
        configure(model, speculative_config={**speculation, "parallel_drafting": True})
    configure(model, speculative_config=speculation)
    configure(model, speculative_config={"method": "ngram", "num_speculative_tokens": 2})


@pytest.mark.parametrize("method", ["medusa", "custom_class", "dflash", "extract_hidden_states"])
def test_other_methods_of_speculation_are_refused_by_name(method: str) -> None:
    feature = refusals._speculation(SimpleNamespace(method=method))
    assert feature.found
    assert f"by {method} (--speculative-config)" in feature.what
    assert "ngram" in feature.way_out
    assert not refusals._speculation(None).found


def test_copies_in_graphs_are_refused_where_there_are_no_graphs(model: Path) -> None:
    """On every device but CUDA's, before the model loads, with the way out."""
    with pytest.raises(UnsupportedError, match=r"--pie-full-graphs.*'cpu'.*--no-pie-full-graphs"):
        configure(model, {"pool_gib": 0.1, "full_graphs": True})
    configure(model, {"pool_gib": 0.1, "full_graphs": False})
    refusals.check_full_graphs(True, "cuda")
    refusals.check_full_graphs(False, "xpu")
    refusals.check_full_graphs(False, "cuda", speculates=True)
    with pytest.raises(UnsupportedError, match=r"--pie-full-graphs.*drafts.*--no-pie"):
        refusals.check_full_graphs(True, "cuda", speculates=True)


CHANGES: list[tuple[str, str, Any, str]] = [
    ("model_config", "runner_type", "pooling", "pooling models"),
    ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
    ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
    ("model_config", "is_diffusion", True, "--diffusion-config"),
    ("", "diffusion_config", object(), "--diffusion-config"),
    ("cache_config", "kv_offloading_size", 1.0, "--kv-offloading-size"),
    ("", "kv_transfer_config", object(), "--kv-transfer-config"),
    (
        "",
        "kv_events_config",
        SimpleNamespace(enable_kv_cache_events=True),
        "--kv-events-config",
    ),
    ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
    ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
    ("parallel_config", "use_ubatching", True, "--enable-dbo"),
    ("aux_output_config", "enabled", True, "--enable-return-routed-experts"),
    ("attention_config", "hisparse_config", object(), "HiSparse"),
    ("compilation_config", "use_inductor_graph_partition", True, "use_inductor_graph_partition"),
    (
        "compilation_config",
        "pass_config",
        SimpleNamespace(fuse_attn_quant=True, fuse_rope_kvcache_cat_mla=False),
        "fuse_attn_quant",
    ),
    ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL, "cudagraph_mode FULL:"),
    (
        "compilation_config",
        "cudagraph_mode",
        CUDAGraphMode.FULL_DECODE_ONLY,
        "cudagraph_mode FULL_DECODE_ONLY:.*FULL_AND_PIECEWISE",
    ),
]


def plain_config() -> SimpleNamespace:
    """The part of a VllmConfig that the refusals look at, with nothing to refuse."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            use_mla=False,
            runner_type="generate",
            is_encoder_decoder=False,
            is_diffusion=False,
            enable_sleep_mode=False,
        ),
        cache_config=SimpleNamespace(
            kv_offloading_size=None,
            cache_dtype="auto",
            num_gpu_blocks_override=None,
            kv_sharing_fast_prefill=False,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            distributed_executor_backend="uni",
            world_size=1,
            nnodes=1,
        ),
        aux_output_config=SimpleNamespace(enabled=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        compilation_config=SimpleNamespace(
            use_inductor_graph_partition=False,
            pass_config=SimpleNamespace(fuse_attn_quant=False, fuse_rope_kvcache_cat_mla=False),
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            splitting_ops=None,
            splitting_ops_contain_kv_cache_update=lambda: True,
        ),
        diffusion_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
    )


@pytest.mark.parametrize(("owner", "name", "value", "word"), CHANGES)
def test_features_that_this_platform_cannot_configure_are_refused(
    owner: str, name: str, value: Any, word: str
) -> None:
    """The same for what the CPU platform or the small model would refuse for other reasons."""
    config = plain_config()
    refusals.check_config(config, "cuda")
    setattr(getattr(config, owner) if owner else config, name, value)
    with pytest.raises(UnsupportedError, match=word):
        refusals.check_config(config, "cuda")


def test_each_device_has_its_kv_cache_dtypes() -> None:
    """KV of 8 bits with one scale a layer; other quantized KV nowhere."""
    config = plain_config()
    for device in refusals.CACHE_DTYPES:
        for dtype in ("fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16"):
            config.cache_config.cache_dtype = dtype
            refusals.check_config(config, device)
        for dtype in ("int8_per_token_head", "fp8_per_token_head", "nvfp4", "turboquant_k8v4"):
            config.cache_config.cache_dtype = dtype
            with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {dtype}.*Set it to auto"):
                refusals.check_config(config, device)


def test_graphs_that_replay_kv_writes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there are no graphs at all."""
    config = plain_config()
    compilation = CompilationConfig(splitting_ops=["vllm::unified_attention_with_output"])
    compilation.pass_config.fuse_attn_quant = False
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config = compilation
    with pytest.raises(UnsupportedError, match=r"splitting_ops .*unified_kv_cache_update"):
        refusals.check_config(config, "cuda")
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    refusals.check_config(config, "cuda")

    config = plain_config()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(UnsupportedError, match=r"breakable.*VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        refusals.check_config(config, "cuda")
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    refusals.check_config(config, "cuda")


def layer_of(backend: str) -> SimpleNamespace:
    """A layer with an attention backend that can be gated."""

    class Backend:
        forward_includes_kv_cache_update = False

        @staticmethod
        def get_name() -> str:
            return backend

        @staticmethod
        def is_mla() -> bool:
            return False

    impl = SimpleNamespace(do_kv_cache_update=None)
    return SimpleNamespace(attn_backend=Backend, impl=impl)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_attention_backends_are_refused_by_name(device: str) -> None:
    """Only those that pie was made for; the error names one of them."""
    for backend in layer_refusals.BACKENDS[device]:
        layer_refusals.check_layers(["a"], {"a": layer_of(backend)}, device)
    with pytest.raises(UnsupportedError, match=r"backend FLEX_ATTENTION.*--attention-backend"):
        layer_refusals.check_layers(["a"], {"a": layer_of("FLEX_ATTENTION")}, device)


def test_the_refusals_look_at_fields_that_vllm_has(model: Path) -> None:
    """The plain configuration above has no field that a real one lacks."""
    real = configure(model)
    plain = plain_config()
    for name, value in vars(plain).items():
        assert hasattr(real, name), name
        for inner in vars(value) if isinstance(value, SimpleNamespace) else ():
            assert hasattr(getattr(real, name), inner), f"{name}.{inner}"


def check_groups(*specs: Any) -> int:
    """``check_groups`` of groups of one layer each: a, b, ..."""
    named = zip("abc", specs, strict=False)
    return layer_refusals.check_groups([KVCacheGroupSpec([name], spec) for name, spec in named])


def test_layers_that_are_not_alike_are_refused() -> None:
    """One page size and one group of full attention, or a refusal that names the layer."""
    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    wide = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    window = SlidingWindowSpec(
        block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=64
    )
    wide_window = replace(window, num_kv_heads=2)
    assert check_groups(window, full) == 1
    uniform = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": wide})
    with pytest.raises(UnsupportedError, match="layer a with a KV cache of its own shape"):
        check_groups(uniform)
    with pytest.raises(UnsupportedError, match=r"without full attention: layer a .* SlidingWindow"):
        check_groups(window)
    with pytest.raises(UnsupportedError, match=r"2 groups of full attention \(b is"):
        check_groups(full, full)
    with pytest.raises(UnsupportedError, match=r"KV pages of .* bytes"):
        check_groups(full, wide_window)
    cross = CrossAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="layer b with CrossAttentionSpec"):
        check_groups(full, cross)
    with pytest.raises(UnsupportedError, match="without attention"):
        check_groups()


def test_other_devices_are_refused() -> None:
    """A platform without a driver is named, with the way out; ROCm is not CUDA."""
    for device in ("xpu", "rocm"):
        with pytest.raises(UnsupportedError, match=rf"'{device}'.*--block-manager default"):
            worker_class(device)
    assert device_of(SimpleNamespace(is_rocm=lambda: True, device_type="cuda")) == "rocm"
    assert device_of(SimpleNamespace(is_rocm=lambda: False, device_type="cuda")) == "cuda"
    assert device_of(SimpleNamespace(is_rocm=lambda: False, device_type="")) == "none"
    assert worker_class("cuda") == "pie_vllm.vllm.worker_side.gpu_worker.PieGPUWorker"


def test_a_missing_native_library_says_how_to_build_it(tmp_path: Path) -> None:
    """Without the engine nothing starts, and the error says what to do."""
    with pytest.raises(NativeLibraryError, match="build"):
        load_library(tmp_path / "libpie.so")
