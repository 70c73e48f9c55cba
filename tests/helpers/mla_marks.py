"""MLA layers that name the pages they write and read, for ``cuda_on_cpu``."""

from __future__ import annotations

from typing import Any

from tests.helpers.cuda_on_cpu import Around, Touch, page_bytes, pages_of


def mark(impl: Any, number: int, around: Around) -> None:
    """Make an MLA implementation tell which pages it touches, in place.

    Args:
        impl: of vLLM's layer.
        number: of that layer.
        around: stands around its KV write, and around what reads KV.
    """
    impl.__class__ = _marked(type(impl), number, around)


def _context(prefill: Any, size: int) -> list[int]:
    """Blocks that prompts read of what was computed before."""
    blocks: set[int] = set()
    context = prefill.chunked_context
    for chunk in context.chunks if context is not None else ():
        rows = prefill.block_table[chunk.request_slice]
        starts, lengths = chunk.starts.tolist(), chunk.seq_lens.tolist()
        for row, start, length in zip(rows, starts, lengths, strict=True):
            if length > 0:
                blocks.update(row[start // size : -(-(start + length) // size)].tolist())
    return sorted(blocks)


def _decoded(decode: Any, size: int) -> list[int]:
    """Blocks that decodes read."""
    rows = zip(decode.block_table, decode.seq_lens.tolist(), strict=False)
    return sorted({block for row, length in rows for block in row[: -(-length // size)].tolist()})


def _marked(base: Any, number: int, around: Around) -> Any:
    def touch(kv_cache: Any, blocks: list[int], *, write: bool) -> Any:
        pages = pages_of(kv_cache, blocks)
        return around(Touch(number, write, pages, page_bytes(kv_cache)))

    class Marked(base):
        def do_kv_cache_update(
            self, kv_c: Any, k_pe: Any, kv_cache: Any, slots: Any, *args: Any, **kwargs: Any
        ) -> Any:
            blocks = (slots[slots >= 0] // kv_cache.shape[1]).unique().tolist()
            with touch(kv_cache, blocks, write=True):
                return super().do_kv_cache_update(kv_c, k_pe, kv_cache, slots, *args, **kwargs)

        def forward_mha(
            self, q: Any, kv_c: Any, k_pe: Any, kv_cache: Any, metadata: Any, *args: Any, **kw: Any
        ) -> Any:
            with touch(kv_cache, _context(metadata.prefill, kv_cache.shape[1]), write=False):
                return super().forward_mha(q, kv_c, k_pe, kv_cache, metadata, *args, **kw)

        def forward_mqa(self, q: Any, kv_cache: Any, metadata: Any, layer: Any) -> Any:
            with touch(kv_cache, _decoded(metadata.decode, kv_cache.shape[1]), write=False):
                return super().forward_mqa(q, kv_cache, metadata, layer)

    Marked.__name__ = base.__name__
    return Marked
