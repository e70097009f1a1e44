"""The FlashMLA that vLLM ships: its library _flashmla_C, with or without the rest of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, Unsuitable, library_version, why_no_library

name = "FlashMLA (vLLM)"
NAMESPACE = "_flashmla_C"
LIBRARY = "_flashmla_C.abi3.so"
PAGE_SIZE = 64


def available() -> str:
    return why_no_library(NAMESPACE, LIBRARY, "--flashmla-so")


def version() -> str:
    return library_version(NAMESPACE, LIBRARY)


def prepare(inputs: Inputs) -> Callable[[], Any]:
    import torch

    if inputs.page_size != PAGE_SIZE:
        raise Unsuitable(f"pages of {PAGE_SIZE} tokens only")
    cache = inputs.kv_cache.unsqueeze(2)
    # The rows of a KV head together, tokens before heads: in memory the same as (batch, s_q, heads, dim).
    rows = inputs.out.view(inputs.out.shape[0], 1, -1, inputs.out.shape[-1])
    decode = torch.ops._flashmla_C.dense_decode_fwd

    def decode_with(schedule: Any, splits: Any) -> Any:
        return decode(
            inputs.q,
            cache,
            inputs.latent_dim,
            inputs.cache_seqlens,
            inputs.block_table,
            inputs.softmax_scale,
            inputs.causal,
            schedule,
            splits,
            rows,
        )

    # Without a schedule the operator makes one from the lengths; later calls are given it, as vLLM's are.
    _, _, schedule, splits = decode_with(None, None)

    def call() -> Any:
        decode_with(schedule, splits)
        return inputs.out

    return call
