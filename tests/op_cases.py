"""What the operators of etap_rt.torch_op are tested with, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etap_rt import torch_op
from tests.cases import DEEPSEEK_SCALE, Case

LENGTHS = (0, 1, 70, 130)
OP_CASES = (
    Case("packed", lengths=LENGTHS, heads=4, s_q=2),
    Case("no-mask-fp16-320", lengths=LENGTHS, heads=3, s_q=2, causal=False, dtype="float16", latent_dim=256),
    Case("split", lengths=LENGTHS, heads=4, split_q=True, split_cache=True),
    Case("strided", lengths=LENGTHS, heads=3, strided=True, s_q=2),
    Case("page-list", lengths=LENGTHS, heads=4, csr=True),
    Case("ragged", lengths=LENGTHS, heads=4, queries=(1, 3, 0, 2)),
    Case("ragged-split-page-list", lengths=LENGTHS, heads=4, queries=(1, 3, 0, 2), csr=True, split_q=True),
)


def operator_arguments(call: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of mla_decode as its operator takes them: positional ones, and those with names."""
    options = {"softmax_scale": call["softmax_scale"], "causal": call["causal"]}
    if "cu_seqlens_q" in call:
        options["cu_seqlens_q"] = call["cu_seqlens_q"]
    inputs = []
    for name, second in (("q", "q_rope"), ("kv_cache", "kv_rope"), ("block_table", "page_indptr")):
        value = call[name]
        if isinstance(value, tuple):
            value, options[second] = value
        inputs.append(value)
    return (*inputs, call["cache_seqlens"]), options


def finite(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments with zeros for NaN in the cache, which opcheck does not take for equal to itself."""
    cache = call["kv_cache"]
    parts = tuple(part.nan_to_num() for part in cache) if isinstance(cache, tuple) else cache.nan_to_num()
    return {**call, "kv_cache": parts}


class DecodeLayer(nn.Module):
    """Projection, decode, projection. `in_place`: into an output made beforehand."""

    def __init__(self, hidden: int, heads: int, in_place: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_place = in_place
        self.q_proj = nn.Linear(hidden, heads * 576, bias=False)
        self.o_proj = nn.Linear(heads * 512, hidden, bias=False)

    def forward(
        self, hidden: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        q = self.q_proj(hidden).unflatten(-1, (self.heads, 576))
        out = q.new_empty(*q.shape[:-1], 512) if self.in_place else None
        out, lse = torch_op.mla_decode(
            q, kv_cache, block_table, cache_seqlens, softmax_scale=DEEPSEEK_SCALE, out=out, return_lse=True
        )
        return hidden + self.o_proj(out.flatten(-2)), lse


def layer_inputs(batch: int, hidden: int, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    pages = 3 * batch
    return (
        torch.randn(batch, 1, hidden, dtype=torch.bfloat16).to(device),
        torch.randn(pages, 64, 576, dtype=torch.bfloat16).to(device),
        torch.randperm(pages).int().view(batch, 3).to(device),
        torch.randint(0, 3 * 64, (batch,)).int().to(device),
    )
