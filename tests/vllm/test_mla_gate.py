"""MLA layers pass the gates around the layer, and what cannot be gated is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from pie_vllm.errors import CopyError, UnsupportedError
from pie_vllm.vllm import layer_refusals, refusals
from pie_vllm.vllm.compat import mla_layers
from pie_vllm.vllm.worker_side import gate, mla_gate
from tests.vllm.test_bad_input import check_groups, plain_config

pytestmark = pytest.mark.vllm


class Noting:
    """Stands at the gates, and fails at one of them."""

    def __init__(self, calls: list[Any], fails_at: str = "") -> None:
        self._calls, self._fails_at = calls, fails_at

    def _note(self, name: str, layer: int) -> None:
        self._calls.append((name, layer))
        if name == self._fails_at:
            raise CopyError(name)

    def before_write(self, layer: int) -> None:
        self._note("before_write", layer)

    def before_attention(self, layer: int) -> None:
        self._note("before_attention", layer)

    def after_attention(self, layer: int) -> None:
        self._note("after_attention", layer)


class Layer(torch.nn.Module):
    """Stands for vLLM's layer."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def update_kv_cache(self, kv: int, *, slots: int) -> None:
        self.calls.append(("written", kv, slots))

    def forward_impl(self, q: int, *, output: int) -> int:
        self.calls.append(("read", q, output))
        return output


def gated(fails_at: str = "") -> tuple[Layer, gate.GateSwitch, list[Any]]:
    """A layer with the gates of layer 3, passing them."""
    calls: list[Any] = []

    def failed(error: CopyError) -> None:
        calls.append(f"failed {error}")
        switch.engine = None

    switch = gate.GateSwitch(failed)
    layer = Layer(calls)
    mla_gate.install(layer, 0, gate.GateSwitch(failed))
    mla_gate.install(layer, 3, switch)  # Those of an engine that is gone do not stay.
    switch.engine = Noting(calls, fails_at)
    return layer, switch, calls


def run(layer: Layer) -> None:
    layer.update_kv_cache(1, slots=2)
    assert layer.forward_impl(3, output=4) == 4


def test_the_gates_enclose_write_and_attention() -> None:
    """In their order; nothing is called while no step with a plan runs. The class stays vLLM's."""
    layer, switch, calls = gated()
    run(layer)
    assert calls == [
        ("before_write", 3),
        ("written", 1, 2),
        ("before_attention", 3),
        ("read", 3, 4),
        ("after_attention", 3),
    ]
    assert type(layer) is Layer
    calls.clear()
    switch.engine = None
    run(layer)
    assert calls == [("written", 1, 2), ("read", 3, 4)]


@pytest.mark.parametrize("name", ["before_write", "before_attention", "after_attention"])
def test_a_copy_that_fails_does_not_end_the_pass(name: str) -> None:
    """The layer writes and reads all the same, and later gates do nothing."""
    layer, _, calls = gated(name)
    run(layer)
    run(layer)
    assert calls.count(("written", 1, 2)) == calls.count(("read", 3, 4)) == 2
    noted = [c for c in calls if c[0] in ("before_write", "before_attention", "after_attention")]
    assert noted[-1] == (name, 3)
    assert calls.count(f"failed {name}") == 1


def real_layer(backend: str, kind: type = MLAAttention, **changes: Any) -> Any:
    """A layer of vLLM's own class, with what the refusals look at and nothing else."""
    layer = object.__new__(kind)
    found = {
        "attn_backend": SimpleNamespace(get_name=lambda: backend, is_mla=lambda: True),
        "impl": SimpleNamespace(is_sparse=False),
        "hisparse_cache": None,
        **changes,
    }
    layer.__dict__.update(found)
    return layer


