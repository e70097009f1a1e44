"""FlashMLA's dense decoding, called as its documentation says, on CPU tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import etap_rt
from etap_rt import ArgumentError, ArgumentTypeError, UnsupportedError
from etap_rt.compat.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

torch: Any = pytest.importorskip("torch")

PAGE = 64
DV = 512


def problem(
    lengths: tuple[int, ...] = (0, 1, 64, 200),
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    dim: int = 576,
    dtype: Any = torch.bfloat16,
) -> dict[str, Any]:
    """q, kvcache, block_table and cache_seqlens as FlashMLA's examples have them; NaN past the end of each request."""
    generator = torch.Generator().manual_seed(0)
    pages = max(1, -(-max(lengths) // PAGE))
    order = torch.randperm(len(lengths) * pages, generator=generator).int().view(-1, pages)
    kvcache = torch.randn(len(lengths) * pages, PAGE, h_kv, dim, generator=generator).to(dtype)
    for row, length in zip(order, lengths):
        by_token = kvcache[row.long()].flatten(0, 1)
        by_token[length:] = torch.nan
        kvcache[row.long()] = by_token.view(pages, PAGE, h_kv, dim)
    return {
        "q": torch.randn(len(lengths), s_q, h_q, dim, generator=generator).to(dtype),
        "k_cache": kvcache,
        "block_table": order,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
    }


def expected(
    q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, dv: int, scale: float, causal: bool
) -> tuple[Any, Any]:
    """Attention in float64, one query and head at a time, with FlashMLA's conventions."""
    b, s_q, h_q, _ = q.shape
    group = h_q // k_cache.shape[2]
    out = torch.zeros(b, s_q, h_q, dv, dtype=torch.float64)
    lse = torch.full((b, h_q, s_q), math.inf, dtype=torch.float64)
    for r, length in enumerate(cache_seqlens.tolist()):
        tokens = k_cache[block_table[r].long()].flatten(0, 1)[:length].double()
        for i in range(s_q):
            seen = max(0, length - s_q + i + 1) if causal else length
            if seen == 0:
                continue
            for head in range(h_q):
                keys = tokens[:seen, head // group]
                scores = scale * (keys @ q[r, i, head].double())
                lse[r, head, i] = scores.logsumexp(0)
                out[r, i, head] = scores.softmax(0) @ keys[:, :dv]
    return out, lse


def assert_close(got: tuple[Any, Any], exact: tuple[Any, Any]) -> None:
    assert got[0].shape == exact[0].shape and got[1].shape == exact[1].shape
    assert got[1].dtype == torch.float32
    assert (got[0].double() - exact[0]).norm() <= 5e-3 * exact[0].norm()
    torch.testing.assert_close(got[1].double(), exact[1], atol=5e-5, rtol=1e-6)


def test_the_example_of_2025() -> None:
    """Metadata from the lengths once, then the same for every layer."""
    call = problem(s_q=2)
    h_q, h_kv = call["q"].shape[2], call["k_cache"].shape[2]
    tile_scheduler_metadata, num_splits = get_mla_metadata(call["cache_seqlens"], 2 * h_q // h_kv, h_kv)
    for _ in range(2):
        o, lse = flash_mla_with_kvcache(
            call["q"],
            call["k_cache"],
            call["block_table"],
            call["cache_seqlens"],
            DV,
            tile_scheduler_metadata,
            num_splits,
            causal=True,
        )
        assert o.dtype == torch.bfloat16
        assert_close((o, lse), expected(**call, dv=DV, scale=576**-0.5, causal=True))


def test_the_example_of_2026() -> None:
    """An empty object, which the first call fills, for every layer; `out` is given."""
    call = problem()
    sched_meta, none = get_mla_metadata()
    assert isinstance(sched_meta, FlashMLASchedMeta) and none is None
    assert not sched_meta.have_initialized and sched_meta.config is None
    out = torch.full((4, 1, 16, DV), torch.nan, dtype=torch.bfloat16)
    for _ in range(2):
        o, lse = flash_mla_with_kvcache(
            **call, head_dim_v=DV, tile_scheduler_metadata=sched_meta, softmax_scale=0.1, out=out
        )
        assert o is out
        assert_close((o, lse), expected(**call, dv=DV, scale=0.1, causal=False))
        assert sched_meta.have_initialized
        assert sched_meta.config == FlashMLASchedMeta.Config(4, 1, 16, 64, 1, False)


def test_metadata_of_2025_has_flash_mlas_shapes() -> None:
    lengths = torch.ones(5, dtype=torch.int32)
    for metadata, num_splits in (
        get_mla_metadata(lengths, 128, 1),
        get_mla_metadata(cache_seqlens=lengths, num_heads_per_head_k=128, num_heads_k=1),
        get_mla_metadata(lengths, 128, 1, 128, False, None),
    ):
        assert metadata.shape == (66, 8) and num_splits.shape == (6,)
        assert metadata.dtype == num_splits.dtype == torch.int32
        metadata.clone().copy_(metadata)  # code for CUDA graphs keeps copies in buffers


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_kv", "h_q"), [(1, 8), (2, 32), (3, 6), (8, 128)])
def test_several_kv_heads(h_kv: int, h_q: int, causal: bool) -> None:
    call = problem((0, 1, 100), s_q=2, h_q=h_q, h_kv=h_kv)
    meta, splits = get_mla_metadata(call["cache_seqlens"], 2 * h_q // h_kv, h_kv)
    result = flash_mla_with_kvcache(
        **call, head_dim_v=DV, tile_scheduler_metadata=meta, num_splits=splits, causal=causal
    )
    assert_close(result, expected(**call, dv=DV, scale=576**-0.5, causal=causal))
    out = torch.full_like(result[0], torch.nan)
    again = flash_mla_with_kvcache(
        **call, head_dim_v=DV, tile_scheduler_metadata=meta, num_splits=splits, causal=causal, out=out
    )
    assert again[0] is out
    assert torch.equal(out, result[0]) and torch.equal(again[1], result[1])


def test_several_kv_heads_fill_an_object_too() -> None:
    call = problem(h_kv=2)
    sched_meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=sched_meta, causal=True)
    assert sched_meta.config == FlashMLASchedMeta.Config(4, 1, 16, 64, 2, True)


@pytest.mark.parametrize(("dim", "dv"), [(576, 512), (320, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_defaults_to_all_dims_of_a_key(dim: int, dv: int, dtype: Any) -> None:
    call = problem((70,), dim=dim, dtype=dtype)
    result = flash_mla_with_kvcache(**call, head_dim_v=dv, tile_scheduler_metadata=get_mla_metadata()[0])
    assert_close(result, expected(**call, dv=dv, scale=dim**-0.5, causal=False))


@pytest.mark.parametrize("h_kv", [1, 2])
def test_a_query_without_keys_gives_zeros_and_plus_infinity(h_kv: int) -> None:
    call = problem((0, 1, 3), s_q=3, h_kv=h_kv)
    out, lse = flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=get_mla_metadata()[0], causal=True)
    without = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    assert torch.equal(lse == math.inf, without[:, None].expand_as(lse))
    assert not out[without].any() and torch.isfinite(lse[2]).all()


def test_the_result_is_mla_decodes() -> None:
    call = problem((200, 70), s_q=2)
    out, lse = flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=get_mla_metadata()[0], causal=True)
    kv_cache = call.pop("k_cache")
    native = etap_rt.mla_decode(**call, kv_cache=kv_cache, softmax_scale=576**-0.5, return_lse=True)
    assert torch.equal(out, native[0]) and torch.equal(lse, native[1])


@pytest.mark.parametrize(
    "name",
    [
        "is_fp8_kvcache",
        "indices",
        "attn_sink",
        "extra_k_cache",
        "extra_indices_in_kvcache",
        "topk_length",
        "extra_topk_length",
        "descale_q",
        "descale_k",
    ],
)
def test_sparse_attention_and_fp8_are_refused_by_name(name: str) -> None:
    value = True if name == "is_fp8_kvcache" else torch.zeros(4, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=f"^{name}: "):
        flash_mla_with_kvcache(
            **problem(), head_dim_v=DV, tile_scheduler_metadata=get_mla_metadata()[0], **{name: value}
        )


@pytest.mark.parametrize(("name", "value"), [("is_fp8_kvcache", True), ("topk", 2048)])
def test_metadata_of_sparse_attention_and_fp8_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"^{name}: "):
        get_mla_metadata(torch.ones(5, dtype=torch.int32), 16, 1, 16, **{name: value})


ARRAY = "an array of torch, CuPy, NumPy or another DLPack producer"


class OnlyShape:
    shape = (4, 1, 16, 576)


WRONG: list[tuple[str, Any, str]] = [
    ("q", torch.zeros(4, 16, 576, dtype=torch.bfloat16), "q: got shape (4, 16, 576)"),
    ("q", None, "q: got NoneType"),
    ("q", torch.zeros(4, 1, 16, 512, dtype=torch.bfloat16), "q: got last dim 512"),
    ("q", torch.zeros(4, 1, 16, 0, dtype=torch.bfloat16), "q: got last dim 0, accepted is 576 or 320"),
    ("k_cache", torch.zeros(4, 64, 576, dtype=torch.bfloat16), "k_cache: got shape (4, 64, 576)"),
    ("k_cache", torch.zeros(4, 64, 1, 576), "k_cache: got dtype float32"),
    ("k_cache", torch.zeros(4, 96, 1, 576, dtype=torch.bfloat16), "k_cache: got shape (4, 96, 1, 576)"),
    ("k_cache", torch.zeros(4, 64, 3, 576, dtype=torch.bfloat16), "q: got 16 heads (dim 2), accepted is a multiple of"),
    ("block_table", None, "block_table: got NoneType"),
    ("cache_seqlens", torch.zeros(4, dtype=torch.int64), "cache_seqlens: got dtype int64"),
    ("k_cache", None, f"k_cache: got NoneType, accepted is {ARRAY}"),
    ("k_cache", [[1]], f"k_cache: got list, accepted is {ARRAY}"),
    ("k_cache", OnlyShape(), f"k_cache: got {OnlyShape.__module__}.OnlyShape, accepted is {ARRAY}"),
    ("q", OnlyShape(), f"q: got {OnlyShape.__module__}.OnlyShape, accepted is {ARRAY}"),
    ("q", np.float16, f"q: got type, accepted is {ARRAY}"),
    ("head_dim_v", 576, "head_dim_v: got 576, accepted is 512, with q's last dim 576"),
    ("head_dim_v", 512.0, "head_dim_v: got 512.0, accepted is an integer"),
    ("head_dim_v", None, "head_dim_v: got None, accepted is an integer"),
    ("head_dim_v", torch.zeros(4, 8), "head_dim_v: got Tensor, accepted is an integer"),
    (
        "tile_scheduler_metadata",
        512,
        "tile_scheduler_metadata: got 512, accepted is what get_mla_metadata returned, or",
    ),
    ("num_splits", 0.1, "num_splits: got 0.1, accepted is what get_mla_metadata returned, or None"),
    ("num_splits", np.float32(0.5), "num_splits: got np.float32(0.5), accepted is what get_mla_metadata returned, or"),
    ("causal", 1, "causal: got 1, accepted is True or False"),
    ("softmax_scale", float("nan"), "softmax_scale: got nan, accepted is a number above 0, at most 2e+38"),
    ("is_fp8_kvcache", None, "is_fp8_kvcache: got None, accepted is True or False"),
    ("is_fp8_kvcache", torch.zeros(2), "is_fp8_kvcache: got tensor([0., 0.]), accepted is True or False"),
    ("softmax_scale", True, "softmax_scale: got True"),
    ("out", torch.zeros(4, 1, 16, 576, dtype=torch.bfloat16), "out: got shape (4, 1, 16, 576)"),
]


@pytest.mark.parametrize("h_kv", [1, 2])
@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_mistakes_are_named_as_flash_mla_names_its_arguments(name: str, value: Any, message: str, h_kv: int) -> None:
    meta, out = get_mla_metadata()[0], torch.full((4, 1, 16, DV), 7, dtype=torch.bfloat16)
    call = {**problem(h_kv=h_kv), "head_dim_v": DV, "tile_scheduler_metadata": meta, "out": out, name: value}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        flash_mla_with_kvcache(**call)
    assert str(caught.value).startswith(message)
    assert (out == 7).all() and not meta.have_initialized


def test_a_mistake_in_the_last_of_several_kv_heads_is_found_before_the_first_is_computed() -> None:
    call = problem(h_kv=2)
    wide = torch.zeros(*call["k_cache"].shape[:2], 2 * 580, dtype=torch.bfloat16)
    call["k_cache"] = wide.as_strided(call["k_cache"].shape, (*wide.stride()[:2], 580, 1))  # 1160 bytes a head
    out = torch.full((4, 1, 16, DV), 7, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="^k_cache: got address .*, accepted is a multiple of 16 bytes"):
        flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=None, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache_seqlens", [1, 2], f"cache_seqlens: got list, accepted is {ARRAY}"),
        ("cache_seqlens", torch.ones(5), "cache_seqlens: got dtype float32, accepted is int32"),
        ("cache_seqlens", torch.ones(5, 1), "cache_seqlens: got shape (5, 1), accepted is (b,)"),
        (
            "cache_seqlens",
            torch.ones(5, device="meta").int(),
            "cache_seqlens: got device meta, accepted is cuda or cpu",
        ),
        ("num_q_tokens_per_head_k", None, "num_q_tokens_per_head_k: got None, accepted is an integer"),
        ("num_q_tokens_per_head_k", 0, "num_q_tokens_per_head_k: got 0, accepted is 1 or more"),
        ("num_q_tokens_per_head_k", 16.0, "num_q_tokens_per_head_k: got 16.0, accepted is an integer"),
        ("num_heads_per_head_k", -1, "num_heads_per_head_k: got -1, accepted is 1 or more"),
        ("num_heads_k", 0, "num_heads_k: got 0, accepted is 1 or more"),
        ("num_heads_k", True, "num_heads_k: got True, accepted is an integer"),
        ("num_heads_k", "1", "num_heads_k: got '1', accepted is an integer"),
        ("num_heads_q", [16], "num_heads_q: got [16], accepted is an integer"),
        ("is_fp8_kvcache", 1, "is_fp8_kvcache: got 1, accepted is True or False"),
    ],
)
def test_mistakes_in_what_metadata_are_made_from_are_named(name: str, value: Any, message: str) -> None:
    call = {"cache_seqlens": torch.ones(5, dtype=torch.int32), "num_q_tokens_per_head_k": 16, name: value}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        get_mla_metadata(**call)
    assert str(caught.value) == message


def test_numbers_may_be_numpys() -> None:
    lengths = torch.ones(5, dtype=torch.int32)
    metadata, num_splits = get_mla_metadata(lengths, np.int64(128), np.int32(1), np.uint8(128))
    assert metadata.shape == (66, 8)
    flash_mla_with_kvcache(
        **problem(),
        head_dim_v=np.int64(DV),
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=np.float32(0.1),
    )


def test_a_wrong_out_for_several_kv_heads_is_refused() -> None:
    call = problem(h_kv=2)
    out = torch.zeros(4, 1, 32, DV, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="^out: got shape"):
        flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=get_mla_metadata()[0], out=out)
