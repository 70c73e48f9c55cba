"""Refusals: what pie does not run with yet, each by name, with the reason and the way out."""

from __future__ import annotations

from typing import Any, NamedTuple

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat import cuda_graphs

_ONE_SCALE = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
CACHE_DTYPES = {"cpu": _ONE_SCALE, "cuda": _ONE_SCALE}
"""KV cache types by device. Their scales are one per layer and lie outside the pages."""

WITHOUT_DRAFT_LAYERS = ("ngram", "ngram_gpu", "suffix")
"""Methods of speculation that propose tokens by looking at tokens alone."""

WITH_DRAFT_LAYERS = ("eagle", "eagle3", "mtp", "draft_model")
"""Those whose drafter has attention layers with KV; ``draft_refusals`` says which of them run."""

GRAPH_DEVICES = ("cuda",)
"""Devices whose FULL graphs can hold copies."""


class _Feature(NamedTuple):
    """A feature of vLLM that pie refuses.

    Attributes:
        found: whether the configuration asks for it.
        what: its name, with the flag.
        why: reason, as a clause.
        way_out: what to do in place of it, as a command.
    """

    found: bool
    what: str
    why: str
    way_out: str


def refuse(what: str, why: str, way_out: str) -> UnsupportedError:
    """The error for what pie does not run with; ``way_out`` is a command."""
    return UnsupportedError(
        f"--block-manager pie does not support {what}: {why}. {way_out}, or use "
        "--block-manager default."
    )


def check_engine_args(args: Any, scheduler: str, worker: str) -> None:
    """Refuse engine arguments with a scheduler or worker class of the user's own.

    Args:
        args: vLLM's EngineArgs.
        scheduler: name of pie's own scheduler class.
        worker: name of pie's own worker class.

    Raises:
        UnsupportedError: names the class.
    """
    if args.scheduler_cls not in (None, scheduler):
        raise refuse(
            f"--scheduler-cls {args.scheduler_cls}",
            "it brings its own scheduler",
            "Remove --scheduler-cls",
        )
    if args.worker_cls not in ("auto", worker):
        raise refuse(
            f"--worker-cls {args.worker_cls}", "it brings its own worker", "Remove --worker-cls"
        )


def check_classes(config: Any, scheduler: str, worker: str) -> None:
    """Refuse a finished configuration with other classes than pie's: tokens would be wrong.

    Args:
        config: vLLM's VllmConfig.
        scheduler: name of pie's own scheduler class.
        worker: name of pie's own worker class.

    Raises:
        UnsupportedError: names the class found.
    """
    for what, found, own in (
        ("scheduler class", config.scheduler_config.scheduler_cls, scheduler),
        ("worker class", config.parallel_config.worker_cls, worker),
    ):
        if found != own:
            raise refuse(
                f"the {what} {_name(found)}",
                f"another plugin, or vLLM itself, put it in place of {own}",
                "Remove what sets it (VLLM_PLUGINS names the plugins that are loaded)",
            )


def _name(found: Any) -> str:
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else repr(found)


def check_step(scheduler_output: Any) -> None:
    """Refuse a step that pie's scheduler did not make. Steps of vLLM's warm-up are not checked.

    Raises:
        UnsupportedError: the step has no plan, not even an empty one.
    """
    if not hasattr(scheduler_output, "pie"):
        raise UnsupportedError(
            "a step reached the worker of --block-manager pie without a plan: it comes from "
            "another scheduler, or something copied it without its attributes, and its tokens "
            "would be wrong. Remove what schedules in place of pie (VLLM_PLUGINS names the "
            "plugins that are loaded), or use --block-manager default."
        )


def check_config(config: Any, device: str) -> None:
    """Refuse what a finished configuration asks for, before the model loads.

    Args:
        config: vLLM's VllmConfig.
        device: a key of ``args.WORKERS``.

    Raises:
        UnsupportedError: names the first feature found.
    """
    for feature in (
        *_model_features(config),
        *_kv_features(config, device),
        *_parallel_features(config.parallel_config),
    ):
        if feature.found:
            raise refuse(feature.what, feature.why, feature.way_out)
    check_hosts(config.parallel_config)
    check_graphs(config.compilation_config)


