"""FlashAttention-3 built from its own repository (module flash_attn_interface), with the latent part as qv and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, version_of, why_no_gpu, why_not_importable

name = "FlashAttention-3"


def available() -> str:
    return why_no_gpu() or why_not_importable("flash_attn_interface")


def version() -> str:
    return version_of("flash_attn_3")


def prepare(inputs: Inputs) -> Callable[[], Any]:
    from flash_attn_interface import flash_attn_with_kvcache

    cache = inputs.kv_cache.unsqueeze(2)
    latent, rope = cache[..., : inputs.latent_dim], cache[..., inputs.latent_dim :]
    q_latent, q_rope = inputs.q[..., : inputs.latent_dim], inputs.q[..., inputs.latent_dim :]

    def call() -> Any:
        return flash_attn_with_kvcache(
            q=q_rope,
            k_cache=rope,
            v_cache=latent,
            qv=q_latent,
            cache_seqlens=inputs.cache_seqlens,
            page_table=inputs.block_table,
            softmax_scale=inputs.softmax_scale,
            causal=inputs.causal,
        )

    return call
