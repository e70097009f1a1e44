"""MLA decode on the CPU, twice: the truth in float64, and the GPU kernel's algorithm tile by tile.

The two share no code, so that a mistake in one does not hide in the other. Only slots of tokens that exist are
read; whatever lies in the cache besides cannot reach a result.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from etap_rt.arguments import Call, LseForm, Problem, check_values
from etap_rt.interop import as_numpy
from etap_rt.kernels import DIMS
from etap_rt.schedule import TILE_KEYS, Grid, Segment, divide, plan_grid

Floats: TypeAlias = NDArray[Any]  # of the element type or float32, as the names say

SM_COUNT = 132  # of an H200; the CPU backend divides the work as that GPU would
# log2 of how far a score may exceed the reference value before that is moved, see mla_decode.cu
MAX_GROWTH = {"bfloat16": np.float32(8), "float16": np.float32(0)}
# For a bfloat16 result partial results are kept in float16, times a power of two of each warp that brings its largest
# element between 2**14 and 2**15.
PARTIAL_TOP = 14

# ---- float64 ----


def decode_float64(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Any = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact result: softmax over each request's keys in float64.

    Takes NumPy arrays of mla_decode's shapes, packed or as pairs (latent, rope), pages as a table or as a list. Returns
    out and lse in mla_decode's shapes, both float64. Queries that see no key give zeros and -inf.
    """
    q_parts = q if isinstance(q, (tuple, list)) else (q,)
    cache_parts = kv_cache if isinstance(kv_cache, (tuple, list)) else (kv_cache,)
    packed = np.concatenate([part.astype(np.float64) for part in q_parts], axis=-1)
    heads, dim = packed.shape[-2:]
    queries = packed.reshape(-1, heads, dim)  # of all requests
    latent_dim = next(latent for latent, rope in DIMS if latent + rope == dim)
    page_size = cache_parts[0].shape[1]
    lengths = cache_seqlens.tolist()
    offsets = range(0, len(queries) + 1, packed.shape[1]) if cu_seqlens_q is None else cu_seqlens_q.tolist()

    out = np.zeros((len(queries), heads, latent_dim))
    lse = np.full((len(queries), heads), -np.inf)
    for request, length in enumerate(lengths):
        pages = _all_pages(block_table, request)[: -(-length // page_size)]
        rows = [part[pages].reshape(len(pages) * page_size, part.shape[-1])[:length] for part in cache_parts]
        keys = np.concatenate([part.astype(np.float64) for part in rows], axis=-1)
        for query in range(offsets[request], offsets[request + 1]):
            visible = max(0, length - offsets[request + 1] + query + 1) if causal else length
            if visible == 0:
                continue
            scores = float(softmax_scale) * (queries[query] @ keys[:visible].T)  # (heads, visible)
            top = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            out[query] = weights @ keys[:visible, :latent_dim] / total
            lse[query] = (top + np.log(total))[:, 0]
    if cu_seqlens_q is not None:
        return out, lse.T
    batch, s_q = packed.shape[:2]
    return out.reshape(batch, s_q, heads, latent_dim), lse.reshape(batch, s_q, heads).swapaxes(1, 2)


def _all_pages(block_table: Any, request: int) -> NDArray[Any]:
    """The pages of a request, from a table or from (page_indices, page_indptr)."""
    if not isinstance(block_table, (tuple, list)):
        return block_table[request]  # type: ignore[no-any-return]
    indices, indptr = block_table
    return indices[indptr[request] : indptr[request + 1]]  # type: ignore[no-any-return]


# ---- the kernel's algorithm ----


@dataclass(frozen=True, slots=True)
class _Unit:
    """One pass over one request, see schedule.py."""

    request: int
    length: int  # keys
    s_q: int  # query tokens
    first_token: int  # of the request within a ragged q, 0 otherwise
    rows: NDArray[np.int64]  # query rows (query * heads + head) of the pass

    def tokens_and_heads(self, heads: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        query, head = np.divmod(self.rows, heads)
        return query + self.first_token, head


@dataclass(frozen=True, slots=True)
class _Partial:
    """What a lane knows about a unit after its segment, for all row tiles of the pass; everything float32."""

    o: Floats  # (row tiles, rows, latent_dim), not yet divided by l
    top: Floats  # (row tiles, rows, 1), the reference value m in the log2 domain; -inf before the first key
    total: Floats  # (row tiles, rows, 1), l: sum of 2^(x - m)


def decode_tiled(call: Call, softmax_scale: float, causal: bool, sm_count: int = SM_COUNT) -> None:
    """Compute a validated call on the CPU as the GPU would, into call.out and, if it is there, call.lse.

    Tile order, precisions, rounding of P, lazy rescaling and the order of merging are the kernel's on a GPU with
    `sm_count` SMs. Raises ArgumentError for lengths, offsets or table entries that point outside of the arrays.
    """
    if call.out is None:
        raise ValueError("decode_tiled writes into call.out, which is None")
    check_values(call)
    problem, out = call.problem, as_numpy(call.out)
    lse = None if call.lse is None else as_numpy(call.lse)
    grid = plan_grid(problem.typical_rows, sm_count)
    units = _units(call, grid)
    # Ragged requests have passes of their own, so each unit counts as a request of one pass. If those are not what the
    # host counted on, the units are not shared out evenly.
    passes = Counter(unit.request for unit in units)
    expected = all(passes[request] == grid.passes for request in range(problem.batch))
    work = divide([unit.length for unit in units], replace(grid, passes=1), may_be_even=expected)
    scale_log2 = np.float32(float(softmax_scale) * math.log2(math.e))
    partials: dict[int, list[_Partial]] = {}
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        for segment in chain.from_iterable(work):
            unit, known = units[segment.request], partials.setdefault(segment.request, [])
            known.append(_compute_segment(call, unit, segment, grid, scale_log2, causal))
            if len(known) <= segment.last_lane - segment.first_lane:
                continue  # lanes that come later share the unit
            if len(known) > 1 and problem.element == "bfloat16":
                known = [replace(partial, o=_in_float16(partial.o)) for partial in known]
            out_rows, lse_rows = _merge(known, call.lse_form)
            del partials[segment.request]
            token, head = unit.tokens_and_heads(problem.heads)
            out[_place(problem, unit, token, head)] = out_rows[: len(unit.rows)]
            if lse is not None:
                place = (head, token) if problem.ragged else (unit.request, head, token)
                lse[place] = lse_rows[: len(unit.rows)]


def _units(call: Call, grid: Grid) -> list[_Unit]:
    """All units, in the order in which they are divided over lanes; a request without queries has none."""
    problem, size = call.problem, grid.row_groups * grid.rows
    starts = None if call.starts is None else as_numpy(call.starts).tolist()
    units = []
    for request, length in enumerate(as_numpy(call.lengths).tolist()):
        first, s_q = 0, problem.s_q
        if starts is not None:
            first, s_q = starts[request], starts[request + 1] - starts[request]
        rows = np.arange(s_q * problem.heads)
        passes = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        units += [_Unit(request, length, s_q, first, own_rows) for own_rows in passes]
    return units


def _place(problem: Problem, unit: _Unit, token: Any, head: Any) -> tuple[Any, ...]:
    """The index of tokens and heads in q and out."""
    return (token, head) if problem.ragged else (unit.request, token, head)


def _compute_segment(
    call: Call, unit: _Unit, segment: Segment, grid: Grid, scale_log2: np.float32, causal: bool
) -> _Partial:
    problem, rows, tile_rows = call.problem, unit.rows, grid.rows
    q = _load_q(call, unit, tile_rows)  # (row tiles, rows, dim)
    first_key = segment.tile_begin * TILE_KEYS
    keys = _load_keys(call, unit.request, first_key, min(segment.tile_end * TILE_KEYS, unit.length))
    element = as_numpy(call.kv_cache[0]).dtype

    # The last key that each row sees; what fills up the last row tile sees what its last row sees.
    query = np.minimum(rows[0] + np.arange(q.shape[0] * tile_rows), rows[-1]) // problem.heads
    last_visible = (unit.length - unit.s_q + query).reshape(q.shape[0], tile_rows, 1) if causal else unit.length - 1

    def accumulate(first_tile: int, step: int) -> _Partial:
        top = np.full((*q.shape[:2], 1), -np.inf, np.float32)
        total = np.zeros_like(top)
        o = np.zeros((*q.shape[:2], problem.latent_dim), np.float32)
        for begin in range(first_tile * TILE_KEYS, len(keys), step * TILE_KEYS):
            tile = keys[begin : begin + TILE_KEYS]
            key_index = first_key + begin + np.arange(len(tile))
            x = scale_log2 * (q @ tile.T)
            x = np.where(key_index <= last_visible, x, np.float32(-np.inf))

            # Lazy: as long as no score of a row tile exceeds its row's reference value by much, O is left alone.
            moved = (x > top + MAX_GROWTH[problem.element]).any(axis=(1, 2), keepdims=True)
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

    return _add([accumulate(0, 2), accumulate(1, 2)]) if grid.own_tiles else accumulate(0, 1)


def _in_float16(o: Floats) -> Floats:
    """What float16 leaves of partial results (row tiles, rows, latent_dim): each warp has a power of two of its own."""
    # Of the blocks of 64 dims each of two warpgroups has every second, each of its four warps 16 dims of them.
    of_warps = o.reshape(*o.shape[:2], -1, 2, 4, 16)
    top = np.fmax.reduce(np.abs(of_warps), axis=(1, 2, 5), keepdims=True, initial=0)
    exponent = np.where(np.isinf(top), 0, np.minimum(PARTIAL_TOP + 1 - np.frexp(top)[1], 126))
    kept = np.ldexp(of_warps, exponent).astype(np.float16)
    return np.ldexp(kept.astype(np.float32), -exponent).reshape(o.shape)


def _add(partials: list[_Partial]) -> _Partial:
    """What partials of different keys come to, added in their order."""
    top = np.maximum.reduce([partial.top for partial in partials])
    o = np.zeros_like(partials[0].o)
    total = np.zeros_like(top)
    for partial in partials:
        weight = np.where(partial.top == -np.inf, np.float32(0), np.exp2(partial.top - top))
        o += weight * partial.o
        total += weight * partial.total
    return _Partial(o, top, total)


def _merge(partials: list[_Partial], lse_form: LseForm) -> tuple[Floats, Floats]:
    """Merge the partials of a unit in the order of their lanes; returns out and lse of its rows, fillers included."""
    whole = _add(partials)
    o, top, total = whole.o, whole.top, whole.total
    out = np.where(total == 0, np.float32(0), o / total)
    lse = np.where(total == 0, np.float32(lse_form.no_key), (top + np.log2(total)) * np.float32(lse_form.factor))
    return out.reshape(-1, out.shape[-1]), lse.reshape(-1)


def _load_q(call: Call, unit: _Unit, tile_rows: int) -> Floats:
    """Query rows of a unit as float32 (row tiles, tile_rows, dim); the last tile is filled up with zeros."""
    place = _place(call.problem, unit, *unit.tokens_and_heads(call.problem.heads))
    q = np.concatenate([as_numpy(part)[place].astype(np.float32) for part in call.q], axis=-1)
    row_tiles = -(-len(q) // tile_rows)
    padded = np.zeros((row_tiles * tile_rows, q.shape[-1]), np.float32)
    padded[: len(q)] = q
    return padded.reshape(row_tiles, tile_rows, -1)


def _load_keys(call: Call, request: int, begin: int, end: int) -> Floats:
    """Tokens [begin, end) of a request as float32 (tokens, latent_dim + rope_dim)."""
    page, slot = np.divmod(np.arange(begin, end), call.problem.page_size)
    table = as_numpy(call.table)
    page = table[request, page] if call.indptr is None else table[as_numpy(call.indptr)[request] + page]
    parts = [as_numpy(part)[page, slot].astype(np.float32) for part in call.kv_cache]
    return np.concatenate([part.reshape(len(page), part.shape[-1]) for part in parts], axis=-1)
