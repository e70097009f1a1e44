"""MLA decode on the CPU, twice: the truth in float64, and the GPU kernel's algorithm tile by tile.

The two share no code, so that a mistake in one does not hide in the other. Only slots of tokens that exist are
read; whatever lies in the cache besides cannot reach a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from etap_rt.arguments import Call, check_values
from etap_rt.interop import as_numpy
from etap_rt.kernels import DIMS
from etap_rt.schedule import TILE_KEYS, Grid, Segment, divide, plan_grid

Floats: TypeAlias = NDArray[Any]  # of the element type or float32, as the names say

SM_COUNT = 132  # of an H200; the CPU backend divides the work as that GPU would
MAX_GROWTH = np.float32(8)  # log2 of how far a score may exceed the reference value before it is moved

# ---- float64 ----


def decode_float64(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, softmax_scale: float, causal: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact result: softmax over each request's keys in float64.

    Takes NumPy arrays of mla_decode's shapes, packed or as pairs (latent, rope). Returns out (b, s_q, h, latent_dim)
    and lse (b, h, s_q), both float64. Queries that see no key give zeros and -inf.
    """
    q_parts = q if isinstance(q, (tuple, list)) else (q,)
    cache_parts = kv_cache if isinstance(kv_cache, (tuple, list)) else (kv_cache,)
    queries = np.concatenate([part.astype(np.float64) for part in q_parts], axis=-1)
    batch, s_q, heads, dim = queries.shape
    latent_dim = next(latent for latent, rope in DIMS if latent + rope == dim)
    page_size = cache_parts[0].shape[1]

    out = np.zeros((batch, s_q, heads, latent_dim))
    lse = np.full((batch, heads, s_q), -np.inf)
    for request, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[request, : -(-length // page_size)]
        rows = [part[pages].reshape(len(pages) * page_size, part.shape[-1])[:length] for part in cache_parts]
        keys = np.concatenate([part.astype(np.float64) for part in rows], axis=-1)
        for query in range(s_q):
            visible = max(0, length - s_q + query + 1) if causal else length
            if visible == 0:
                continue
            scores = softmax_scale * (queries[request, query] @ keys[:visible].T)  # (heads, visible)
            top = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            out[request, query] = weights @ keys[:visible, :latent_dim] / total
            lse[request, :, query] = (top + np.log(total))[:, 0]
    return out, lse


# ---- the kernel's algorithm ----


@dataclass(frozen=True, slots=True)
class _Partial:
    """What a lane knows about a unit after its segment, for all row tiles of the pass; everything float32."""

    o: Floats  # (row tiles, rows, latent_dim), not yet divided by l
    top: Floats  # (row tiles, rows, 1), the reference value m in the log2 domain; -inf before the first key
    total: Floats  # (row tiles, rows, 1), l: sum of 2^(x - m)


def decode_tiled(call: Call, softmax_scale: float, causal: bool, sm_count: int = SM_COUNT) -> None:
    """Compute a validated call on the CPU as the GPU would, into call.out and, if it is there, call.lse.

    Tile order, precisions, rounding of P, lazy rescaling and the order of merging are the kernel's on a GPU with
    `sm_count` SMs. Raises ArgumentError for lengths or table entries that point outside of the cache.
    """
    if call.out is None:
        raise ValueError("decode_tiled writes into call.out, which is None")
    check_values(call)
    problem, out = call.problem, as_numpy(call.out)
    lse = None if call.lse is None else as_numpy(call.lse)
    lengths = as_numpy(call.lengths).tolist()
    grid = plan_grid(problem.s_q * problem.heads, sm_count)
    scale_log2 = np.float32(softmax_scale * math.log2(math.e))
    partials: dict[tuple[int, int], list[_Partial]] = {}
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        for segment in chain.from_iterable(divide(lengths, grid)):
            unit = partials.setdefault((segment.request, segment.pass_index), [])
            length = lengths[segment.request]
            unit.append(_compute_segment(call, segment, grid, length, scale_log2, causal))
            if len(unit) <= segment.last_lane - segment.first_lane:
                continue  # lanes that come later share the unit
            rows = _pass_rows(call, segment, grid)
            query, head = np.divmod(rows, problem.heads)
            out_rows, lse_rows = _merge(partials.pop((segment.request, segment.pass_index)))
            out[segment.request, query, head] = out_rows[: len(rows)]
            if lse is not None:
                lse[segment.request, head, query] = lse_rows[: len(rows)]


def _compute_segment(
    call: Call, segment: Segment, grid: Grid, length: int, scale_log2: np.float32, causal: bool
) -> _Partial:
    problem = call.problem
    rows = _pass_rows(call, segment, grid)
    q = _load_q(call, segment.request, rows, grid.rows)  # (row tiles, rows, dim)
    first_key = segment.tile_begin * TILE_KEYS
    keys = _load_keys(call, segment.request, first_key, min(segment.tile_end * TILE_KEYS, length))
    element = as_numpy(call.kv_cache[0]).dtype

    # The last key that each row sees; what fills up the last row tile sees what its last row sees.
    query = np.minimum(rows[0] + np.arange(q.shape[0] * grid.rows), rows[-1]) // problem.heads
    last_visible = (length - problem.s_q + query).reshape(q.shape[0], grid.rows, 1) if causal else length - 1

    top = np.full((*q.shape[:2], 1), -np.inf, np.float32)
    total = np.zeros_like(top)
    o = np.zeros((*q.shape[:2], problem.latent_dim), np.float32)
    for begin in range(0, len(keys), TILE_KEYS):
        tile = keys[begin : begin + TILE_KEYS]
        key_index = first_key + begin + np.arange(len(tile))
        x = scale_log2 * (q @ tile.T)
        x = np.where(key_index <= last_visible, x, np.float32(-np.inf))

        # Lazy: as long as no score of a row tile exceeds its row's reference value by much, O is left alone.
        moved = (x > top + MAX_GROWTH).any(axis=(1, 2), keepdims=True)
        if moved.any():
            new_top = np.where(moved, np.maximum(top, x.max(axis=-1, keepdims=True)), top)
            factor = np.where(top == -np.inf, np.float32(0), np.exp2(top - new_top))
            o *= factor
            total *= factor
            top = new_top

        p = np.exp2(x - np.where(top == -np.inf, np.float32(0), top))
        total += p.sum(axis=-1, keepdims=True)
        o += p.astype(element).astype(np.float32) @ tile[:, : problem.latent_dim]
    return _Partial(o, top, total)


def _merge(partials: list[_Partial]) -> tuple[Floats, Floats]:
    """Merge the partials of a unit in the order of their lanes; returns out and lse of its rows, fillers included."""
    top = np.maximum.reduce([partial.top for partial in partials])
    o = np.zeros_like(partials[0].o)
    total = np.zeros_like(top)
    for partial in partials:
        weight = np.where(partial.top == -np.inf, np.float32(0), np.exp2(partial.top - top))
        o += weight * partial.o
        total += weight * partial.total
    out = np.where(total == 0, np.float32(0), o / total)
    lse = np.where(total == 0, np.float32(-np.inf), (top + np.log2(total)) * np.float32(math.log(2)))
    return out.reshape(-1, out.shape[-1]), lse.reshape(-1)


def _pass_rows(call: Call, segment: Segment, grid: Grid) -> NDArray[np.int64]:
    """The query rows (query * heads + head) of a segment's pass."""
    size = grid.row_groups * grid.rows
    begin = segment.pass_index * size
    return np.arange(begin, min(begin + size, call.problem.s_q * call.problem.heads))


def _load_q(call: Call, request: int, rows: NDArray[np.int64], tile_rows: int) -> Floats:
    """Query rows as float32 (row tiles, tile_rows, dim); the last tile is filled up with zeros."""
    query, head = np.divmod(rows, call.problem.heads)
    parts = [as_numpy(part)[request, query, head].astype(np.float32) for part in call.q]
    q = np.concatenate(parts, axis=-1)
    row_tiles = -(-len(rows) // tile_rows)
    padded = np.zeros((row_tiles * tile_rows, q.shape[-1]), np.float32)
    padded[: len(rows)] = q
    return padded.reshape(row_tiles, tile_rows, -1)


def _load_keys(call: Call, request: int, begin: int, end: int) -> Floats:
    """Tokens [begin, end) of a request as float32 (tokens, latent_dim + rope_dim)."""
    page, slot = np.divmod(np.arange(begin, end), call.problem.page_size)
    page = as_numpy(call.table)[request, page]
    parts = [as_numpy(part)[page, slot].astype(np.float32) for part in call.kv_cache]
    return np.concatenate([part.reshape(len(page), part.shape[-1]) for part in parts], axis=-1)
