"""FlashInfer's BatchMLAPagedAttentionWrapper with its kernel for Hopper, backend fa3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from etap_rt import driver
from peers import Inputs, Unsuitable, version_of, why_no_gpu, why_not_importable

name = "FlashInfer fa3"
WORKSPACE_BYTES = 128 << 20


def available() -> str:
    return why_no_gpu() or why_not_importable("flashinfer.mla")


def version() -> str:
    return version_of("flashinfer-python")


def prepare(inputs: Inputs) -> Callable[[], Any]:
    import torch
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    if inputs.q.is_cuda and _sms_are_missing(inputs.q.device.index):
        raise Unsuitable("its launch is cooperative, with a CTA for each SM of the whole GPU")
    batch, s_q, heads, dims = inputs.q.shape
    latent_dim = inputs.latent_dim
    counts = [-(-length // inputs.page_size) for length in inputs.lengths]
    page_starts = torch.tensor([0, *counts], device=inputs.q.device).cumsum(0).int()
    pages = torch.cat([inputs.block_table[request, :count] for request, count in enumerate(counts)])
    starts = torch.arange(batch + 1, dtype=torch.int32, device=inputs.q.device) * s_q
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device), backend="fa3"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 0.7 has new names for these; older ones know only these
        wrapper.plan(
            qo_indptr=starts,
            kv_indptr=page_starts,
            kv_indices=pages,
            kv_len_arr=inputs.cache_seqlens,
            num_heads=heads,
            head_dim_ckv=latent_dim,
            head_dim_kpe=dims - latent_dim,
            page_size=inputs.page_size,
            causal=inputs.causal,
            sm_scale=inputs.softmax_scale,
            q_data_type=inputs.q.dtype,
            kv_data_type=inputs.kv_cache.dtype,
        )
    q = inputs.q.view(batch * s_q, heads, dims)
    q_latent, q_rope = q[..., :latent_dim], q[..., latent_dim:]
    latent, rope = inputs.kv_cache[..., :latent_dim], inputs.kv_cache[..., latent_dim:]
    out = inputs.out.view(batch * s_q, heads, latent_dim)

    def call() -> Any:
        wrapper.run(q_nope=q_latent, q_pe=q_rope, ckv_cache=latent, kpe_cache=rope, out=out)
        return inputs.out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        call()  # it warns once
    return call


def _sms_are_missing(device: int) -> bool:
    import torch

    return driver.stream_sm_count(device, torch.cuda.current_stream().cuda_stream) < driver.sm_count(device)
