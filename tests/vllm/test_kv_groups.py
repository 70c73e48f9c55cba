"""Which group of layers is pooled, what the others hold, and where all of them lie."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from pie_vllm.errors import ConfigError, UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.vllm import draft_refusals
from pie_vllm.vllm.compat import drafters
from pie_vllm.vllm.kv_groups import groups_of
from pie_vllm.vllm.worker_side import kv_layout

pytestmark = pytest.mark.vllm

SHAPE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(block_size=16, **SHAPE)
WINDOW = SlidingWindowSpec(block_size=16, sliding_window=40, **SHAPE)
STATE = MambaSpec(block_size=4096, shapes=((FULL.page_size_bytes // 4,),), dtypes=(torch.float32,))
GROUPS = [
    KVCacheGroupSpec(["w0", "w2", "w4"], WINDOW),
    KVCacheGroupSpec(["s1"], STATE),
    KVCacheGroupSpec(["f5", "f3"], FULL),
]
SPECS = {"w0": WINDOW, "s1": STATE, "w2": WINDOW, "f3": FULL, "w4": WINDOW, "f5": FULL}


def config(mode: str = "none", speculative: object = None) -> Any:
    """The part of a VllmConfig that counts: 64 tokens a step, two steps in flight."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(mamba_cache_mode=mode),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=128,
        max_concurrent_batches=2,
        speculative_config=speculative,
    )


def test_full_attention_is_pooled_in_the_order_of_the_model() -> None:
    """Its layers, and what a request holds of the others: windows of 40 tokens and a state."""
    found = groups_of(GROUPS, SPECS, config())
    assert (found.pooled, found.layers, found.others) == (2, ("f3", "f5"), (0, 1))
    assert (found.regions, found.extra_regions) == (3, 1)
    assert (found.page_bytes, found.block_size) == (FULL.page_size_bytes, 16)
    # ceil((39 + 128) / 16) + 1 blocks of the window at most, ceil((39 + 32) / 16) + 1 at least.
    assert found.residents == 12 + 1
    assert found.residents_min == (6, 1)
    # One block of the window for each of full attention; a state does not grow.
    assert found.cost == 2
    assert groups_of(GROUPS, SPECS, config("align")).cost == 2 + 1
    assert found.pooled_share(4096) == pytest.approx(256 / (256 + 13))


def test_what_rows_do_not_hold_is_not_parked() -> None:
    """Pages of regions that the pooled group lacks, and states of drafts; states may move."""
    assert not groups_of(GROUPS, SPECS, config()).parks
    windows = KVCacheGroupSpec(["w0", "w2"], WINDOW)
    assert groups_of([windows, *GROUPS[1:]], SPECS, config()).parks
    for change, parks in (
        ({"mamba_cache_mode": "align"}, True),
        ({"num_speculative_blocks": 1}, False),
    ):
        states = KVCacheGroupSpec(["s1"], replace(STATE, **change))
        assert groups_of([windows, states, GROUPS[2]], SPECS, config()).parks == parks


def test_layers_of_a_drafter_follow_those_of_the_model() -> None:
    """They pass no ring; those in other groups are like any other layer there."""
    found = groups_of(GROUPS, SPECS, config(), {"f5", "w4"})
    assert (found.layers, found.drafts) == (("f3",), ("f5",))
    assert (found.regions, found.extra_regions) == (3, 1)
    assert groups_of(GROUPS, SPECS, config()).drafts == ()


@pytest.mark.parametrize("owner", ["drafter", "speculator"])
def test_a_runner_says_which_layers_its_drafter_has(owner: str) -> None:
    """The V1 runner and the V2 runner, each in its own words."""
    names = dict(drafters.NAMES)[owner]
    speculative = SimpleNamespace(method="eagle", uses_draft_kv_cache=lambda: True)
    runner = SimpleNamespace(**{owner: SimpleNamespace(**{names: {"d0"}})})
    assert drafters.draft_layers(runner, speculative) == {"d0"}
    assert drafters.draft_layers(runner, None) == frozenset()
    without = SimpleNamespace(method="ngram", uses_draft_kv_cache=lambda: False)
    assert drafters.draft_layers(SimpleNamespace(), without) == frozenset()
    with pytest.raises(UnsupportedError, match=f"method eagle.*neither.*{owner}.{names}"):
        drafters.draft_layers(SimpleNamespace(), speculative)