def _model_features(config: Any) -> tuple[_Feature, ...]:
    """Kinds of models, and of decoding."""
    model = config.model_config
    passes = config.compilation_config.pass_config
    return (
        _Feature(
            bool(model.use_mla and passes.fuse_rope_kvcache_cat_mla),
            "fuse_rope_kvcache_cat_mla (pass_config) with an MLA model",
            "it writes KV past the gate of the layer",
            "Remove it and splitting_ops from --compilation-config",
        ),
        _Feature(
            model.runner_type == "pooling",
            "pooling models",
            "they were not tested",
            "Choose a generative model",
        ),
        _Feature(
            model.is_encoder_decoder,
            "encoder-decoder models",
            "cross attention keeps KV in a second group",
            "Choose a decoder-only model",
        ),
        _Feature(
            config.diffusion_config is not None or bool(model.is_diffusion),
            "diffusion models (--diffusion-config)",
            "they need a scheduler of their own, whose steps compute blocks of tokens anew",
            "Choose another model",
        ),
        _speculation(config.speculative_config),
    )


def _speculation(speculative: Any) -> _Feature:
    """Speculation by other means than those that were tested, or by a class of the user's."""
    method = None if speculative is None else speculative.method
    return _Feature(
        method is not None and method not in (*WITHOUT_DRAFT_LAYERS, *WITH_DRAFT_LAYERS),
        f"speculative decoding by {method} (--speculative-config)",
        "what it keeps of a block was not tested",
        f"Set its method to one of {', '.join((*WITHOUT_DRAFT_LAYERS, *WITH_DRAFT_LAYERS))}, or "
        "remove --speculative-config",
    )


def _kv_features(config: Any, device: str) -> tuple[_Feature, ...]:
    """Other owners, readers and layouts of KV memory."""
    cache, events = config.cache_config, config.kv_events_config
    return (
        _Feature(
            config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)",
            "they read KV pages by address, and pooled pages are not there",
            "Remove them",
        ),
        _Feature(
            bool(events and events.enable_kv_cache_events),
            "KV events (--kv-events-config)",
            "a block's tier is not part of them",
            "Remove --kv-events-config",
        ),
        _Feature(
            bool(config.model_config.enable_sleep_mode),
            "sleep mode (--enable-sleep-mode)",
            "its allocator does not own the arena",
            "Remove --enable-sleep-mode",
        ),
        _Feature(
            cache.cache_dtype not in CACHE_DTYPES[device],
            f"--kv-cache-dtype {cache.cache_dtype} on this device",
            f"it was tested with {', '.join(CACHE_DTYPES[device])}",
            "Set it to auto",
        ),
        _Feature(
            cache.num_gpu_blocks_override is not None,
            "--num-gpu-blocks-override",
            "it bypasses the sizes of the tiers",
            "Set --kv-cache-memory-bytes instead",
        ),
        _Feature(
            bool(cache.kv_sharing_fast_prefill),
            "--kv-sharing-fast-prefill",
            "layers that share KV would read another layer's ring slot",
            "Remove it",
        ),
        _Feature(
            bool(config.aux_output_config.enabled),
            "--enable-return-routed-experts (--aux-output-config)",
            "vLLM keeps experts of full blocks, as many as it evicts in its own order, and a "
            "request may resume within a block or on KV that is kept longer",
            "Remove it",
        ),
        _Feature(
            config.attention_config.hisparse_config is not None,
            "HiSparse",
            "it keeps KV in a pool of its own",
            "Remove it from --attention-config",
        ),
    )


def _parallel_features(parallel: Any) -> tuple[_Feature, ...]:
    """Ways to spread a model over ranks, and a step over batches."""
    why = "block plans were not tested over several ranks"
    pipeline, data = parallel.pipeline_parallel_size, parallel.data_parallel_size
    decode = parallel.decode_context_parallel_size
    return (
        _Feature(pipeline > 1, f"--pipeline-parallel-size {pipeline}", why, "Set it to 1"),
        _Feature(data > 1, f"--data-parallel-size {data}", why, "Set it to 1"),
        _Feature(
            decode > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism (--decode-context-parallel-size, --prefill-context-parallel-size)",
            "a block then spans ranks",
            "Set it to 1",
        ),
        _Feature(
            bool(parallel.use_ubatching),
            "dual batch overlap (--enable-dbo)",
            "two interleaved batches break the order of the ring",
            "Remove --enable-dbo",
        ),
    )


