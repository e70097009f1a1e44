"""FlashMLA, installed as the package flash_mla (github.com/deepseek-ai/FlashMLA); both its interfaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, Unsuitable, version_of, why_no_gpu, why_not_importable

name = "FlashMLA"
PAGE_SIZE = 64


def available() -> str:
    return why_no_gpu() or why_not_importable("flash_mla")


def version() -> str:
    return version_of("flash_mla")


def prepare(inputs: Inputs) -> Callable[[], Any]:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    if inputs.page_size != PAGE_SIZE:
        raise Unsuitable(f"pages of {PAGE_SIZE} tokens only")
    _, s_q, heads, _ = inputs.q.shape
    cache = inputs.kv_cache.unsqueeze(2)
    # The package of 2025 makes the schedule here; that of 2026 makes it in its first call and keeps it.
    schedule, splits = get_mla_metadata(inputs.cache_seqlens, s_q * heads, 1)

    def call() -> Any:
        out, _ = flash_mla_with_kvcache(
            inputs.q,
            cache,
            inputs.block_table,
            inputs.cache_seqlens,
            inputs.latent_dim,
            schedule,
            splits,
            softmax_scale=inputs.softmax_scale,
            causal=inputs.causal,
        )
        return out

    return call
