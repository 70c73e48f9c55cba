"""An adapter reloaded in place in a real engine, after others took the blocks of its KV.

``python -m tests.helpers.reloaded_adapter MODEL FOLDER`` prints JSON: the answers before, after the
reload, and of the same files loaded as an adapter of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BLOCK, RESIDENT, POOLED, ROWS = 32, 14, 24, 240
RANK = 8


def adapter(folder: Path, config: dict[str, Any], seed: int) -> str:
    """Write a LoRA adapter of random weights; returns its path."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for projection, size in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}.lora_"
            for part, shape in (("A", (RANK, hidden)), ("B", (size, RANK))):
                tensors[f"{name}{part}.weight"] = torch.randn(shape, generator=generator) * 0.05
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def main(model: str, folder: Path) -> None:
    """Run the engine and print the answers."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    config = json.loads((Path(model) / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    page = BLOCK * 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    device = page * (config["num_hidden_layers"] * RESIDENT + 2 * POOLED)
    pool = (ROWS + 0.5) * config["num_hidden_layers"] * page
    pie = {"pool_gib": pool / 2**30, "ring_slots": 2, "target_slowdown": "off"}
    pie["ring_fraction"] = (2 * POOLED * page + page) / device
    live, fresh = adapter(folder / "live", config, 1), adapter(folder / "fresh", config, 2)
    llm = LLM(
        model=model,
        dtype="float32",
        block_size=BLOCK,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=device,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=RANK,
        prefix_caching_hash_algo="sha256_cbor",
        scheduling_policy="priority",
        max_num_scheduled_tokens=200,
        long_prefill_token_threshold=100,
        scheduler_reserve_full_isl=False,
        served_model_name="mine",
        disable_log_stats=False,
        additional_config={"block_manager": "pie", "pie": pie},
    )
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)

    def ask(numbers: range, lora: LoRARequest | None = None) -> list[list[int]]:
        prompts: Any = [
            {"prompt_token_ids": [100 + (n * 131 + i * i) % 5000 for i in range(200)]}
            for n in numbers
        ]
        found = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    def parked_hits() -> int:
        core: Any = llm.llm_engine.engine_core
        manager = core.engine_core.scheduler.kv_cache_manager
        return int(manager.hit_counts.hits.parked)

    before = ask(range(1), LoRARequest("live", 1, live))
    ask(range(1, 16))
    again = ask(range(1), LoRARequest("live", 1, live))
    hits = parked_hits()
    ask(range(1, 16))
    adapter(folder / "live", config, 2)
    llm.llm_engine.add_lora(LoRARequest("live", 1, live, load_inplace=True))
    after = ask(range(1), LoRARequest("live", 1, live))
    should = ask(range(1), LoRARequest("fresh", 2, fresh))
    answers = {"before": before, "again": again, "after": after, "fresh": should, "hits": hits}
    print(json.dumps(answers), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
