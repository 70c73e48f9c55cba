"""What pie calls, overrides and reads of vLLM: functions, and attributes of objects."""

from __future__ import annotations

SIGNATURES = (
    # Wrapped or called when the plugin is loaded and the engine is configured.
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.v1.engine.core:EngineCore.__init__",
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
    "vllm.v1.engine.core:EngineCore.collective_rpc",
    "vllm.v1.metrics.loggers:PrometheusStatLogger.__init__",
    "vllm.v1.metrics.loggers:PrometheusStatLogger.record",
    # Overridden by the scheduler.
    "vllm.v1.core.sched.scheduler:Scheduler.__init__",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats",
    "vllm.v1.core.sched.scheduler:Scheduler.shutdown",
    # Overridden or called by the block manager and its pool.
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate",
    "vllm.v1.core.block_pool:BlockPool.get_usage",
    "vllm.v1.core.block_pool:BlockPool.reset_prefix_cache",
    "vllm.v1.core.block_pool:BlockPool.move_block_hashes",
    "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block",
    "vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block",
    "vllm.v1.core.block_pool:BlockHashToBlockMap.insert",
    "vllm.v1.core.block_pool:BlockHashToBlockMap.pop",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.set_block_hash",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.reset_hash",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.popleft",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.popleft_n",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.remove",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.append_n",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.prepend_n",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.get_all_free_blocks",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.iter_blocks_after",
    "vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id",
    "vllm.v1.request:Request.is_finished",
    # Overridden or called by the workers.
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
    "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory",
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
    "vllm.v1.worker.gpu_worker:Worker.init_device",
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec",
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
    "vllm.v1.worker.gpu_worker:Worker.execute_model",
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
    "vllm.v1.worker.gpu_worker:Worker.shutdown",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sync_device",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.update_requests",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run",
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write",
    "vllm.v1.worker.gpu.attn_utils:allocate_kv_cache",
    "vllm.v1.worker.gpu_model_runner:allocate_kv_cache",
    "vllm.v1.kv_cache_interface:create_kv_cache_views",
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output",
    # Groups of layers. The first is called in 0.32, the next two in 0.33.
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
    "vllm.v1.core.kv_cache_config_builder:get_kv_cache_config_builder",
    "vllm.v1.core.kv_cache_planning:get_kv_cache_groups_from_builder",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    "vllm.v1.core.kv_cache_utils:get_group_id",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.get_num_blocks_to_allocate",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.get_num_skipped_tokens",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec.max_admission_blocks_per_request",
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec.max_admission_blocks_per_request",
    "vllm.v1.kv_cache_interface:MambaSpec.max_memory_usage_bytes",
    # Drafters.
    "vllm.config:SpeculativeConfig.uses_draft_kv_cache",
    "vllm.config:SpeculativeConfig.use_gemma4_mtp",
    "vllm.config:SpeculativeConfig.use_step3p5_mtp",
    "vllm.config:SpeculativeConfig.use_multi_module_mtp",
    # CUDA graphs.
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch",
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:"
    "TargetDependentARSpeculator.propose",
    "vllm.v1.worker.gpu.cudagraph_utils:_is_compatible",
    "vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled",
    "vllm.config:CompilationConfig.splitting_ops_contain_kv_cache_update",
    # Gates.
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention.update_kv_cache",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl",
)
"""As ``module:Class.method``."""

