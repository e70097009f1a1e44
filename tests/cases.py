"""One table of decode problems that every backend runs, with their inputs, exact results and tolerances.

Inputs are hostile wherever the contract allows it: pages are shuffled, every cache slot without a token is NaN,
table entries past a request's last page are huge, and the gaps of strided arrays are NaN too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from etap_rt.reference import decode_float64

ROPE_DIM = 64
UNUSED_ENTRY = 2_147_480_000  # of the block table, past a request's last page
SPARE_PAGES = 3  # of the cache, that belong to no request
SPARE_COLUMNS = 2  # of the block table
SPARE_ENTRIES = 2  # of a page list: before the first request, after the last and, now and then, in between
DEEPSEEK_SCALE = (128 + 64) ** -0.5
FLASH_MLA_SCALE = 576**-0.5

MIXED = (0, 1, 63, 64, 65, 127, 128, 200, 1000, 2500)
LONG = (0, 40_000, 1, 30_001, 64, 30_011)  # a dozen tiles for each SM of an H200

# Powers of two by which the scores of successive tiles are raised (for odd heads lowered) in uneven cases: steps
# that move the softmax's reference value, and steps that leave it behind.
UNEVEN_LEVELS = (0, 5, 14, 9)

NUMPY_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """A decode problem. `accurate`: long enough, all of it, that rounding P costs little beside rounding the result."""

    name: str
    dtype: str = "bfloat16"
    latent_dim: int = 512
    lengths: tuple[int, ...] = MIXED
    heads: int = 16
    s_q: int = 1
    queries: tuple[int, ...] = ()  # of each request, when they are ragged; s_q does not count then
    causal: bool = True
    page_size: int = 64
    csr: bool = False  # page lists instead of a table
    split_q: bool = False  # q is the pair (latent, rope)
    split_cache: bool = False
    strided: bool = False  # no array is contiguous in its outer dims
    cache_heads_dim: bool = False  # kv_cache has four dims
    scale: float = DEEPSEEK_SCALE
    uneven: bool = False  # scores rise and fall from tile to tile, see UNEVEN_LEVELS
    magnitude: float = 1.0  # of the cache's values; the queries are as much smaller
    accurate: bool = False

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("bf16"),
    Case("fp16", dtype="float16"),
    Case("bf16-320", latent_dim=256),
    Case("fp16-320", dtype="float16", latent_dim=256),
    *(Case(f"bf16-{heads}-heads", heads=heads) for heads in (1, 3, 8, 17, 64, 128)),
    *(Case(f"fp16-320-{heads}-heads", dtype="float16", latent_dim=256, heads=heads) for heads in (3, 64)),
    # One for each size of row tile.
    Case("long-8-rows", lengths=LONG, heads=8, uneven=True),
    Case("long-16-rows", lengths=LONG, uneven=True, dtype="float16"),
    Case("long-24-rows", lengths=LONG, heads=12, s_q=2, uneven=True, latent_dim=256),
    Case("long-32-rows", lengths=LONG, heads=32, uneven=True, dtype="float16", latent_dim=256),
    Case("long-64-rows", lengths=LONG, heads=60, uneven=True, page_size=256),
    Case("long-large-values", lengths=LONG, heads=60, uneven=True, magnitude=2.0**100),
    Case("long-small-values", lengths=LONG, uneven=True, magnitude=2.0**-80),
    Case("one-request", lengths=(9001,)),
    Case("one-request-2-queries", lengths=(9001,), s_q=2),
    Case("one-request-128-heads", lengths=(4500,), heads=128),
    Case("one-long-many-short", lengths=(1, 5, 7000, *range(60, 70), 0, 0, 300)),
    Case("more-requests-than-lanes", lengths=tuple(7 * i % 211 for i in range(300)), heads=8),
    # So many of one length that every lane has two of them whole.
    Case("two-requests-a-lane", lengths=(130,) * 260, heads=8, latent_dim=256),
    Case("two-requests-a-lane-128-heads", lengths=(130,) * 130, heads=128, latent_dim=256),
    # Those that are looked at are alike, the division is uneven.
    *(
        Case(f"alike-at-first-{heads}-heads", lengths=(200,) * 32 + tuple(range(500, 3700, 100)), heads=heads)
        for heads in (16, 64)
    ),
    Case("all-empty", lengths=(0,) * 5),
    Case("one-token", lengths=(1,), heads=1),
    Case("page-edges-128", page_size=128, lengths=(0, 1, 127, 128, 129, 255, 256, 257, 1000)),
    Case("page-edges-256", page_size=256, lengths=(0, 1, 255, 256, 257, 511, 512, 513, 3000)),
    Case("2-queries", s_q=2),
    Case("2-queries-no-mask", s_q=2, causal=False),
    Case("2-queries-3-heads-fp16", dtype="float16", s_q=2, heads=3),
    Case("5-queries-1-head", s_q=5, heads=1, lengths=(0, 1, 2, 3, 4, 5, 6, 63, 64, 65, 66, 67, 68, 69, 700)),
    Case("5-queries-3-heads", s_q=5, heads=3),
    Case("5-queries-16-heads-320", s_q=5, latent_dim=256),
    Case("5-queries-17-heads-no-mask", s_q=5, heads=17, causal=False),
    Case("5-queries-128-heads", s_q=5, heads=128, lengths=(3, 64, 65, 1500)),
    Case("5-queries-128-heads-no-mask", s_q=5, heads=128, lengths=(0, 66, 900), causal=False),
    Case("split-q", split_q=True),
    Case("split-cache", split_cache=True),
    Case("split-both-fp16-320", dtype="float16", latent_dim=256, split_q=True, split_cache=True),
    Case("cache-heads-dim", cache_heads_dim=True),
    Case("strided", strided=True, s_q=2, heads=3),
    Case("strided-split", strided=True, split_q=True, split_cache=True, cache_heads_dim=True, s_q=2, page_size=128),
    Case("fp16-accurate", dtype="float16", lengths=(4096, 8192), scale=FLASH_MLA_SCALE, accurate=True),
    Case("bf16-accurate", lengths=(4096, 8192), scale=FLASH_MLA_SCALE, accurate=True),
)


# Requests of different numbers of queries, pages in lists, and both.
RAGGED_CASES = (
    Case("ragged", queries=(1, 2, 4, 0, 1, 3, 2, 1, 5, 1)),
    Case("ragged-no-mask", queries=(1, 2, 4, 0, 1, 3, 2, 1, 5, 1), causal=False),
    Case("ragged-fp16-320-1-head", dtype="float16", latent_dim=256, heads=1, queries=(3, 1, 70, 64, 0, 1, 1, 2, 9, 1)),
    Case("ragged-3-heads", heads=3, queries=(0, 4, 1, 2, 3, 1, 1, 0, 30, 0)),
    Case("ragged-128-heads", heads=128, lengths=(0, 3, 64, 65, 1500), queries=(1, 5, 0, 1, 3)),
    Case("ragged-one-of-many-queries", heads=8, lengths=(*range(50, 70), 3000), queries=(*(1,) * 20, 40)),
    Case("ragged-more-queries-than-keys", queries=(0, 3, 70, 66, 1, 0, 200, 1, 1, 1), heads=2),
    Case("ragged-one-request", lengths=(9001,), queries=(3,)),
    Case("ragged-one-query-each", queries=(1,) * len(MIXED)),
    Case("ragged-long", lengths=LONG, queries=(1, 2, 4, 1, 0, 3), uneven=True),
    Case("ragged-two-requests-a-lane", lengths=(130,) * 260, queries=(1, 2) * 130, heads=8, latent_dim=256),
    Case(
        "ragged-long-64-rows", lengths=LONG, queries=(9, 0, 4, 1, 12, 3), uneven=True, dtype="float16", latent_dim=256
    ),
    Case(
        "ragged-more-requests-than-lanes",
        lengths=tuple(7 * i % 211 for i in range(300)),
        queries=tuple(i % 4 for i in range(300)),
        heads=8,
    ),
    Case("ragged-all-without-keys", lengths=(0,) * 5, queries=(1, 2, 0, 1, 4)),
    Case("ragged-last-ones-without-queries", lengths=(300, 70, 64, 9), queries=(2, 1, 0, 0)),
    Case("ragged-strided", strided=True, heads=3, queries=(1, 2, 4, 0, 1, 3, 2, 1, 5, 1)),
    Case("ragged-split", split_q=True, split_cache=True, strided=True, queries=(2, 2, 4, 0, 1, 3, 2, 1, 5, 1)),
    *(Case(f"csr-page-size-{size}", csr=True, page_size=size) for size in (1, 2, 16, 64, 128, 256)),
    Case("csr-long", csr=True, lengths=LONG, uneven=True, page_size=32),
    Case("csr-2-queries-split", csr=True, s_q=2, split_q=True, split_cache=True, cache_heads_dim=True),
    Case("csr-all-empty", csr=True, lengths=(0,) * 5),
    Case("csr-one-request-320", csr=True, lengths=(9001,), latent_dim=256, dtype="float16"),
    Case("csr-ragged", csr=True, queries=(1, 2, 4, 0, 1, 3, 2, 1, 5, 1)),
    Case("csr-ragged-page-size-1", csr=True, page_size=1, queries=(1, 0, 4, 0, 1, 3, 2, 1, 5, 2), split_cache=True),
    Case("csr-ragged-strided", csr=True, page_size=8, strided=True, heads=24, queries=(1, 2, 4, 0, 1, 3, 2, 1, 5, 1)),
    Case("csr-ragged-fp16-no-mask", csr=True, dtype="float16", causal=False, queries=(1, 2, 4, 2, 1, 3, 2, 1, 5, 0)),
)


@dataclass(frozen=True)
class View:
    """A part of a contiguous array, so that it can be made again, strides included, wherever the array is copied to."""

    base: NDArray[Any]
    index: tuple[slice, ...] = ()
    swapped: tuple[int, int] | None = None  # two axes, swapped after slicing

    def on(self, convert: Callable[[NDArray[Any]], Any]) -> Any:
        """The view of convert(base), which is an array of any library."""
        array = convert(self.base)[self.index]
        return array if self.swapped is None else array.swapaxes(*self.swapped)


@dataclass(frozen=True)
class Inputs:
    case: Case
    q: tuple[View, ...]  # one packed view, or (latent, rope)
    kv_cache: tuple[View, ...]
    block_table: tuple[View, ...]  # one table, or (page_indices, page_indptr)
    cache_seqlens: View
    cu_seqlens_q: View | None  # when queries are ragged

    def on(self, convert: Callable[[NDArray[Any]], Any]) -> dict[str, Any]:
        """The arguments of mla_decode, with each array made by `convert` from a contiguous NumPy array."""
        q, kv_cache, block_table = (
            [view.on(convert) for view in views] for views in (self.q, self.kv_cache, self.block_table)
        )
        call = {
            "q": tuple(q) if self.case.split_q else q[0],
            "kv_cache": tuple(kv_cache) if self.case.split_cache else kv_cache[0],
            "block_table": tuple(block_table) if self.case.csr else block_table[0],
            "cache_seqlens": self.cache_seqlens.on(convert),
            "softmax_scale": self.case.scale,
            "causal": self.case.causal,
        }
        if self.cu_seqlens_q is not None:
            call["cu_seqlens_q"] = self.cu_seqlens_q.on(convert)
        return call


def as_is(array: NDArray[Any]) -> NDArray[Any]:
    """The `convert` that gives NumPy arguments."""
    return array


def to_torch(array: NDArray[Any]) -> Any:
    """The `convert` that gives torch tensors on the CPU; they share the memory of `array`."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs of a case: normal random numbers in a paged cache, poisoned wherever nothing should be read."""
    rng = np.random.default_rng(seed)
    dtype = NUMPY_DTYPES[case.dtype]
    batch = len(case.lengths)
    dims = (case.latent_dim, ROPE_DIM)

    tokens = (sum(case.queries),) if case.queries else (batch, case.s_q)
    q = rng.standard_normal((*tokens, case.heads, sum(dims)), np.float32).astype(dtype)
    if case.uneven:
        q[..., -1] = 1 - 2 * (np.arange(case.heads) % 2)
    q = (q.astype(np.float32) / case.magnitude).astype(dtype)
    q_views = tuple(_place_q(part, case.strided) for part in _parts(q, case.split_q, dims))

    table, num_pages = _shuffled_table(case, rng)
    cache = np.full((num_pages, case.page_size, sum(dims)), np.nan, dtype)
    for request, length in enumerate(case.lengths):
        for first in range(0, length, case.page_size):
            tokens = min(case.page_size, length - first)
            values = rng.standard_normal((tokens, sum(dims)), np.float32)
            if case.uneven:
                tile = np.arange(first, first + tokens) // 64
                values[:, -1] = np.take(UNEVEN_LEVELS, tile, mode="wrap") * math.log(2) / case.scale
            cache[table[request, first // case.page_size], :tokens] = (values * case.magnitude).astype(dtype)
    if case.cache_heads_dim:
        cache = cache[:, :, None, :]
    cache_views = tuple(_place_cache(part, case.strided) for part in _parts(cache, case.split_cache, dims))

    table_views = _page_list(case, table) if case.csr else (_place_table(table, case.strided),)
    starts = View(_offsets(case.queries)) if case.queries else None
    return Inputs(case, q_views, cache_views, table_views, _place_lengths(case), starts)


@lru_cache(maxsize=2)
def prepared(case: Case) -> tuple[Inputs, NDArray[np.float64], NDArray[np.float64]]:
    """Inputs of a case with its exact out and lse; computed once for the backends that run the case in turn."""
    inputs = make_inputs(case)
    arguments = inputs.on(as_is)
    out, lse = decode_float64(**arguments)
    for array in (out, lse):
        array.flags.writeable = False
    return inputs, out, lse


# ---- Tolerances ----

HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # the largest relative error of rounding one number
# One request: P and the result are both rounded; a result made of few keys may get all of P's half ulp.
REQUEST_ERROR = {dtype: 1.2 * half_ulp for dtype, half_ulp in HALF_ULP.items()}
# A whole case in bf16, as a relative error; in fp16, as a multiple of the error of rounding the exact result.
BFLOAT16_ERROR = 3e-3
FLOAT16_RATIO = 1.5  # sqrt(2) when many keys weigh alike: then rounding P costs as much as rounding the result
FLOAT16_RATIO_ACCURATE = 1.15
LSE_ERROR = 5e-5
LSE_RELATIVE_ERROR = 1e-6


def assert_close(
    case: Case, out: NDArray[Any], lse: NDArray[Any], exact_out: NDArray[np.float64], exact_lse: NDArray[np.float64]
) -> None:
    """Hold a result (NumPy, in the case's dtype and float32) against the exact one."""
    assert out.shape == exact_out.shape and lse.shape == exact_lse.shape
    no_key = np.isneginf(exact_lse)
    assert np.array_equal(np.isneginf(lse), no_key), "lse is -inf exactly where a query sees no key"
    out = out.astype(np.float64)
    assert not out[no_key.swapaxes(-1, -2)].any(), "a query that sees no key gives zeros"
    np.testing.assert_allclose(lse[~no_key], exact_lse[~no_key], atol=LSE_ERROR, rtol=LSE_RELATIVE_ERROR)

    starts = _offsets(case.queries).tolist()
    for request, length in enumerate(case.lengths):
        own = slice(starts[request], starts[request + 1]) if case.queries else request
        error = _norm(out[own] - exact_out[own])
        accepted = REQUEST_ERROR[case.dtype] * _norm(exact_out[own])
        assert error <= accepted, f"request {request} of {length} tokens: error {error}, accepted {accepted}"
    error = _norm(out - exact_out)
    if case.dtype == "bfloat16":
        assert error <= BFLOAT16_ERROR * _norm(exact_out)
    else:
        rounding = _norm(exact_out.astype(np.float16) - exact_out)
        ratio = FLOAT16_RATIO_ACCURATE if case.accurate else FLOAT16_RATIO
        assert error <= ratio * rounding, f"{error / rounding:.3f} times the error of rounding the exact result"


def _norm(x: NDArray[Any]) -> float:
    return float(np.linalg.norm(x))  # NaN compares as too large


# ---- Making arrays ----


def _parts(packed: NDArray[Any], split: bool, dims: tuple[int, int]) -> list[NDArray[Any]]:
    return [packed[..., : dims[0]], packed[..., dims[0] :]] if split else [packed]


def _shuffled_table(case: Case, rng: np.random.Generator) -> tuple[NDArray[np.int32], int]:
    """A block table whose pages are spread over the whole cache at random, and the number of pages of that cache."""
    counts = [-(-length // case.page_size) for length in case.lengths]
    num_pages = sum(counts) + SPARE_PAGES
    order = rng.permutation(num_pages).astype(np.int32)
    table = np.full((len(counts), max(counts) + SPARE_COLUMNS), UNUSED_ENTRY, np.int32)
    taken = 0
    for row, count in zip(table, counts):
        row[:count] = order[taken : taken + count]
        taken += count
    return table, num_pages


def _offsets(counts: tuple[int, ...]) -> NDArray[np.int32]:
    return np.cumsum((0, *counts), dtype=np.int32)


def _page_list(case: Case, table: NDArray[np.int32]) -> tuple[View, View]:
    """The used entries of a table one after the other, with spare ones here and there, and where each row begins."""
    rows = []
    for request, (row, length) in enumerate(zip(table, case.lengths)):
        spare = SPARE_ENTRIES if request % 3 == 2 else 0
        rows.append(row[: -(-length // case.page_size) + spare])
    ends = np.full(SPARE_ENTRIES, UNUSED_ENTRY, np.int32)
    indptr = SPARE_ENTRIES + _offsets(tuple(len(row) for row in rows))
    return View(np.concatenate([ends, *rows, ends])), View(indptr)


def _place_table(table: NDArray[np.int32], strided: bool) -> View:
    """The table as it is, or as the first columns of a wider one."""
    if not strided:
        return View(table)
    wide = np.full((table.shape[0], table.shape[1] + 5), UNUSED_ENTRY, np.int32)
    wide[:, : table.shape[1]] = table
    return View(wide, (slice(None), slice(0, table.shape[1])))


def _place_lengths(case: Case) -> View:
    """The lengths one after the other, or as every third of an array."""
    lengths = np.array(case.lengths, np.int32)
    if not case.strided:
        return View(lengths)
    every_third = np.full(3 * len(lengths), UNUSED_ENTRY, np.int32)
    every_third[::3] = lengths
    return View(every_third, (slice(None, None, 3),))


def _place_q(q: NDArray[Any], strided: bool) -> View:
    """q as it is, or with its first axes swapped in memory and odd gaps between tokens, heads and rows."""
    if not strided:
        return View(np.ascontiguousarray(q))
    swapped = q.swapaxes(0, 1)
    gaps = (1, 0, *(2,) * (q.ndim - 3), 3)
    base = np.full([size + gap for size, gap in zip(swapped.shape, gaps)], np.nan, q.dtype)
    index = tuple(slice(0, size) for size in swapped.shape)
    base[index] = swapped
    return View(base, index, swapped=(0, 1))


def _place_cache(cache: NDArray[Any], strided: bool) -> View:
    """The cache as it is, or with gaps of 16 bytes between tokens and of a token between pages."""
    if not strided:
        return View(np.ascontiguousarray(cache))
    base = np.full((cache.shape[0], cache.shape[1] + 1, *cache.shape[2:-1], cache.shape[-1] + 8), np.nan, cache.dtype)
    index = tuple(slice(0, size) for size in cache.shape)
    base[index] = cache
    return View(base, index)