def test_drafters_that_do_not_fit_the_groups_are_refused() -> None:
    """By layer, where its KV has another size than the model's."""
    wide = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    specs = {"f0": FULL, "d0": wide}
    mixed = [KVCacheGroupSpec(["f0", "d0"], UniformTypeKVCacheSpecs(16, specs))]
    sizes = rf"layer d0 has KV pages of {wide.page_size_bytes} bytes.*{FULL.page_size_bytes}"
    with pytest.raises(UnsupportedError, match=sizes):
        draft_refusals.check_groups(mixed, {"d0"})
    draft_refusals.check_groups(mixed, ())
    draft_refusals.check_groups(GROUPS, {"f5"})


KINDS = {"gemma4_mtp": False, "step3p5_mtp": False, "multi_module_mtp": False}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"method": "draft_model"}, None),
        ({"gemma4_mtp": True}, "Gemma 4's MTP layers"),
        ({"step3p5_mtp": True}, "Step 3.5's MTP layers"),
        ({"multi_module_mtp": True}, "3 draft tokens by several MTP modules"),
        ({"parallel_drafting": True}, "parallel drafting"),
        ({"method": "ngram", "parallel_drafting": True}, None),
    ],
    ids=str,
)
def test_drafters_of_other_kinds_are_refused(changes: dict[str, Any], text: str | None) -> None:
    """With the flag, and the methods that are left."""
    fields = {"method": "mtp", "num_speculative_tokens": 3, "parallel_drafting": False} | changes
    kinds = {f"use_{kind}": lambda kind=kind: fields.get(kind, False) for kind in KINDS}
    has_layers = fields["method"] not in ("ngram", "suffix")
    speculative = SimpleNamespace(**fields, **kinds, uses_draft_kv_cache=lambda: has_layers)
    config = SimpleNamespace(speculative_config=speculative)
    if text is None:
        draft_refusals.check_drafter(config)
        return
    with pytest.raises(UnsupportedError, match=f"{text}.*--speculative-config.*eagle, eagle3"):
        draft_refusals.check_drafter(config)


def test_states_of_rejected_tokens_are_refused() -> None:
    """By the name of the first layer with a state; windows are none."""
    with pytest.raises(UnsupportedError, match=r"--speculative-config.* layer s1, .*Remove"):
        groups_of(GROUPS, SPECS, config(speculative=object()))
    beside = [GROUPS[0], GROUPS[2]]
    assert groups_of(beside, SPECS, config(speculative=object())).cost == 2


def test_a_device_without_room_for_one_request_is_refused() -> None:
    """With what is needed, in blocks and bytes, and the flags that help."""
    found = groups_of(GROUPS, SPECS, config())
    assert found.resident_min == 6 + 1 + 2
    found.check(10)
    with pytest.raises(
        ConfigError, match=r"needs 9 blocks of \d+ bytes.*8 are all that fit.*Raise"
    ):
        found.check(9)
    plain = groups_of(GROUPS[2:], SPECS, config())
    assert (plain.resident_min, plain.cost, plain.others) == (0, 1, ())


def test_all_groups_begin_at_the_first_region() -> None:
    """The pooled layers in the order of the ring; a page lies where the geometry says."""
    sizes = Geometry(
        num_layers=2,
        page_bytes=FULL.page_size_bytes,
        resident_blocks=12,
        pooled_blocks=4,
        ring_slots=2,
        rows=4,
        chunk_rows=4,
        granularity=4096,
        extra_regions=1,
    )
    stride = sizes.num_blocks * sizes.page_bytes
    tensors = [
        KVCacheTensor(
            size=3 * stride,
            layers=list(group.layer_names),
            layer_stride=stride,
            block_stride=sizes.page_bytes,
        )
        for group in GROUPS
    ]
    given = KVCacheConfig(
        num_blocks=sizes.num_blocks, kv_cache_tensors=tensors, kv_cache_groups=GROUPS
    )
    laid = kv_layout.over_arena(given, sizes, ("f3", "f5"))
    assert [t.layers for t in laid.kv_cache_tensors] == [["w0", "w2", "w4"], ["s1"], ["f3", "f5"]]
    assert given.kv_cache_tensors[2].layers == ["f5", "f3"]
    arena = torch.zeros(sizes.virtual_bytes, dtype=torch.int8)
    views = kv_layout.views(arena, laid, KVCacheLayout.LBNHC)
    assert views.keys() == SPECS.keys()
    for region, names in enumerate([("w0", "s1", "f3"), ("w2", "f5"), ("w4",)]):
        for name in names:
            start = views[name].data_ptr() - arena.data_ptr()
            assert start == sizes.page_offset(region, 0), name
    tensors[0].block_stride *= 2
    with pytest.raises(UnsupportedError, match="one KV cache tensor a group"):
        kv_layout.over_arena(given, sizes, ("f3", "f5"))