ATTRIBUTES = {
    "vllm.engine.arg_utils:EngineArgs": "additional_config scheduler_cls worker_cls "
    "kv_cache_memory_bytes tensor_parallel_size",
    "vllm.config:VllmConfig": "additional_config model_config cache_config parallel_config "
    "scheduler_config attention_config compilation_config speculative_config diffusion_config "
    "kv_transfer_config kv_events_config use_v2_model_runner num_speculative_tokens "
    "num_lookahead_tokens num_prefill_lookahead_tokens",
    "vllm.config:ModelConfig": "use_mla is_diffusion runner_type is_encoder_decoder "
    "enable_sleep_mode max_model_len original_max_model_len",
    "vllm.config:CacheConfig": "cache_dtype kv_offloading_size num_gpu_blocks_override "
    "kv_sharing_fast_prefill",
    "vllm.config:ParallelConfig": "tensor_parallel_size pipeline_parallel_size data_parallel_size "
    "decode_context_parallel_size prefill_context_parallel_size use_ubatching world_size "
    "worker_cls",
    "vllm.config:SchedulerConfig": "scheduler_cls max_num_seqs max_num_batched_tokens policy "
    "async_scheduling",
    "vllm.config:CompilationConfig": "use_inductor_graph_partition pass_config cudagraph_mode "
    "splitting_ops static_forward_context",
    "vllm.config.compilation:PassConfig": "fuse_attn_quant fuse_rope_kvcache_cat_mla",
    "vllm.config:AttentionConfig": "hisparse_config",
    "vllm.config:KVEventsConfig": "enable_kv_cache_events",
    "vllm.config:SpeculativeConfig": "method num_speculative_tokens parallel_drafting",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer": "_draft_attn_layer_names",
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator": "draft_attn_layer_names",
    "vllm.v1.engine.core:EngineCore": "scheduler model_executor",
    "vllm.v1.core.sched.scheduler:Scheduler": "running waiting requests kv_cache_manager "
    "max_num_running_reqs max_num_scheduled_tokens current_step num_spec_tokens "
    "num_lookahead_tokens num_sampled_tokens_per_step has_mamba_layers",
    "vllm.v1.core.sched.output:SchedulerOutput": "total_num_scheduled_tokens num_scheduled_tokens "
    "scheduled_cached_reqs scheduled_new_reqs finished_req_ids kv_cache_block_copies "
    "new_block_ids_to_zero scheduled_spec_decode_tokens",
    "vllm.v1.core.sched.output:CachedRequestData": "resumed_req_ids",
    "vllm.v1.core.sched.output:NewRequestData": "req_id",
    "vllm.v1.request:Request": "request_id status priority num_tokens num_computed_tokens "
    "num_prompt_tokens is_prefill_chunk next_decode_eligible_step block_hashes "
    "skip_reading_prefix_cache num_tokens_with_spec num_output_placeholders",
    "vllm.v1.request:RequestStatus": "WAITING PREEMPTED",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator block_pool enable_caching "
    "max_model_len watermark_blocks empty_kv_cache_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": "blocks",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers block_pool "
    "kv_cache_config eagle_group_ids retention_interval",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": "req_to_blocks "
    "num_cached_block block_size block_pool enable_caching",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager": "mamba_cache_mode",
    "vllm.v1.kv_cache_interface:MambaSpec": "block_size page_size_bytes mamba_type "
    "mamba_cache_mode num_speculative_blocks",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": "block_size page_size_bytes",
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": "block_size page_size_bytes",
    "vllm.v1.core.block_pool:BlockPool": "num_gpu_blocks blocks free_block_queue null_block "
    "cached_block_hash_to_block cached_block_hashes_by_block metrics_collector enable_caching "
    "enable_kv_cache_events hash_block_size",
    "vllm.v1.core.block_pool:BlockHashToBlockMap": "_cache",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue": "num_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_id ref_cnt is_null block_hash "
    "block_hash_num_tokens _block_hash _block_hash_num_tokens",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "num_blocks kv_cache_tensors kv_cache_groups "
    "needs_kv_cache_zeroing",
    "vllm.v1.kv_cache_interface:KVCacheTensor": "size offset layers block_stride layer_stride",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "block_size page_size_bytes "
    "page_size_padded sliding_window",
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs": "kv_cache_specs",
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": "state_content_bytes cache_dtype_str",
    "vllm.v1.metrics.stats:SchedulerStats": "num_kv_fetch_reqs_by_stage",
    "vllm.v1.metrics.loggers:PrometheusStatLogger": "per_engine_labelvalues _gauge_cls "
    "_counter_cls",
    "vllm.v1.worker.gpu_worker:Worker": "model_runner vllm_config rank device",
    "vllm.v1.worker.cpu_worker:CPUWorker": "model_runner vllm_config rank device",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "requests input_batch "
    "cudagraph_dispatcher model",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_id_to_index block_table",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "block_ids",
    "vllm.v1.worker.block_table:MultiGroupBlockTable": "block_tables",
    "vllm.v1.worker.block_table:BlockTable": "block_table",
    "vllm.v1.utils:CpuGpuBuffer": "np",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "req_states block_tables cudagraph_manager "
    "model",
    "vllm.v1.worker.gpu.states:RequestState": "req_id_to_index",
    "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables num_blocks",
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher": "cudagraph_mode",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": "cudagraph_mode graphs",
    "vllm.compilation.cuda_graph:CUDAGraphWrapper": "runtime_mode concrete_cudagraph_entries",
    "vllm.compilation.cuda_graph:CUDAGraphEntry": "cudagraph",
    "vllm.v1.attention.backend:AttentionBackend": "get_name forward_includes_kv_cache_update "
    "is_mla",
    "vllm.v1.attention.backend:MLAAttentionImpl": "is_sparse",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention": "attn_backend impl "
    "hisparse_cache",
    "vllm.model_executor.layers.attention.attention:Attention": "attn_backend impl "
    "kv_sharing_target_layer_name",
    "vllm.v1.outputs:AsyncModelRunnerOutput": "get_output",
}
"""Attributes that pie reads or writes, by class."""
