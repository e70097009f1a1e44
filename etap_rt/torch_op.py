"""mla_decode as an operator of torch, for torch.compile; importing this module registers it.

    torch.ops.etap_rt.mla_decode(q, kv_cache, block_table, cache_seqlens, *, softmax_scale, ...) -> (out, lse)
    torch.ops.etap_rt.mla_decode_out(q, kv_cache, block_table, cache_seqlens, out, lse, *, softmax_scale, ...) -> None

An operator's arguments are tensors, so what `etap_rt.mla_decode` takes as a pair has two names here: the second parts
are `q_rope`, `kv_rope` and `page_indptr`. `mla_decode` of this module has etap_rt's own arguments and is made of these
operators: it is the one to call in code that is compiled, where it never breaks the graph.

Gradients are not supported: backward through an operator raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etap_rt import decode
from etap_rt.arguments import check_scale
from etap_rt.errors import ArgumentError, ArgumentTypeError
from etap_rt.kernels import DIMS
from etap_rt.scalars import check_flag

_INPUTS = "Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens"
_OPTIONS = (
    "Tensor? cu_seqlens_q=None, Tensor? q_rope=None, Tensor? kv_rope=None, Tensor? page_indptr=None, *, "
    "float softmax_scale, bool causal=True"
)


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`etap_rt.mla_decode` for torch tensors, with the same arguments and results, that torch.compile can trace.

    Raises what `etap_rt.mla_decode` raises.
    """
    check_flag(causal, "causal")
    check_flag(return_lse, "return_lse")
    if not torch.compiler.is_compiling():  # where the scale may be a symbol; the operator would take more than numbers
        check_scale(softmax_scale)
        softmax_scale = float(softmax_scale)
    q, q_rope = _pair("q", q)
    kv_cache, kv_rope = _pair("kv_cache", kv_cache)
    block_table, page_indptr = _pair("block_table", block_table)
    _check_tensor("cache_seqlens", cache_seqlens)
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("out", out), ("lse", lse)):
        if given is not None:
            _check_tensor(name, given)
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "cu_seqlens_q": cu_seqlens_q,
        "q_rope": q_rope,
        "kv_rope": kv_rope,
        "page_indptr": page_indptr,
    }
    if out is None and lse is None:
        out, lse = torch.ops.etap_rt.mla_decode(q, kv_cache, block_table, cache_seqlens, **options)
    else:
        out_shape, lse_shape = _output_shapes(q, q_rope)
        out = q.new_empty(out_shape) if out is None else out
        lse = q.new_empty(lse_shape, dtype=torch.float32) if lse is None and return_lse else lse
        torch.ops.etap_rt.mla_decode_out(q, kv_cache, block_table, cache_seqlens, out, lse, **options)
    return (out, lse) if return_lse else out


def _pair(name: str, x: Any) -> tuple[Any, Any]:
    if not isinstance(x, (tuple, list)):
        _check_tensor(name, x)
        return x, None
    if len(x) != 2:
        raise ArgumentTypeError(name, f"{type(x).__name__} of {len(x)}", "one tensor or a pair of them")
    for index, part in enumerate(x):
        _check_tensor(f"{name}[{index}]", part)
    return x[0], x[1]


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, (Tensor, torch.fx.Proxy)):
        raise ArgumentTypeError(name, type(x).__name__, "a torch tensor")


def _join(x: Tensor, second: Tensor | None) -> Any:
    return x if second is None else (x, second)


def _output_shapes(q: Tensor, q_rope: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of out and lse."""
    *tokens, heads, dim = q.shape
    if len(tokens) not in (1, 2):
        raise ArgumentError("q", f"shape {tuple(q.shape)}", "(b, s_q, heads, dim) or (total_q, heads, dim)")
    if q_rope is None:
        # While a graph is traced for sizes that vary, dim is a symbol: it can be compared, but is no key.
        accepted = [latent for latent, rope in DIMS if latent + rope == dim]
        if not accepted:
            raise ArgumentError("q", f"last dim {dim}", " or ".join(str(latent + rope) for latent, rope in DIMS))
        dim = accepted[0]
    return (*tokens, heads, dim), (*tokens[:-1], heads, tokens[-1])


def _compute(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    q_rope: Tensor | None = None,
    kv_rope: Tensor | None = None,
    page_indptr: Tensor | None = None,
    *,
    return_lse: bool = True,
    **options: Any,
) -> Any:
    return decode.mla_decode(
        _join(q, q_rope),
        _join(kv_cache, kv_rope),
        _join(block_table, page_indptr),
        cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        return_lse=return_lse,
        **options,
    )


def _compute_into(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *others: Tensor | None,
    **options: Any,
) -> None:
    _compute(q, kv_cache, block_table, cache_seqlens, *others, **options, out=out, lse=lse, return_lse=False)


def _allocate(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    q_rope: Tensor | None = None,
    *others: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What a trace needs to know: outputs without contents."""
    out_shape, lse_shape = _output_shapes(q, q_rope)
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)


def _allocate_nothing(*tensors: Tensor | None, **options: Any) -> None:
    """The outputs are given."""


_op = torch.library.custom_op(
    "etap_rt::mla_decode",
    _compute,
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
)
_op.register_fake(_allocate)
# `lse` may be None but has no default: torch 2.10 looks for it among the arguments, where a default would be left out.
_out_op = torch.library.custom_op(
    "etap_rt::mla_decode_out",
    _compute_into,
    mutates_args=("out", "lse"),
    schema=f"({_INPUTS}, Tensor(a!) out, Tensor(b!)? lse, {_OPTIONS}) -> ()",
)
_out_op.register_fake(_allocate_nothing)
