"""What torch offers without an attention library: gather the pages, multiply, softmax, multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, version_of, why_no_gpu

name = "torch"


def available() -> str:
    return why_no_gpu()


def version() -> str:
    return version_of("torch")


def prepare(inputs: Inputs) -> Callable[[], Any]:
    import torch

    batch, s_q, heads, dims = inputs.q.shape
    longest = max(inputs.lengths)
    q = inputs.q.view(batch, s_q * heads, dims)
    hidden = None
    if inputs.causal and s_q > 1 or min(inputs.lengths) < longest:
        key = torch.arange(longest, device=q.device)
        unseen = torch.arange(s_q - 1, -1, -1, device=q.device) * int(inputs.causal)  # keys newer than each query
        visible = inputs.cache_seqlens[:, None] - unseen  # (b, s_q)
        hidden = (key >= visible[..., None]).repeat_interleave(heads, dim=1)  # (b, s_q * h, longest)

    def call() -> Any:
        keys = inputs.kv_cache[inputs.block_table].view(batch, -1, dims)[:, :longest]
        scores = (q @ keys.mT).float() * inputs.softmax_scale
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        return (weights @ keys[..., : inputs.latent_dim]).view(inputs.out.shape)

    return call