def check_hosts(parallel: Any) -> None:
    """Refuse ranks that schedule for themselves, and ranks on other hosts.

    Args:
        parallel: vLLM's ParallelConfig, finished.

    Raises:
        UnsupportedError: names the setting.
    """
    backend = parallel.distributed_executor_backend
    if backend == "external_launcher" and parallel.world_size > 1:
        raise refuse(
            f"--distributed-executor-backend external_launcher with {parallel.world_size} ranks",
            "each rank schedules by itself and all must decide alike, but pie decides by measured "
            "times and by the free CPU memory of each rank's host",
            "Set --distributed-executor-backend mp",
        )
    if parallel.nnodes > 1:
        raise refuse(
            f"--nnodes {parallel.nnodes}",
            "free CPU memory is looked at on one host only, and the pools of all ranks are "
            "counted there",
            "Set --nnodes 1",
        )
    if backend == "ray":
        raise refuse(
            "--distributed-executor-backend ray",
            "its ranks may run on several hosts, and free CPU memory is looked at on one only",
            "Set --distributed-executor-backend mp",
        )


def check_graphs(compilation: Any) -> None:
    """Refuse CUDA graphs that would replay a layer's KV write or attention without its gate.

    Args:
        compilation: vLLM's CompilationConfig, finished.

    Raises:
        UnsupportedError: names the setting.
    """
    if compilation.use_inductor_graph_partition:
        raise refuse(
            "use_inductor_graph_partition",
            "gates would be compiled away",
            "Remove it from --compilation-config",
        )
    if compilation.pass_config.fuse_attn_quant:
        raise refuse(
            "fuse_attn_quant (pass_config)",
            "it compiles attention into the pieces that graphs replay",
            "Remove it from --compilation-config",
        )
    if not compilation.cudagraph_mode:
        return
    check_graph_mode(compilation.cudagraph_mode)
    if cuda_graphs.breakable_graphs():
        raise refuse(
            "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1, which vLLM sets for some "
            "models)",
            "they replay a layer's KV write without its gate",
            "Set VLLM_USE_BREAKABLE_CUDAGRAPH=0",
        )
    if not compilation.splitting_ops_contain_kv_cache_update():
        raise refuse(
            f"splitting_ops {compilation.splitting_ops}",
            "graphs would replay a layer's KV write without its gate",
            "Remove splitting_ops from --compilation-config, so that vLLM adds its "
            "unified_kv_cache_update",
        )


def check_graph_mode(mode: Any) -> None:
    """Refuse a mode of CUDA graphs that leaves no graph for steps that copy KV.

    Raises:
        UnsupportedError: names the mode.
    """
    if mode.has_full_cudagraphs() and not mode.has_piecewise_cudagraphs():
        raise refuse(
            f"cudagraph_mode {mode}",
            "steps that copy KV cannot run in a FULL graph, and it has no piecewise ones",
            "Set cudagraph_mode to FULL_AND_PIECEWISE, PIECEWISE or NONE (--compilation-config, "
            "--enforce-eager) with an attention backend that allows it",
        )


def check_full_graphs(wanted: bool, device: str, *, speculates: bool = False) -> None:
    """Refuse ``full_graphs`` on a device that has no FULL graphs, and with speculation.

    Raises:
        UnsupportedError: names the flag and the device, or the speculation.
    """
    if wanted and device not in GRAPH_DEVICES:
        raise no_full_graphs(f"device {device!r} has no CUDA graphs")
    if wanted and speculates:
        raise no_full_graphs(
            "graphs of steps that verify drafts (--speculative-config) were not tested with copies"
        )


def no_full_graphs(why: str) -> UnsupportedError:
    """The error of ``--pie-full-graphs`` where it cannot work."""
    return UnsupportedError(
        f'--pie-full-graphs (additional_config["pie"]["full_graphs"]) is on, but {why}. Leave '
        "it out, or set --no-pie-full-graphs."
    )
