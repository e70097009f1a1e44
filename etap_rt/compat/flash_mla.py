"""FlashMLA's dense decoding: `from etap_rt.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata`.

Both ways of calling it work: metadata made from the lengths and passed along (2025), and an object that the first call
fills (2026). Nothing is read from either, because the kernel divides its work itself: metadata may be older than the
lengths, and one object may serve calls of different shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from etap_rt import arguments, decode, driver, interop
from etap_rt.arguments import LseForm
from etap_rt.compat import renamed
from etap_rt.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from etap_rt.kernels import DIMS
from etap_rt.reference import SM_COUNT
from etap_rt.scalars import check_flag, integer, positive, shown

LSE_FORM = LseForm(math.log(2), math.inf)
METADATA_INTS = 8  # of each part in FlashMLA's metadata
METADATA_ROWS = 64  # query rows that FlashMLA computes at once

_NAMES = {"kv_cache": "k_cache"}
_LATENT_DIMS = {latent + rope: latent for latent, rope in DIMS}


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata()` returns: `config` tells the first call that it was passed to."""

    @dataclass
    class Config:
        """The first call's shapes and options, under FlashMLA's names."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool = False
        topk: int | None = None
        extra_page_block_size: int | None = None
        extra_topk: int | None = None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Any = None
    num_splits: Any = None


def get_mla_metadata(
    cache_seqlens: Any = None,
    num_q_tokens_per_head_k: int = 1,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Any, Any]:
    """Metadata for `flash_mla_with_kvcache`.

    Without arguments, as of 2026: (FlashMLASchedMeta, None). With `cache_seqlens` (b,), as of 2025: two arrays of zeros
    beside it in FlashMLA's shapes, (parts, 8) and (b + 1,), both int32, for code that keeps copies of them.
    `num_heads_per_head_k` is the first release's name of `num_q_tokens_per_head_k`.

    Raises UnsupportedError for FP8 and sparse attention; ArgumentError or ArgumentTypeError, with the argument's name,
    for lengths that are no such array and numbers that are no integers from 1 on.
    """
    check_flag(is_fp8_kvcache, "is_fp8_kvcache")
    if is_fp8_kvcache:
        raise _unsupported("is_fp8_kvcache")
    if topk is not None:
        raise _unsupported("topk")
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    lengths = interop.describe(cache_seqlens, "cache_seqlens")
    layout = lengths.layout
    if len(layout.shape) != 1:
        raise ArgumentError("cache_seqlens", f"shape {layout.shape}", "(b,)")
    if layout.dtype != "int32":
        raise ArgumentError("cache_seqlens", f"dtype {layout.dtype}", "int32")
    if layout.device_type not in ("cuda", "cpu"):
        raise ArgumentError("cache_seqlens", f"device {layout.device_type}", "cuda or cpu")
    rows = positive(num_q_tokens_per_head_k, "num_q_tokens_per_head_k")
    if num_heads_per_head_k is not None:
        rows = positive(num_heads_per_head_k, "num_heads_per_head_k")
    if num_heads_q is not None:
        positive(num_heads_q, "num_heads_q")  # of no consequence, as in FlashMLA for dense attention
    sm_count = SM_COUNT if layout.device_type == "cpu" else driver.sm_count(layout.device)
    parts = max(1, sm_count // positive(num_heads_k, "num_heads_k") // -(-rows // METADATA_ROWS))
    metadata = interop.empty(layout, lengths.owner, (parts, METADATA_INTS), "int32")
    num_splits = interop.empty(layout, lengths.owner, (layout.shape[0] + 1,), "int32")
    metadata[...] = num_splits[...] = 0
    return metadata, num_splits


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    out: Any = None,
    *,
    descale_q: Any = None,
    descale_k: Any = None,
) -> tuple[Any, Any]:
    """Decode attention over a paged cache, as FlashMLA's function of this name.

    Args:
        q: (b, s_q, h_q, 576), bfloat16 or float16.
        k_cache: (num_blocks, page_block_size, h_kv, 576), dtype of q; h_q is a multiple of h_kv. Pages may have other
            sizes than FlashMLA's 64, see `etap_rt.mla_decode`.
        block_table: (b, max_num_blocks_per_seq) int32.
        cache_seqlens: (b,) int32.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned.
        softmax_scale: factor of the scores, by default 576 ** -0.5.
        causal: query i of s_q sees keys 0 ... seqlen - s_q + i.
        out: (b, s_q, h_q, 512), written in place; made when not given.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length,
            descale_q, descale_k: of sparse attention and FP8 caches, which are not supported.

    Returns:
        (out, lse), lse (b, h_q, s_q) float32 to base e. A query that sees no key gives zeros and lse = +inf.

    With h_kv > 1 this is one launch for each KV head. 320 and 256 go in place of 576 and 512.

    Raises what `etap_rt.mla_decode` raises; UnsupportedError names what belongs to sparse attention or FP8.
    """
    if (
        is_fp8_kvcache is not False
        or indices is not None
        or attn_sink is not None
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
        or descale_q is not None
        or descale_k is not None
    ):
        check_flag(is_fp8_kvcache, "is_fp8_kvcache")
        _refuse(
            is_fp8_kvcache=is_fp8_kvcache or None,
            indices=indices,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
            descale_q=descale_q,
            descale_k=descale_k,
        )
    q_shape, cache_shape = _shape(q, "q"), _shape(k_cache, "k_cache")
    if q_shape[3] not in _LATENT_DIMS:
        raise ArgumentError("q", f"last dim {q_shape[3]}", " or ".join(map(str, _LATENT_DIMS)))
    if softmax_scale is None:
        softmax_scale = q_shape[3] ** -0.5
    head_dim_v = integer(head_dim_v, "head_dim_v")
    if head_dim_v != _LATENT_DIMS[q_shape[3]]:
        accepted = f"{_LATENT_DIMS[q_shape[3]]}, with q's last dim {q_shape[3]}"
        raise ArgumentError("head_dim_v", repr(head_dim_v), accepted)
    if type(tile_scheduler_metadata) is not FlashMLASchedMeta:
        _check_metadata(tile_scheduler_metadata, "tile_scheduler_metadata")
    if num_splits is not None:
        _check_metadata(num_splits, "num_splits")
    call_arguments = (block_table, cache_seqlens, softmax_scale, causal)
    try:
        arguments.check_options(softmax_scale, causal)
        if cache_shape[2] != 1:
            out, lse = _decode_each_head(q, k_cache, call_arguments, head_dim_v, out)
        elif known := arguments.recognise(q, k_cache, block_table, cache_seqlens, out, None):
            out, lse = decode.run_recognised(known, q, out, None, True, softmax_scale, causal, LSE_FORM)
        else:
            call = arguments.check(q, k_cache, *call_arguments, out, lse_form=LSE_FORM)
            out, lse = decode.make_outputs(call, out, None, True)
            decode.run(call, out, lse, softmax_scale, causal)
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, _NAMES) from None
    if type(tile_scheduler_metadata) is FlashMLASchedMeta and not tile_scheduler_metadata.have_initialized:
        b, s_q, h_q, _ = q_shape
        _, page_block_size, h_k, _ = cache_shape
        tile_scheduler_metadata.config = FlashMLASchedMeta.Config(b, s_q, h_q, page_block_size, h_k, causal)
        tile_scheduler_metadata.have_initialized = True
    return out, lse


def _decode_each_head(
    q: Any, k_cache: Any, call_arguments: tuple[Any, Any, float, bool], latent_dim: int, out: Any
) -> tuple[Any, Any]:
    """Every KV head with its own group of query heads; all are views."""
    queries, cache = interop.describe(q, "q"), interop.describe(k_cache, "k_cache")
    batch, s_q, heads, _ = queries.layout.shape
    kv_heads = cache.layout.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError("q", f"{heads} heads (dim 2)", f"a multiple of k_cache's {kv_heads} (dim 2)")
    shape = (batch, s_q, heads, latent_dim)
    if out is None:
        out = interop.empty(queries.layout, queries.owner, shape, queries.layout.dtype)
    written = interop.describe(out, "out")
    if written.layout.shape != shape:
        raise ArgumentError("out", f"shape {written.layout.shape}", str(shape))
    lse = interop.empty(queries.layout, queries.owner, (batch, heads, s_q), "float32")
    group = heads // kv_heads
    calls = []
    for head in range(kv_heads):
        own = slice(head * group, (head + 1) * group)
        own_q, own_cache = queries.owner[:, :, own], cache.owner[:, :, head]
        outputs = written.owner[:, :, own], lse[:, own]
        calls.append((arguments.check(own_q, own_cache, *call_arguments, *outputs, lse_form=LSE_FORM), *outputs))
    for call, own_out, own_lse in calls:  # all of them are checked before any is launched
        decode.run(call, own_out, own_lse, *call_arguments[2:])
    return out, lse


def _shape(x: Any, name: str) -> tuple[int, ...]:
    """The shape of an array that has to have four dims."""
    shape = getattr(x, "shape", None)
    if not isinstance(shape, tuple):
        interop.describe(x, name)  # says what it is
        raise ArgumentTypeError(name, type(x).__name__, "an array with a shape")
    if len(shape) != 4:
        raise ArgumentError(name, f"shape {tuple(shape)}", "four dims")
    return shape


def _check_metadata(value: Any, name: str) -> None:
    """Nobody reads it, but something else in its place, say the scale, is missing where it belongs."""
    if value is not None and not isinstance(value, FlashMLASchedMeta) and not getattr(value, "shape", ()):
        raise ArgumentTypeError(name, shown(value), "what get_mla_metadata returned, or None")


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise _unsupported(name)


def _unsupported(name: str) -> UnsupportedError:
    return UnsupportedError(f"{name}: sparse attention and FP8 caches", "a dense cache in bfloat16 or float16")