class OwnKernels(MLAAttention):
    """As a model's own layer, which may write KV by itself."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_mla_backends_and_layers_are_refused_by_name(device: str) -> None:
    """Also sparse ones, and layers of another class."""
    accepted = layer_refusals.MLA_BACKENDS[device]
    for backend in accepted:
        layer_refusals.check_layers(["a"], {"a": real_layer(backend)}, device)
    for backend in ("CUTLASS_MLA", "FLASHMLA_SPARSE", "TOKENSPEED_MLA"):
        with pytest.raises(UnsupportedError, match=rf"backend {backend}.*for MLA.*{accepted[0]}"):
            layer_refusals.check_layers(["a"], {"a": real_layer(backend)}, device)
    for other in (
        real_layer(accepted[0], OwnKernels),
        real_layer(accepted[0], impl=SimpleNamespace(is_sparse=True)),
        real_layer(accepted[0], hisparse_cache=object()),
    ):
        with pytest.raises(UnsupportedError, match=r"MLA layer a, a .*dense MLA layers"):
            layer_refusals.check_layers(["a"], {"a": other}, device)


def test_a_vllm_that_writes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that the gates rely on is looked at when they are put up."""
    mla_layers.check_mla_layers()

    def other(*_: Any) -> None:
        """Writes by itself."""

    for owner, name in (
        (MLAAttention, "forward"),
        (MLAAttention, "update_kv_cache"),
        (MLAAttention, "forward_impl"),
        (mla_attention, "unified_mla_kv_cache_update"),
        (mla_attention, "unified_mla_attention_with_output"),
        (CompilationConfig, "splitting_ops_contain_kv_cache_update"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            with pytest.raises(UnsupportedError, match=r"has no '.*pie_vllm (relies|expects)"):
                layer_refusals.check_layers(["a"], {"a": real_layer("CPU_MLA")}, "cpu")


def spec(**changes: Any) -> MLAAttentionSpec:
    settings: dict[str, Any] = {
        "block_size": 16,
        "num_kv_heads": 1,
        "max_tp_shards": 1,
        "head_size": 576,
        "dtype": torch.bfloat16,
        "cache_dtype_str": "auto",
        **changes,
    }
    return MLAAttentionSpec(**settings)


def test_latents_are_accepted_and_records_of_bytes_are_not() -> None:
    """All layers alike, unpadded, without scales inside a token's record."""
    plain = spec()
    assert check_groups(plain) == 0
    assert plain.page_size_bytes == 16 * 576 * 2
    packed = spec(state_content_bytes=656, cache_dtype_str="fp8_ds_mla", dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match=r"KV of type fp8_ds_mla.*--kv-cache-dtype auto"):
        check_groups(packed)
    with pytest.raises(UnsupportedError, match="padded KV pages"):
        check_groups(spec(page_size_padded=1 << 20))


def test_a_fused_write_of_latents_is_refused() -> None:
    """With MLA models alone: for others vLLM sets the flag, and it changes nothing."""
    config = plain_config()
    config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = True
    refusals.check_config(config, "cuda")
    config.model_config.use_mla = True
    with pytest.raises(UnsupportedError, match=r"fuse_rope_kvcache_cat_mla.*--block-manager def"):
        refusals.check_config(config, "cuda")
    config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = False
    refusals.check_config(config, "cuda")


def test_graphs_that_replay_mla_writes_are_refused() -> None:
    """The operation that writes latents must split graphs, as that of other layers must."""
    config = plain_config()
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    compilation.pass_config.fuse_attn_quant = False
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    compilation.set_splitting_ops_for_v1("naive", 1)
    config.model_config.use_mla, config.compilation_config = True, compilation
    compilation.pass_config.fuse_rope_kvcache_cat_mla = False
    refusals.check_config(config, "cuda")
    assert "vllm::unified_mla_attention_with_output" in compilation.splitting_ops
    compilation.splitting_ops.remove("vllm::unified_mla_kv_cache_update")
    with pytest.raises(UnsupportedError, match="without its gate"):
        refusals.check_config(config, "cuda")
