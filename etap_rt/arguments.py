"""Validation of mla_decode's arguments.

Whatever the host can see is checked before anything is launched. Checks depend on layouts only, apart from the
alignment of addresses, so a call whose layouts were seen before costs a look-up: the layouts of all arguments
are the key, the `Problem` they amount to is the value.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

from etap_rt.errors import ArgumentError, ArgumentTypeError
from etap_rt.interop import (
    Array,
    Layout,
    describe,
    is_tensor,
    remember,
    tensor_signature,
    tensors_alike,
    to_host,
    writeable,
)
from etap_rt.kernels import DIMS, ELEMENT_TYPES, ElementType
from etap_rt.overlap import overlap, reach, span
from etap_rt.scalars import check_flag
from etap_rt.schedule import GATHERED_PAGE, ROW_TILES, TILE_KEYS

MAX_HEADS = 128
MAX_SCALE = 2e38  # times log2(e) still a float32
ELEMENT_BYTES = 2
CACHE_ALIGNMENT = 16  # bytes; what the copy engine asks of addresses and strides
OUT_ALIGNMENT = 16  # bytes; of the kernel's stores
MAX_STRIDE_BYTES = 1 << 40  # the copy engine's limit
MAX_SPAN = (1 << 31) - 1  # elements from the first token of a page to its last, where threads compute the addresses

_PAIRS = {latent + rope: (latent, rope) for latent, rope in DIMS}


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """All that a launch needs to know except addresses. Strides are in elements.

    Equal layouts give the same object, so it can be the key of what is prepared once a problem. Page lists are the
    exception: their number of entries changes from step to step and is left to the `Call`.
    """

    element: ElementType  # of q, kv_cache and out
    batch: int
    s_q: int  # query tokens of each request, 0 when they are ragged
    total_q: int  # query tokens of all requests
    ragged: bool  # q and the outputs have no batch dim; cu_seqlens_q tells the requests apart
    heads: int
    latent_dim: int
    rope_dim: int
    num_pages: int
    page_size: int
    csr: bool  # pages are listed one request after the other, instead of in a table
    max_pages: int  # columns of block_table, 0 when csr
    device_type: str  # "cuda" or "cpu"
    device: int
    like: Layout  # of q, or of its latent part
    split_q: bool
    split_cache: bool
    q_strides: tuple[int, int, int]  # batch (0 when ragged), query, head; of the latent part
    q_rope_strides: tuple[int, int, int]
    cache_strides: tuple[int, int]  # page, token; of the latent part
    cache_rope_strides: tuple[int, int]
    block_table_stride: int  # between requests, 0 when csr
    cache_seqlens_stride: int
    out_strides: tuple[int, int, int]  # batch (0 when ragged), query, head
    lse_strides: tuple[int, int, int]  # batch (0 when ragged), head, query
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]

    @property
    def general(self) -> bool:
        """Whether it takes the kernel that knows ragged queries, page lists and pages smaller than a tile."""
        return self.ragged or self.csr or self.page_size < TILE_KEYS

    @property
    def typical_rows(self) -> int:
        """Query rows (token * heads + head) of a request, for which row tiles and grid are chosen.

        Of ragged queries the host knows the mean. When that is more than one, some requests may have more than others:
        up to 64, twice the mean still costs less than a second pass over the pages of those.
        """
        if not self.ragged:
            return self.s_q * self.heads
        mean = -(-self.total_q // self.batch) * self.heads
        return mean if self.total_q <= self.batch else max(mean, min(2 * mean, ROW_TILES[-1]))


class LseForm(NamedTuple):
    """How log-sum-exps are written; libraries differ."""

    factor: float  # of the logarithm to base 2
    no_key: float  # what a query that sees no key gets


NATURAL = LseForm(math.log(2), -math.inf)


class Call(NamedTuple):
    """A validated call: its problem, the addresses of the inputs, and the arrays they came from.

    A packed array's rope part begins `latent_dim` elements after its latent part. Without `out` or `lse`, the
    problem's strides are those of a contiguous array still to be made. Addresses of what was not given are 0.
    """

    problem: Problem
    q_latent: int
    q_rope: int
    cache_latent: int
    cache_rope: int
    block_table: int  # of the page list when csr
    cache_seqlens: int
    cu_seqlens_q: int
    page_indptr: int
    page_count: int  # entries of the page list, 0 without one
    q: tuple[Array, ...]  # one packed array, or (latent, rope)
    kv_cache: tuple[Any, ...]  # this, the table and the lengths are Arrays, or tensors on the GPU not yet described
    table: Any  # (b, max_pages), or the page list
    lengths: Any
    starts: Array | None  # cu_seqlens_q
    indptr: Array | None  # page_indptr
    out: Array | None
    lse: Array | None
    lse_form: LseForm


_problems: dict[tuple[Any, ...], Problem] = {}


class Seen(NamedTuple):
    """What is known of calls whose four inputs are tensors on the GPU that look alike, and so do outputs if given."""

    problem: Problem
    reaches: tuple[tuple[int, int], ...]  # of the inputs
    out: Layout | None
    lse: Layout | None


_seen: dict[Any, Seen] = {}  # by what all of them look like: see `_with_outputs`
# The latest of them by q's shape and which outputs are given, with what tells whether others look alike, if they are
# all torch's.
_latest: dict[Any, tuple[Callable[..., bool], Seen]] = {}


def check(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    softmax_scale: float,
    causal: bool,
    out: Any = None,
    lse: Any = None,
    cu_seqlens_q: Any = None,
    lse_form: LseForm = NATURAL,
) -> Call:
    """Validate the arguments of mla_decode, all but the values that may lie on a GPU.

    Raises ArgumentError or ArgumentTypeError for the first argument that is not acceptable.
    """
    check_options(softmax_scale, causal)
    known = None
    if cu_seqlens_q is None:
        known = recognise(q, kv_cache, block_table, cache_seqlens, out, lse)
    if known is not None:
        known_problem, (q_at, cache_at, table_at, lengths_at), out_array, lse_array = known
        latent_bytes = known_problem.latent_dim * ELEMENT_BYTES
        return Call(
            known_problem,
            q_at,
            q_at + latent_bytes,
            cache_at,
            cache_at + latent_bytes,
            table_at,
            lengths_at,
            0,
            0,
            0,
            (Array(known_problem.like, q_at, q),),
            (kv_cache,),
            block_table,
            cache_seqlens,
            None,
            None,
            out_array,
            lse_array,
            lse_form,
        )
    q_arrays = _describe_parts(q, "q")
    cache_arrays = _describe_parts(kv_cache, "kv_cache")
    if isinstance(block_table, (tuple, list)):
        table, indptr = _describe_page_list(block_table)
        page_indptr, page_count = indptr.pointer, table.layout.shape[0] if table.layout.shape else 0
        table_key: Any = _page_list_key(table.layout)
    else:
        table, indptr = describe(block_table, "block_table"), None
        page_indptr = page_count = 0
        table_key = table.layout
    lengths = describe(cache_seqlens, "cache_seqlens")
    starts = None if cu_seqlens_q is None else describe(cu_seqlens_q, "cu_seqlens_q")
    out_array = None if out is None else describe(out, "out")
    lse_array = None if lse is None else describe(lse, "lse")

    q_latent, q_rope = q_arrays[0], q_arrays[-1]
    cache_latent, cache_rope = cache_arrays[0], cache_arrays[-1]
    key = (
        len(q_arrays),  # tells q's rope part from a second cache
        q_latent.layout,
        q_rope.layout,
        cache_latent.layout,
        cache_rope.layout,
        table_key,
        None if indptr is None else indptr.layout,
        lengths.layout,
        None if starts is None else starts.layout,
        None if out_array is None else out_array.layout,
        None if lse_array is None else lse_array.layout,
    )
    problem = _problems.get(key)
    if problem is None:
        q_layouts, cache_layouts = [a.layout for a in q_arrays], [a.layout for a in cache_arrays]
        problem = _check_layouts(q_layouts, cache_layouts, table.layout, *key[6:])
        remember(_problems, key, problem)
    if cu_seqlens_q is None and problem.total_q:
        signature, _ = tensor_signature(q, kv_cache, block_table, cache_seqlens)
        if signature is not None:
            packed = q_latent, cache_latent, table, lengths  # or the signature were None
            reaches = tuple(reach(array.layout) for array in packed)
            layouts = (None if array is None else array.layout for array in (out_array, lse_array))
            remember(_seen, _with_outputs(signature, out_array, lse_array), Seen(problem, reaches, *layouts))

    call = Call(
        problem,
        q_latent.pointer,
        q_rope.pointer if problem.split_q else q_latent.pointer + problem.latent_dim * ELEMENT_BYTES,
        cache_latent.pointer,
        cache_rope.pointer if problem.split_cache else cache_latent.pointer + problem.latent_dim * ELEMENT_BYTES,
        table.pointer,
        lengths.pointer,
        0 if starts is None else starts.pointer,
        page_indptr,
        page_count,
        q_arrays,
        cache_arrays,
        table,
        lengths,
        starts,
        indptr,
        out_array,
        lse_array,
        lse_form,
    )
    if (
        (q_latent.pointer | q_rope.pointer) % ELEMENT_BYTES
        or (cache_latent.pointer | cache_rope.pointer) % CACHE_ALIGNMENT
        or (table.pointer | lengths.pointer | call.cu_seqlens_q | page_indptr) % 4
    ):
        _refuse_alignment(call)
    if out_array is not None and (out_array.pointer % OUT_ALIGNMENT or not writeable(out_array)):
        _refuse_output("out", out_array, OUT_ALIGNMENT)
    if lse_array is not None and (lse_array.pointer % 4 or not writeable(lse_array)):
        _refuse_output("lse", lse_array, 4)
    if out_array is not None or lse_array is not None:
        inputs = *q_arrays, *cache_arrays, table, lengths, *(x for x in (starts, indptr) if x is not None)
        if not _lie_apart([span(array) for array in inputs], out_array, lse_array):
            _refuse_overlaps(call)
    return call


# A problem, the addresses of q, kv_cache, block_table and cache_seqlens, and out and lse as far as they are given.
Recognised: TypeAlias = tuple[Problem, tuple[int, int, int, int], Array | None, Array | None]


def recognise(q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, out: Any, lse: Any) -> Recognised | None:
    """Tensors on the GPU that look like those of an earlier call, which `check` accepted; None for anything else.

    What it finds, `check` would accept as well, after several times as long.
    """
    tensors = q, kv_cache, block_table, cache_seqlens
    if out is not None or lse is not None:
        tensors = *tensors, *(output for output in (out, lse) if output is not None)
    latest = _latest.get((q.shape, out is None, lse is None)) if is_tensor(q) else None
    if latest is not None and latest[0](*tensors):
        seen = latest[1]
        at = q.data_ptr(), kv_cache.data_ptr(), block_table.data_ptr(), cache_seqlens.data_ptr()
        out_array = None if seen.out is None else Array(seen.out, out.data_ptr(), out)
        lse_array = None if seen.lse is None else Array(seen.lse, lse.data_ptr(), lse)
    else:
        signature, at = tensor_signature(q, kv_cache, block_table, cache_seqlens)
        if signature is None:
            return None
        out_array = None if out is None else describe(out, "out")
        lse_array = None if lse is None else describe(lse, "lse")
        found = _seen.get(_with_outputs(signature, out_array, lse_array))
        if found is None:
            return None
        seen = found
        alike = tensors_alike(*tensors)
        if alike is not None:
            remember(_latest, (q.shape, out is None, lse is None), (alike, seen))
    out_at = 0 if out_array is None else out_array.pointer
    lse_at = 0 if lse_array is None else lse_array.pointer
    q_at, cache_at, table_at, lengths_at = at
    if (
        q_at % ELEMENT_BYTES
        or cache_at % CACHE_ALIGNMENT
        or out_at % OUT_ALIGNMENT
        or (table_at | lengths_at | lse_at) % 4
    ):
        return None
    if out is not None or lse is not None:
        taken = [(address + first, address + past) for address, (first, past) in zip(at, seen.reaches)]
        if not _lie_apart(taken, out_array, lse_array):
            return None
    return seen.problem, at, out_array, lse_array


def _with_outputs(signature: Any, out: Array | None, lse: Array | None) -> Any:
    """The key of `_seen`: what inputs look like and, if they are given, outputs."""
    if out is None and lse is None:
        return signature
    return signature, None if out is None else out.layout, None if lse is None else lse.layout


def check_queries(call: Call, q: Any, outputs: Sequence[Array]) -> tuple[tuple[Array, ...], int, int]:
    """Other queries for a validated call: their arrays, and the addresses of the latent and the rope part.

    Raises ArgumentError when they are not laid out as the call's, are of another library or share memory with one of
    `outputs`.
    """
    arrays = _describe_parts(q, "q")
    if len(arrays) != len(call.q):
        raise ArgumentError("q", f"{len(arrays)} arrays", f"{len(call.q)}, as when the call was planned")
    if arrays[0].layout is not call.q[0].layout or arrays[-1].layout is not call.q[-1].layout:
        for array, planned, name in zip(arrays, call.q, _part_names("q", arrays)):
            for field in dataclasses.fields(Layout):
                given, wanted = getattr(array.layout, field.name), getattr(planned.layout, field.name)
                if given != wanted:
                    raise ArgumentError(name, f"{field.name} {given}", f"{wanted}, as when the call was planned")
    latent, rope = arrays[0].pointer, arrays[-1].pointer
    if (latent | rope) % ELEMENT_BYTES:
        _refuse_alignment(call._replace(q=arrays))
    for array, name in zip(arrays, _part_names("q", arrays)):
        if any(overlap(output, array) for output in outputs):
            raise ArgumentError(name, "memory of an output", "memory apart from those of the plan")
    return arrays, latent, rope if call.problem.split_q else rope + call.problem.latent_dim * ELEMENT_BYTES


def check_inputs(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Any = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> None:
    """Check the arguments of `mla_decode`, and the lengths, offsets and table entries as well; for debugging.

    Takes what `mla_decode` takes, computes nothing and returns None. Lengths, offsets and tables that lie on a GPU
    are copied to the host, which waits for the work of their library's current stream.

    Raises ArgumentError or ArgumentTypeError that names the first argument, request or table entry that is wrong.
    """
    check_flag(return_lse, "return_lse")
    call = check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse, cu_seqlens_q)
    check_values(call)
    if call.starts is not None:
        _check_ends(to_host(call.starts).tolist(), call.problem)


def check_values(call: Call) -> None:
    """Check what `check` cannot see; copies lengths, offsets and the table to the host.

    Every length has to fit its pages, every entry in use has to be a page, and offsets must not fall or leave the array
    they point into. Queries may be left over after the last request; nobody computes them.
    """
    problem = call.problem
    if call.starts is not None:
        _check_offsets(to_host(call.starts).tolist(), "cu_seqlens_q", problem.total_q, "query tokens")
    table, indptr = to_host(describe(call.table, "block_table")), None
    if call.indptr is not None:
        indptr = to_host(call.indptr).tolist()
        _check_offsets(indptr, "block_table[1]", call.page_count, "page indices")
    for request, length in enumerate(to_host(describe(call.lengths, "cache_seqlens")).tolist()):
        pages = table[request] if indptr is None else table[indptr[request] : indptr[request + 1]]
        most = len(pages) * problem.page_size
        if not 0 <= length <= most:
            count = "max_pages" if indptr is None else f"{len(pages)} pages"
            raise ArgumentError(f"cache_seqlens[{request}]", str(length), f"0 ... {most} ({count} * page_size)")
        used = pages[: -(-length // problem.page_size)]
        wrong = ((used < 0) | (used >= problem.num_pages)).nonzero()[0]
        if wrong.size:
            first = int(wrong[0])
            entry = f"[{request}, {first}]" if indptr is None else f"[0][{indptr[request] + first}]"
            accepted = f"0 ... {problem.num_pages - 1} (num_pages - 1)"
            raise ArgumentError(f"block_table{entry}", str(used[first]), accepted)


def _check_offsets(offsets: list[int], name: str, size: int, what: str) -> None:
    """Check that offsets into an array of `size` elements do not fall."""
    least = 0
    for index, offset in enumerate(offsets):
        if not least <= offset <= size:
            raise ArgumentError(f"{name}[{index}]", str(offset), f"{least} ... {size} ({what})")
        least = offset


def _check_ends(offsets: list[int], problem: Problem) -> None:
    """Check that the requests have all queries between them."""
    if offsets[0] != 0:
        raise ArgumentError("cu_seqlens_q[0]", str(offsets[0]), "0")
    if offsets[-1] != problem.total_q:
        accepted = f"{problem.total_q} (query tokens)"
        raise ArgumentError(f"cu_seqlens_q[{problem.batch}]", str(offsets[-1]), accepted)


def _describe_parts(x: Any, name: str) -> tuple[Array, ...]:
    if not isinstance(x, (tuple, list)):
        return (describe(x, name),)
    if len(x) != 2:
        raise ArgumentTypeError(name, f"{type(x).__name__} of {len(x)}", "one array or the pair (latent, rope)")
    return (describe(x[0], f"{name}[0]"), describe(x[1], f"{name}[1]"))


def _describe_page_list(x: tuple[Any, ...] | list[Any]) -> tuple[Array, Array]:
    if len(x) != 2:
        accepted = "one array or the pair (page_indices, page_indptr)"
        raise ArgumentTypeError("block_table", f"{type(x).__name__} of {len(x)}", accepted)
    return describe(x[0], "block_table[0]"), describe(x[1], "block_table[1]")


def _page_list_key(indices: Layout) -> tuple[Any, ...]:
    """What a problem depends on of a page list: all but the number of entries."""
    return indices.dtype, indices.device_type, indices.device, indices.strides, indices.shape > (1,)


def check_options(softmax_scale: Any, causal: Any) -> None:
    """Raise unless they are what mla_decode takes."""
    if type(softmax_scale) is not float or not 0.0 < softmax_scale <= MAX_SCALE:
        check_scale(softmax_scale)
    check_flag(causal, "causal")


def check_scale(scale: Any, name: str = "softmax_scale") -> None:
    """Raise unless `scale` is a positive number that stays finite in float32 arithmetic."""
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise ArgumentTypeError(name, repr(scale), "a number of the host")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not 0.0 < value <= MAX_SCALE:
        raise ArgumentError(name, repr(scale), f"a number above 0, at most {MAX_SCALE:g}")


# ---- Layouts: what follows runs once for each combination of layouts ----


def _check_layouts(
    q: list[Layout],
    cache: list[Layout],
    table: Layout,
    indptr: Layout | None,
    lengths: Layout,
    starts: Layout | None,
    out: Layout | None,
    lse: Layout | None,
) -> Problem:
    ragged = starts is not None
    tokens, heads, latent_dim, rope_dim = _check_q(q, ragged)
    num_pages, page_size = _check_cache(cache, latent_dim, rope_dim, like=q[0])
    if starts is None:
        batch, s_q = tokens
        source = f"q has batch {batch}"
    else:
        batch, s_q = _check_starts(starts, tokens[0], like=q[0]), 0
        source = f"cu_seqlens_q has {batch} requests"
    if indptr is None:
        _check_table(table, batch, source, like=q[0])
    else:
        _check_page_list(table, indptr, batch, source, like=q[0])
    _check_type(lengths, "cache_seqlens", "int32", like=q[0])
    if lengths.shape != (batch,):
        raise ArgumentError("cache_seqlens", f"shape {lengths.shape}", f"({batch},); {source}")

    out_shape = (*tokens, heads, latent_dim)
    lse_shape = (heads, *tokens) if ragged else (batch, heads, s_q)
    out_strides: tuple[int, ...] = (s_q * heads * latent_dim, heads * latent_dim, latent_dim)
    lse_strides: tuple[int, ...] = (0, tokens[0], 1) if ragged else (heads * s_q, s_q, 1)
    if out is not None:
        _check_type(out, "out", q[0].dtype, like=q[0])
        _check_output_shape(out, "out", out_shape)
        _check_contiguous(out, "out")
        _check_strides(out, "out", OUT_ALIGNMENT)
        out_strides = _token_strides(out, ragged)
    if lse is not None:
        _check_type(lse, "lse", "float32", like=q[0])
        _check_output_shape(lse, "lse", lse_shape)
        lse_strides = (0, *lse.strides) if ragged else lse.strides

    cache_strides = [_cache_strides(c) for c in cache]
    return Problem(
        element=q[0].dtype,  # type: ignore[arg-type]  # one of ELEMENT_TYPES: _check_q saw to it
        batch=batch,
        s_q=s_q,
        total_q=math.prod(tokens),
        ragged=ragged,
        heads=heads,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        num_pages=num_pages,
        page_size=page_size,
        csr=indptr is not None,
        max_pages=table.shape[1] if indptr is None else 0,
        device_type=q[0].device_type,
        device=q[0].device,
        like=q[0],
        split_q=len(q) == 2,
        split_cache=len(cache) == 2,
        q_strides=_token_strides(q[0], ragged),
        q_rope_strides=_token_strides(q[-1], ragged),
        cache_strides=(cache_strides[0][0], cache_strides[0][1]),
        cache_rope_strides=(cache_strides[-1][0], cache_strides[-1][1]),
        block_table_stride=table.strides[0] if indptr is None else 0,
        cache_seqlens_stride=lengths.strides[0],
        out_strides=_three(out_strides),
        lse_strides=_three(lse_strides),
        out_shape=out_shape,
        lse_shape=lse_shape,
    )


def _check_q(q: list[Layout], ragged: bool) -> tuple[tuple[int, ...], int, int, int]:
    """Check q, return ((batch, s_q) or when ragged (total_q,), heads, latent_dim, rope_dim)."""
    names = _part_names("q", q)
    first = q[0]
    if first.device_type not in ("cuda", "cpu"):
        raise ArgumentError(names[0], f"device {first.device_type}", "cuda or cpu")
    if first.dtype not in ELEMENT_TYPES:
        raise ArgumentError(names[0], f"dtype {first.dtype}", " or ".join(ELEMENT_TYPES))
    for layout, name in zip(q, names):
        _check_type(layout, name, first.dtype, like=first)
        if len(layout.shape) != (3 if ragged else 4):
            batched, flat = "four dims, (batch, s_q, heads, dim)", "three, (total_q, heads, dim), with cu_seqlens_q"
            raise ArgumentError(name, f"shape {layout.shape}", flat if ragged else f"{batched}, or {flat}")
    if len(q) == 2 and q[1].shape[:-1] != first.shape[:-1]:
        raise ArgumentError(names[1], f"shape {q[1].shape}", f"{(*first.shape[:-1], 'rope')}, as q[0]")
    latent_dim, rope_dim = _check_dims([layout.shape[-1] for layout in q], names)
    for layout, name in zip(q, names):
        _check_contiguous(layout, name)
    *tokens, heads = first.shape[:-1]
    if not ragged and tokens[1] < 1:
        raise ArgumentError(names[0], f"shape {first.shape}", "at least one query token (dim 1)")
    if not 1 <= heads <= MAX_HEADS:
        given = f"{heads} heads (dim {len(tokens)} of shape {first.shape})"
        raise ArgumentError(names[0], given, f"1 ... {MAX_HEADS} heads")
    return tuple(tokens), heads, latent_dim, rope_dim


def _check_starts(starts: Layout, total_q: int, like: Layout) -> int:
    """Check cu_seqlens_q, return the number of requests."""
    _check_type(starts, "cu_seqlens_q", "int32", like)
    if len(starts.shape) != 1 or starts.shape[0] < 1:
        raise ArgumentError("cu_seqlens_q", f"shape {starts.shape}", "(b + 1,)")
    if starts.shape[0] == 1 and total_q:
        raise ArgumentError("cu_seqlens_q", f"shape {starts.shape}", f"(b + 1,) with b > 0; q has {total_q} tokens")
    if starts.shape[0] > 1:
        _check_contiguous(starts, "cu_seqlens_q")
    return starts.shape[0] - 1


def _check_table(table: Layout, batch: int, source: str, like: Layout) -> None:
    _check_type(table, "block_table", "int32", like)
    if len(table.shape) != 2 or table.shape[0] != batch:
        raise ArgumentError("block_table", f"shape {table.shape}", f"({batch}, max_pages); {source}")
    if table.shape[1] > 1:
        _check_contiguous(table, "block_table")


def _check_page_list(indices: Layout, indptr: Layout, batch: int, source: str, like: Layout) -> None:
    """Check a block_table in CSR form; nothing of `indices` that `_page_list_key` leaves out may matter."""
    for layout, name in ((indices, "block_table[0]"), (indptr, "block_table[1]")):
        _check_type(layout, name, "int32", like)
        if len(layout.shape) != 1:
            raise ArgumentError(name, f"shape {layout.shape}", "one dim")
        if layout.shape[0] > 1:
            _check_contiguous(layout, name)
    if indptr.shape != (batch + 1,):
        raise ArgumentError("block_table[1]", f"shape {indptr.shape}", f"({batch + 1},); {source}")


def _check_cache(cache: list[Layout], latent_dim: int, rope_dim: int, like: Layout) -> tuple[int, int]:
    """Check kv_cache, return (num_pages, page_size)."""
    names = _part_names("kv_cache", cache)
    dims = (latent_dim, rope_dim) if len(cache) == 2 else (latent_dim + rope_dim,)
    for layout, name, dim in zip(cache, names, dims):
        shape = layout.shape
        _check_type(layout, name, like.dtype, like)
        if not (len(shape) == 3 or len(shape) == 4 and shape[2] == 1) or shape[-1] != dim:
            accepted = f"(num_pages, page_size, {dim}) or (num_pages, page_size, 1, {dim})"
            raise ArgumentError(name, f"shape {shape}", f"{accepted}, with q's dims {latent_dim} + {rope_dim}")
        _check_contiguous(layout, name)
        _check_strides(layout, name, CACHE_ALIGNMENT)
        if not all(0 <= stride * ELEMENT_BYTES < MAX_STRIDE_BYTES for stride in layout.strides[:2]):
            raise ArgumentError(name, f"strides {layout.strides}", f"0 ... {MAX_STRIDE_BYTES} bytes")
    num_pages, page_size = cache[0].shape[:2]
    if cache[-1].shape[:2] != (num_pages, page_size):
        accepted = f"{num_pages} pages of {page_size} tokens, as kv_cache[0]"
        raise ArgumentError("kv_cache[1]", f"shape {cache[1].shape}", accepted)
    if num_pages < 1:
        raise ArgumentError(names[0], f"shape {cache[0].shape}", "at least one page")
    if page_size < 1 or (page_size % TILE_KEYS and TILE_KEYS % page_size):
        accepted = f"a page size (dim 1) that divides {TILE_KEYS} or is a multiple of it"
        raise ArgumentError(names[0], f"shape {cache[0].shape}", accepted)
    if 1 < page_size <= GATHERED_PAGE:
        most = MAX_SPAN // (page_size - 1)
        for layout, name in zip(cache, names):
            if layout.strides[1] > most:
                accepted = f"tokens of a page at most {most} elements apart, with pages of {page_size}"
                raise ArgumentError(name, f"strides {layout.strides}", accepted)
    return num_pages, page_size


def _check_dims(dims: list[int], names: list[str]) -> tuple[int, int]:
    """The (latent, rope) dims of q, given the last dims of its parts."""
    if len(dims) == 1:
        if dims[0] not in _PAIRS:
            raise ArgumentError(names[0], f"last dim {dims[0]}", " or ".join(str(dim) for dim in _PAIRS))
        return _PAIRS[dims[0]]
    for index, name in enumerate(names):
        accepted = [pair for pair in DIMS if pair[: index + 1] == tuple(dims[: index + 1])]
        if not accepted:
            choices = dict.fromkeys(str(pair[index]) for pair in DIMS)
            raise ArgumentError(name, f"last dim {dims[index]}", " or ".join(choices))
    return dims[0], dims[1]


def _check_type(layout: Layout, name: str, dtype: str, like: Layout) -> None:
    """Check the dtype, and that the device is the one of `like`."""
    if layout.dtype != dtype:
        raise ArgumentError(name, f"dtype {layout.dtype}", f"{dtype}, as q" if dtype == like.dtype else dtype)
    if (layout.device_type, layout.device) != (like.device_type, like.device):
        accepted = f"{like.device_type}:{like.device}, where q is"
        raise ArgumentError(name, f"device {layout.device_type}:{layout.device}", accepted)


def _check_contiguous(layout: Layout, name: str) -> None:
    if layout.strides[-1] != 1 and 0 not in layout.shape:  # NumPy gives empty arrays strides of 0
        raise ArgumentError(name, f"stride {layout.strides[-1]} in the last dim", "1 (contiguous)")


def _check_strides(layout: Layout, name: str, alignment: int) -> None:
    """Check that all strides but the last are multiples of `alignment` bytes, where they matter."""
    elements = alignment // ELEMENT_BYTES
    if any(stride % elements for stride, size in zip(layout.strides[:-1], layout.shape) if size > 1):
        accepted = f"multiples of {elements} elements ({alignment} bytes)"
        raise ArgumentError(name, f"strides {layout.strides}", accepted)


def _check_output_shape(layout: Layout, name: str, shape: tuple[int, ...]) -> None:
    """Check the shape of an output, and that no two of its elements share memory."""
    if layout.shape != shape:
        raise ArgumentError(name, f"shape {layout.shape}", str(shape))
    extent = 1
    for stride, size in sorted((abs(stride), size) for stride, size in zip(layout.strides, shape)):
        if size > 1 and stride < extent and 0 not in shape:
            raise ArgumentError(name, f"strides {layout.strides}", "elements that do not overlap")
        extent += stride * (size - 1)


def _part_names(name: str, parts: Sequence[Layout | Array]) -> list[str]:
    return [name] if len(parts) == 1 else [f"{name}[0]", f"{name}[1]"]


def _token_strides(layout: Layout, ragged: bool) -> tuple[int, int, int]:
    """Strides of (batch, query, head) of q or out; requests of ragged ones have none between them."""
    return _three((0, *layout.strides) if ragged else layout.strides)


def _cache_strides(layout: Layout) -> tuple[int, int]:
    """Strides of (page, token). What there is one of gets one that the copy engine accepts, whatever was given."""
    num_pages, page_size = layout.shape[:2]
    token = layout.strides[1] if page_size > 1 else layout.shape[-1]
    return layout.strides[0] if num_pages > 1 else page_size * token, token


def _three(strides: tuple[int, ...]) -> tuple[int, int, int]:
    return strides[0], strides[1], strides[2]


# ---- Addresses ----


def _refuse_alignment(call: Call) -> NoReturn:
    name, array, alignment = next(c for c in _named_inputs(call) if c[1].pointer % c[2])
    raise ArgumentError(name, f"address {array.pointer:#x}", f"a multiple of {alignment} bytes")


def _named_inputs(call: Call) -> list[tuple[str, Array, int]]:
    """The inputs with their names and the alignment that is asked of them."""
    inputs = [(name, array, ELEMENT_BYTES) for name, array in zip(_part_names("q", call.q), call.q)]
    cache_names = _part_names("kv_cache", call.kv_cache)
    inputs += [(name, array, CACHE_ALIGNMENT) for name, array in zip(cache_names, call.kv_cache)]
    table_name = "block_table[0]" if call.problem.csr else "block_table"
    inputs += [(table_name, call.table, 4), ("cache_seqlens", call.lengths, 4)]
    offsets = (("cu_seqlens_q", call.starts), ("block_table[1]", call.indptr))
    return inputs + [(name, array, 4) for name, array in offsets if array is not None]


def _lie_apart(taken: list[tuple[int, int]], out: Array | None, lse: Array | None) -> bool:
    """Whether neither output reaches into the spans that are taken, or into the other; for calls that repeat."""
    for array in (out, lse):
        if array is not None:
            begin, end = span(array)
            for first, past in taken:  # a quarter faster than any() with a generator
                if begin < past and first < end:
                    return False
            taken.append((begin, end))
    return True


def _refuse_overlaps(call: Call) -> None:
    """Raise if an output has elements of another array, between whose rows it may lie: CTAs write while others read."""
    others = [(name, array) for name, array, _ in _named_inputs(call)]
    for output, name in ((call.out, "out"), (call.lse, "lse")):
        if output is not None:
            for other_name, other in others:
                if overlap(output, other):
                    raise ArgumentError(name, f"memory of {other_name}", "memory apart from all other arrays")
            others.append((name, output))


def _refuse_output(name: str, array: Array, alignment: int) -> NoReturn:
    if array.pointer % alignment:
        raise ArgumentError(name, f"address {array.pointer:#x}", f"a multiple of {alignment} bytes")
    raise ArgumentError(name, "a read-only array", "one that can be written")
