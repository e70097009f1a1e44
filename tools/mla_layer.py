"""Multi-head latent attention as DeepSeek-V3 has it, one layer in plain torch, decoding with etap_rt.

    python tools/mla_layer.py [--device cuda|cpu] [--heads N] [--steps N] [--hidden N]

The layer keeps one row a token: 512 latent dims, from which keys and values of all heads can be made, and 64 rope dims.
It can attend in two ways.

- Expanded: keys (128 + 64) and values (128) of every head are made from the latents; then attention as usual, here
  torch's scaled_dot_product_attention. Best for prompts.
- Absorbed: W_UK, which would make the keys, is applied to the query instead, and W_UV, which would make the values,
  to the attention's output. All heads then attend to the same rows of 512 + 64, straight from the paged cache. Best
  for decoding, and what mla_decode computes.

Both are the same function but for rounding. This prefills requests with the first, then decodes step by step with the
second, and holds every step's output against the expanded layer in the same dtype and in float32. The exit status
is 1 if a step differs by more than bfloat16 explains. Weights are random; DeepSeek's yarn extension of the rope
is left out. Heads are those of one GPU: DeepSeek-V3 has 128, 8 to 16 of them on each of 8 to 16 GPUs.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; dims of DeepSeek-V3, arXiv 2412.19437, section 4.2.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from etap_rt import PagedKVCache, mla_decode  # noqa: E402

HIDDEN_DIM = 7168
Q_LORA_DIM = 1536
LATENT_DIM = 512
ROPE_DIM = 64
NOPE_DIM = 128  # of a head's query and key, beside the rope dims
VALUE_DIM = 128
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
SOFTMAX_SCALE = (NOPE_DIM + ROPE_DIM) ** -0.5

PROMPTS = (200, 64, 1, 700)  # tokens of each request
# Relative error of a request's output, in bfloat16: some ten roundings of at most 2**-8 lie between the hidden state
# and it, most of them independent.
ACCEPTED_ERROR = 0.01


class Projected(NamedTuple):
    """What n tokens bring to the attention."""

    q_nope: Tensor  # (n, heads, NOPE_DIM)
    q_rope: Tensor  # (n, heads, ROPE_DIM)
    latent: Tensor  # (n, LATENT_DIM)
    k_rope: Tensor  # (n, ROPE_DIM), the same for all heads


class MLALayer(nn.Module):
    """Multi-head latent attention of one layer, without its residual connection."""

    def __init__(self, hidden_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_down = nn.Linear(hidden_dim, Q_LORA_DIM, bias=False)
        self.q_norm = nn.RMSNorm(Q_LORA_DIM, NORM_EPS)
        self.q_up = nn.Linear(Q_LORA_DIM, heads * (NOPE_DIM + ROPE_DIM), bias=False)
        self.kv_down = nn.Linear(hidden_dim, LATENT_DIM + ROPE_DIM, bias=False)
        self.kv_norm = nn.RMSNorm(LATENT_DIM, NORM_EPS)
        self.kv_up = nn.Linear(LATENT_DIM, heads * (NOPE_DIM + VALUE_DIM), bias=False)
        self.o_proj = nn.Linear(heads * VALUE_DIM, hidden_dim, bias=False)

    def project(self, hidden: Tensor, positions: Tensor) -> Projected:
        """Queries and cache rows of tokens: hidden (n, hidden_dim), positions (n,) in their requests."""
        q = self.q_up(self.q_norm(self.q_down(hidden))).view(-1, self.heads, NOPE_DIM + ROPE_DIM)
        q_nope, q_rope = q.split([NOPE_DIM, ROPE_DIM], dim=-1)
        latent, k_rope = self.kv_down(hidden).split([LATENT_DIM, ROPE_DIM], dim=-1)
        return Projected(q_nope, rotate(q_rope, positions[:, None]), self.kv_norm(latent), rotate(k_rope, positions))

    def attend_expanded(self, tokens: Projected) -> Tensor:
        """Output (n, hidden_dim) of a request's n tokens, from the first on; each sees itself and those before it."""
        k_nope, v = self.up_weights()
        k_nope = torch.einsum("nl,hdl->hnd", tokens.latent, k_nope)
        v = torch.einsum("nl,hdl->hnd", tokens.latent, v)
        k = torch.cat([k_nope, tokens.k_rope.expand(self.heads, -1, -1)], dim=-1)
        q = torch.cat([tokens.q_nope, tokens.q_rope], dim=-1).transpose(0, 1)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=SOFTMAX_SCALE)
        return self.o_proj(out[0].transpose(0, 1).flatten(1))

    def attend_absorbed(self, tokens: Projected, pages: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        """Output (b, hidden_dim) of the newest token of each of b requests, whose row is in the cache already."""
        k_nope, v = self.up_weights()
        q_latent = torch.einsum("bhd,hdl->bhl", tokens.q_nope, k_nope)
        out = mla_decode(
            (q_latent[:, None], tokens.q_rope[:, None]), pages, block_table, cache_seqlens, softmax_scale=SOFTMAX_SCALE
        )
        return self.o_proj(torch.einsum("bhl,hdl->bhd", out[:, 0], v).flatten(1))

    def up_weights(self) -> tuple[Tensor, Tensor]:
        """W_UK (heads, NOPE_DIM, LATENT_DIM) and W_UV (heads, VALUE_DIM, LATENT_DIM)."""
        k_nope, v = self.kv_up.weight.view(self.heads, -1, LATENT_DIM).split([NOPE_DIM, VALUE_DIM], dim=1)
        return k_nope, v


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x (..., ROPE_DIM), whose neighbours 2i and 2i + 1 are a pair; positions (...) broadcast."""
    frequencies = ROPE_THETA ** (-torch.arange(0, ROPE_DIM, 2, dtype=torch.float32, device=x.device) / ROPE_DIM)
    angles = positions[..., None] * frequencies
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


class StepError(NamedTuple):
    """How far a step's output is from others: the largest relative error (of the norm) of any request."""

    tokens: int  # in the cache
    to_expanded: float  # the expanded layer in the same dtype
    to_float32: float
    expanded_to_float32: float  # of the expanded layer in the same dtype


@torch.no_grad()
def compare(
    heads: int,
    steps: int,
    device: str,
    hidden_dim: int = HIDDEN_DIM,
    prompts: Sequence[int] = PROMPTS,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 64,
) -> list[StepError]:
    """Prefill requests of `prompts` tokens, decode `steps` tokens of each, and compare every step."""
    torch.manual_seed(0)
    layer = MLALayer(hidden_dim, heads)
    for linear in layer.children():
        if isinstance(linear, nn.Linear):  # keeps the size of what passes through
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    layer = layer.to(device, dtype)
    exact_layer = copy.deepcopy(layer).float()
    requests = [torch.randn(prompt + steps, hidden_dim).to(device, dtype) for prompt in prompts]
    positions = [torch.arange(len(hidden), device=device) for hidden in requests]

    # The expanded layer sees whole requests at once: as everything is causal, that is step after step.
    expanded = [layer.attend_expanded(layer.project(*tokens)) for tokens in zip(requests, positions)]
    exact = [
        exact_layer.attend_expanded(exact_layer.project(hidden.float(), place))
        for hidden, place in zip(requests, positions)
    ]

    pages = sum(-(-len(hidden) // page_size) for hidden in requests)
    cache = PagedKVCache(pages, page_size, dtype=dtype, device=device)
    sequences = [cache.new_sequence() for _ in prompts]
    prefilled = [
        layer.project(hidden[:prompt], place[:prompt]) for hidden, place, prompt in zip(requests, positions, prompts)
    ]
    slots = cache.reserve(sequences, prompts)
    cache.write(0, slots, torch.cat([t.latent for t in prefilled]), torch.cat([t.k_rope for t in prefilled]))

    errors = []
    for step in range(steps):
        now = [prompt + step for prompt in prompts]
        hidden = torch.stack([hidden[i] for hidden, i in zip(requests, now)])
        tokens = layer.project(hidden, torch.tensor(now, device=device))
        cache.write(0, cache.reserve(sequences, [1] * len(prompts)), tokens.latent, tokens.k_rope)
        out = layer.attend_absorbed(tokens, cache.pages(0), *cache.batch(sequences)).float()
        expanded_out = torch.stack([x[i] for x, i in zip(expanded, now)]).float()
        exact_out = torch.stack([x[i] for x, i in zip(exact, now)])
        errors.append(
            StepError(
                cache.stats().tokens,
                relative_error(out, expanded_out),
                relative_error(out, exact_out),
                relative_error(expanded_out, exact_out),
            )
        )
    return errors


def relative_error(x: Tensor, expected: Tensor) -> float:
    """The largest of any row, of which there is one a request."""
    return float(((x - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Decode with an MLA layer of DeepSeek-V3's shape, and compare.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--heads", type=int, default=16, help="query heads, 1 to 128")
    parser.add_argument("--steps", type=int, default=8, help="tokens to decode for each request")
    parser.add_argument("--hidden", type=int, default=HIDDEN_DIM, help="dims of the hidden state")
    options = parser.parse_args(arguments)

    errors = compare(options.heads, options.steps, options.device, options.hidden)
    print(
        f"{len(PROMPTS)} requests, prompts of {', '.join(map(str, PROMPTS))} tokens, {options.heads} heads, bfloat16."
    )
    print("Relative differences of the layer's output, the largest of any request:\n")
    print("step  tokens  decode to expanded  decode to float32  expanded to float32")
    for step, error in enumerate(errors, 1):
        print(
            f"{step:4}  {error.tokens:6}  {error.to_expanded:18.2e}  {error.to_float32:17.2e}  "
            f"{error.expanded_to_float32:19.2e}"
        )
    good = all(error.to_expanded <= ACCEPTED_ERROR for error in errors)
    print(f"\n{'All' if good else 'NOT all'} steps agree with the expanded layer to {ACCEPTED_ERROR:.0%}.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
