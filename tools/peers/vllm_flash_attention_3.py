"""The FlashAttention-3 that vLLM ships, called as vLLM's MLA backend calls it: its library _vllm_fa3_C, with or without
the rest of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, library_version, why_no_library

name = "FlashAttention-3 (vLLM)"
NAMESPACE = "_vllm_fa3_C"
LIBRARY = "vllm_flash_attn/_vllm_fa3_C.abi3.so"
NO_WINDOW = (-1, -1)


def available() -> str:
    return why_no_library(NAMESPACE, LIBRARY, "--fa3-so")


def version() -> str:
    return library_version(NAMESPACE, LIBRARY)


def prepare(inputs: Inputs) -> Callable[[], Any]:
    import torch

    batch, s_q, heads, dims = inputs.q.shape
    latent_dim, rope_dim = inputs.latent_dim, dims - inputs.latent_dim
    cache = inputs.kv_cache.unsqueeze(2)
    latent, rope = cache[..., :latent_dim], cache[..., latent_dim:]
    q = inputs.q.view(batch * s_q, heads, dims)
    q_latent, q_rope = q[..., :latent_dim], q[..., latent_dim:]
    out = inputs.out.view(batch * s_q, heads, latent_dim)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * s_q
    longest = max(inputs.lengths)
    ops = torch.ops._vllm_fa3_C

    schedule = ops.get_scheduler_metadata(
        batch,
        s_q,
        longest,
        heads,
        1,  # key heads
        rope_dim,
        latent_dim,
        q.dtype,
        inputs.cache_seqlens,
        starts,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        None,  # seqused_q
        None,  # leftpad_k
        inputs.page_size,
        0,  # max_seqlen_k_new
        inputs.causal,
        *NO_WINDOW,
        False,  # softcap
        0,  # splits: it chooses
        None,  # pack_gqa
        0,  # sm_margin
    )

    def call() -> Any:
        ops.fwd(
            q_rope,
            rope,
            latent,
            None,  # k_new
            None,  # v_new
            q_latent,
            out,
            starts,
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            inputs.cache_seqlens,
            s_q,
            longest,
            inputs.block_table,
            None,  # kv_batch_idx
            None,  # leftpad_k
            None,  # rotary_cos
            None,  # rotary_sin
            None,  # seqlens_rotary
            None,  # q_descale
            None,  # k_descale
            None,  # v_descale
            inputs.softmax_scale,
            inputs.causal,
            *NO_WINDOW,
            0.0,  # softcap
            True,  # rotary_interleaved
            schedule,
            0,  # splits: it chooses
            None,  # pack_gqa
            0,  # sm_margin
            None,  # s_aux
            1,  # cp_world_size
            0,  # cp_rank
            None,  # cp_tot_seqused_k
        )
        return inputs.out

    return call
