"""mla_decode: check the arguments, pick a kernel and a grid, launch."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Hashable
from typing import Any

from etap_rt import arguments, compiler, driver, interop, reference
from etap_rt.arguments import ELEMENT_BYTES, NATURAL, Call, LseForm, Problem, Recognised
from etap_rt.interop import Array, Layout
from etap_rt.kernels import decode_spec
from etap_rt.overlap import reach, span
from etap_rt.scalars import check_flag
from etap_rt.schedule import GATHERED_PAGE, TILE_KEYS, Grid, even_lanes, even_slack, even_up_to, plan_grid
from etap_rt.workspace import workspace_for

THREADS = 384  # of a CTA: two warpgroups that compute, one that loads and coordinates
CHUNK_DIMS = 64  # dims that one bulk copy brings, for the keys of a tile
SHARED_BYTES = 232448  # all that a CTA can have: what the kernel does not need otherwise is ring
VECTOR_BYTES = 16
LOG2_E = math.log2(math.e)
# Clock cycles (some 250 us) that a CTA waits for others before it leaves its part of a merge to them.
PATIENCE = 500_000
MOST_TOKENS = (1 << 31) - 1  # of a request: lengths are int32


def mla_decode(
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
) -> Any:
    """Attention of new queries over a paged latent cache (MLA in its absorbed, multi-query form).

    Every query head attends to one shared latent KV head: keys have latent + rope dims, values are the latent
    dims of the same rows. Supported (latent, rope): (512, 64) and (256, 64).

    Args:
        q: (b, s_q, h, latent + rope), or the pair (latent part, rope part); bfloat16 or float16; 1 to 128 heads.
            Last dim contiguous, other strides free. With cu_seqlens_q (total_q, h, ...): the queries of all requests,
            one request after the other.
        kv_cache: (num_pages, page_size, latent + rope), with or without a dim of 1 before the last, or the pair
            (latent part, rope part); dtype of q. Last dim contiguous, strides multiples of 16 bytes; page_size 1, 2,
            4, 8, 16, 32 or a multiple of 64 tokens.
        block_table: (b, max_pages) int32; the pages of each request. Entries past its last page are never read. Or the
            pair (page_indices (n,), page_indptr (b + 1,)), both int32 and contiguous: request r has the pages
            page_indices[page_indptr[r] : page_indptr[r + 1]].
        cache_seqlens: (b,) int32; tokens of each request in the cache, its newest ones included, whose queries these
            are; 0 is legal.
        softmax_scale: factor of the scores. DeepSeek's is (128 + 64) ** -0.5 times its yarn factor.
        causal: query i of s_q sees keys 0 ... seqlen - s_q + i; without it every query sees all keys.
        cu_seqlens_q: (b + 1,) int32, contiguous; where each request's queries begin in q (total_q, ...), and where the
            last one's end. Requests may have different numbers of queries, none included. Outputs of queries that
            belong to no request are left as they are.
        out: (b, s_q, h, latent), or (total_q, h, latent), in q's dtype, written in place; made when not given. Neither
            out nor lse may overlap the other arrays.
        lse: (b, h, s_q), or (h, total_q), float32, written in place; made when not given.
        return_lse: return (out, lse) instead of out.

    Returns:
        out, or (out, lse): lse is the natural logarithm of the sum of exp(scaled scores). A query that sees no
        key gives zeros and lse = -inf. Outputs are arrays of q's library, on q's device; of CuPy, or on the CPU NumPy,
        when q comes by DLPack from yet another library.

    Arrays of torch, CuPy or any DLPack producer on a GPU of compute capability 9.0 come in without a copy; the
    work is ordered on the caller's current stream and nothing synchronizes, so a call can be captured in a CUDA
    graph, and replayed after the contents of its arrays, lengths and offsets included, changed in place. Arrays on
    the CPU (NumPy, torch) are computed there, tile by tile as on the GPU. The same inputs give the same bits.
    Gradients are not recorded.

    Raises:
        ArgumentError, ArgumentTypeError: before anything is launched; the message names the argument.
        UnsupportedError: the GPU or the installation lacks something; the message says what.
        CompileError: NVRTC refused the kernel; carries its log.

    Source: FlashMLA-ETAP, arXiv 2506.01969, section 3 (transposed attention pipeline).
    """
    check_flag(return_lse, "return_lse")
    arguments.check_options(softmax_scale, causal)
    known = None
    if cu_seqlens_q is None:
        known = arguments.recognise(q, kv_cache, block_table, cache_seqlens, out, lse)
    if known is not None:
        out, lse = run_recognised(known, q, out, lse, return_lse, softmax_scale, causal)
    else:
        call = arguments.check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse, cu_seqlens_q)
        out, lse = make_outputs(call, out, lse, return_lse)
        run(call, out, lse, softmax_scale, causal)
    return (out, lse) if return_lse else out


def plan_decode(
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
) -> DecodePlan:
    """Check the arguments of `mla_decode` once, to run the call many times; computes nothing yet.

    Takes what `mla_decode` takes and raises what it raises. The plan keeps the arrays: their contents may change
    between runs, lengths, offsets and tables included; of q it needs the layout. Outputs that are not given are made
    here and written by every run.
    """
    check_flag(return_lse, "return_lse")
    call = arguments.check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse, cu_seqlens_q)
    return DecodePlan(call, *make_outputs(call, out, lse, return_lse), softmax_scale, causal)


class DecodePlan:
    """A call of `mla_decode` with checked arguments, made by `plan_decode`.

    `out` and `lse` are the arrays that it writes; `lse` is None when it was neither given nor asked for.
    """

    __slots__ = ("_accepted", "_call", "_causal", "_launch", "_look", "_outputs", "_reach", "_scale", "lse", "out")

    def __init__(self, call: Call, out: Any, lse: Any, softmax_scale: float, causal: bool) -> None:
        self._call = call
        self._scale = softmax_scale
        self._causal = causal
        self._look = None if call.problem.split_q else interop.tensor_look(call.q[0])
        self._accepted = 0  # the latest address that `_accept` did
        self._launch: Launch | None = None  # the plan's own: the parameter holds all but q and the workspace
        self._reach = reach(call.q[0].layout)  # of packed queries
        outputs = [interop.describe(array, name) for name, array in (("out", out), ("lse", lse)) if array is not None]
        self._outputs = [(*span(array), array) for array in outputs]
        self.out = out
        self.lse = lse

    def run(self, q: Any) -> Any:
        """Decode queries `q`, of the plan's library, shape, strides, dtype and device; returns `out`.

        The work is ordered on the current stream of q's library. Raises ArgumentError when q is laid out otherwise, or
        shares memory with `out` or `lse`.
        """
        call = self._call
        problem = call.problem
        latent = 0 if self._look is None else self._look.address(q)
        rope = latent + problem.latent_dim * ELEMENT_BYTES
        if latent == 0 or not (latent == self._accepted or self._accept(latent)):
            arrays, latent, rope = arguments.check_queries(call, q, [output for *_, output in self._outputs])
            if problem.device_type == "cpu" or problem.total_q == 0:
                call = call._replace(q=arrays, q_latent=latent, q_rope=rope)
                run(call, self.out, self.lse, self._scale, self._causal)
                return self.out
        stream = interop.current_stream(problem.like)
        identity, capture, sms = driver.stream_state(problem.device, stream)
        launch = self._launch
        if launch is None or launch.sms != sms or launch.source != compiler.source_key():
            launch = Launch(problem, sms)
            places = _places(call, *_output_places(call, self.out, self.lse))
            launch.fill(places, self._scale, self._causal, call.lse_form, call.page_count)
            self._launch = launch  # only now: other threads may be about to launch it
        with launch.lock:
            launch.replace_queries(latent, rope)
            launch.start(stream, identity, capture, call.q[0].owner)
        return self.out

    def _accept(self, latent: int) -> bool:
        """Accept packed queries of the planned look at this address, if they need no closer look; whether they were.

        One is needed where they lie among the outputs, perhaps between the rows of one.
        """
        first, past = self._reach
        apart = all(latent + past <= begin or end <= latent + first for begin, end, _ in self._outputs)
        if not apart or latent % ELEMENT_BYTES:
            return False
        self._accepted = latent
        return True


def make_outputs(call: Call, out: Any, lse: Any, return_lse: bool) -> tuple[Any, Any]:
    """`out` and `lse`, made where they are needed and not given."""
    return _make_outputs(call.problem, call.q[0].owner, out, lse, return_lse)


def _make_outputs(problem: Problem, q: Any, out: Any, lse: Any, return_lse: bool) -> tuple[Any, Any]:
    if out is None:
        out = interop.empty(problem.like, q, problem.out_shape, problem.element)
    if lse is None and return_lse:
        lse = interop.empty(problem.like, q, problem.lse_shape, "float32")
    return out, lse


def run_recognised(
    known: Recognised,
    q: Any,
    out: Any,
    lse: Any,
    return_lse: bool,
    softmax_scale: float,
    causal: bool,
    lse_form: LseForm = NATURAL,
) -> tuple[Any, Any]:
    """`check`, `make_outputs` and `run` in one for what `recognise` found, without a `Call`; returns the outputs."""
    problem, (q_at, cache_at, table, lengths), given_out, given_lse = known
    out, lse = _make_outputs(problem, q, out, lse, return_lse)
    like, rope = problem.like, problem.latent_dim * ELEMENT_BYTES
    out_at, lse_at = _place(like, out, given_out), _place(like, lse, given_lse)
    places = (cache_at, cache_at + rope, q_at, q_at + rope, out_at, lse_at, table, lengths, 0, 0)
    stream = interop.current_stream(like)
    identity, capture, sms = driver.stream_state(problem.device, stream)
    launch = _launch_for(problem, sms)
    with launch.lock:
        launch.fill(places, softmax_scale, causal, lse_form)
        launch.start(stream, identity, capture, q)
    return out, lse


def run(call: Call, out: Any, lse: Any, softmax_scale: float, causal: bool) -> None:
    """Compute a validated call into `out` and, if there is one, `lse`, which are those of `make_outputs`."""
    problem, layout = call.problem, call.q[0].layout
    if problem.total_q == 0:
        return
    if problem.device_type == "cpu":
        if lse is None:
            lse = interop.empty(layout, call.q[0].owner, problem.lse_shape, "float32")
        call = call._replace(out=interop.describe(out, "out"), lse=interop.describe(lse, "lse"))
        reference.decode_tiled(call, softmax_scale, causal)
        return
    stream = interop.current_stream(layout)
    identity, capture, sms = driver.stream_state(problem.device, stream)
    launch = _launch_for(problem, sms)
    launch.run(call, *_output_places(call, out, lse), softmax_scale, causal, stream, identity, capture)


def _places(call: Call, out: int, lse: int) -> tuple[int, ...]:
    """Addresses of a call's arrays in the order of Params; `out` and `lse` are such already."""
    inputs = call.block_table, call.cache_seqlens, call.cu_seqlens_q, call.page_indptr
    return call.cache_latent, call.cache_rope, call.q_latent, call.q_rope, out, lse, *inputs


def _output_places(call: Call, out: Any, lse: Any) -> tuple[int, int]:
    """Addresses of `out` and `lse`, which are those of `make_outputs`."""
    like = call.problem.like
    return _place(like, out, call.out), _place(like, lse, call.lse)


def _place(like: Layout, output: Any, given: Array | None) -> int:
    """The address of an output, 0 for an lse that nobody wants."""
    if output is None:
        return 0
    return interop.address(like, output) if given is None else given.pointer


class Params(ctypes.Structure):
    """The kernel's parameter, field by field as in mla_decode.cu; strides are in elements."""

    _fields_ = [
        ("maps", ctypes.c_uint64 * (2 * driver.TENSOR_MAP_BYTES // 8)),
        ("k_latent", ctypes.c_uint64),
        ("k_rope", ctypes.c_uint64),
        ("q_latent", ctypes.c_uint64),
        ("q_rope", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("block_table", ctypes.c_uint64),
        ("cache_seqlens", ctypes.c_uint64),
        ("cu_seqlens_q", ctypes.c_uint64),
        ("page_indptr", ctypes.c_uint64),
        ("partials", ctypes.c_uint64),
        ("partial_stats", ctypes.c_uint64),
        ("counters", ctypes.c_uint64),
        ("k_strides", ctypes.c_int64 * 2),
        ("k_rope_strides", ctypes.c_int64 * 2),
        ("q_strides", ctypes.c_int64 * 3),
        ("q_rope_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 3),
        ("lse_strides", ctypes.c_int64 * 3),
        ("table_stride", ctypes.c_int64),
        ("seqlens_stride", ctypes.c_int64),
        ("by_heads", ctypes.c_uint64),
        ("by_page_tiles", ctypes.c_uint64),
        ("by_lanes", ctypes.c_uint64),
        ("by_share", ctypes.c_uint64),
        ("by_row_groups", ctypes.c_uint64),
        ("by_passes", ctypes.c_uint64),
        ("batch", ctypes.c_int32),
        ("s_q", ctypes.c_int32),
        ("total_q", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("max_pages", ctypes.c_int32),
        ("table_capacity", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("page_tiles", ctypes.c_int32),
        ("tile_pages", ctypes.c_int32),
        ("gather", ctypes.c_int32),
        ("lanes", ctypes.c_int32),
        ("share", ctypes.c_int32),
        ("stack", ctypes.c_int32),
        ("even_lanes", ctypes.c_int32),
        ("spare_lanes", ctypes.c_uint32),
        ("even_slack", ctypes.c_int32),
        ("row_groups", ctypes.c_int32),
        ("passes", ctypes.c_int32),
        ("chunks_ahead", ctypes.c_int32),
        ("head_start_tiles", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("q_vector_loads", ctypes.c_int32),
        ("patience", ctypes.c_int32),
        ("scale_log2", ctypes.c_float),
        ("lse_factor", ctypes.c_float),
        ("lse_no_key", ctypes.c_float),
        ("trace", ctypes.c_uint64),
        # The tensor maps align the kernel's struct to 64 bytes, and the driver copies all of it.
        ("padding", ctypes.c_char * 40),
    ]


# Neighbours in Params that are set together: a call's addresses, a workspace's; causal ... lse_no_key.
_ADDRESSES, _ADDRESSES_AT = struct.Struct("10Q"), Params.k_latent.offset
_WORKSPACE, _WORKSPACE_AT = struct.Struct("3Q"), Params.partials.offset
_OPTIONS, _OPTIONS_AT = struct.Struct("iiifff"), Params.causal.offset


def make_params(problem: Problem, grid: Grid) -> Params:
    """The parameter with everything filled in that depends on the problem and the grid alone."""
    params = Params()
    params.k_strides[:] = problem.cache_strides
    params.k_rope_strides[:] = problem.cache_rope_strides
    params.q_strides[:] = problem.q_strides
    params.q_rope_strides[:] = problem.q_rope_strides
    params.out_strides[:] = problem.out_strides
    params.lse_strides[:] = problem.lse_strides
    params.table_stride = problem.block_table_stride
    params.seqlens_stride = problem.cache_seqlens_stride
    params.batch, params.s_q, params.heads = problem.batch, problem.s_q, problem.heads
    params.total_q = problem.total_q
    params.max_pages = problem.max_pages
    params.table_capacity = min(problem.max_pages * problem.page_size, MOST_TOKENS)
    params.page_size = problem.page_size
    params.page_tiles = max(1, problem.page_size // TILE_KEYS)
    params.tile_pages = max(1, TILE_KEYS // problem.page_size)
    params.gather = problem.page_size.bit_length() if problem.page_size <= GATHERED_PAGE else 0
    params.lanes, params.row_groups, params.passes = grid.lanes, grid.row_groups, grid.passes
    params.chunks_ahead = grid.chunks_ahead
    params.by_heads, params.by_page_tiles = divider(params.heads), divider(params.page_tiles)
    params.by_lanes = divider(params.lanes)
    units = problem.batch * grid.passes
    params.share, params.stack = grid.lanes // units, -(-units // grid.lanes)
    params.head_start_tiles = even_up_to(units, grid)
    params.even_lanes = even_lanes(units, grid)
    params.even_slack = even_slack(units, grid)
    params.spare_lanes = ((grid.lanes - params.even_lanes) << 32) // grid.lanes
    params.by_share, params.by_row_groups = divider(max(1, params.share)), divider(params.row_groups)
    params.by_passes = divider(params.passes)
    return params


def divider(divisor: int) -> int:
    """The kernel's `Divider`, multiplier in the low half, shift in the high: exact for n from 0 to 2**31 - 1."""
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return shift << 32 | multiplier


class Launch:
    """What a problem needs every time on `sms` SMs, prepared once: kernel, grid, parameter and tensor maps."""

    def __init__(self, problem: Problem, sms: int, trace: bool = False) -> None:
        self.problem = problem
        self.sms = sms
        self.source = compiler.source_key()
        self.grid = plan_grid(problem.typical_rows, sms)
        spec = decode_spec(
            problem.element,
            problem.latent_dim,
            problem.rope_dim,
            self.grid.rows,
            own_tiles=self.grid.own_tiles,
            general=problem.general,
            trace=trace,
        )
        self.kernel = compiler.load(spec, problem.device)
        self.params = make_params(problem, self.grid)
        self.params_address = ctypes.addressof(self.params)
        self.launch_on = self.kernel.prepare(self.grid.ctas, THREADS, SHARED_BYTES, self.params_address, early=True)
        self.maps: dict[tuple[int, ...], bytes] = {}
        # What the parameter holds of the latest call: to compare takes less time than to set.
        self.maps_in_place: tuple[int, ...] | None = None
        self.places_in_place: tuple[int, ...] | None = None
        self.queries_in_place: tuple[int, int] | None = None
        self.options_in_place: tuple[float, bool, LseForm, int] | None = None
        self.workspace_of: Hashable = None  # the identity of the stream whose workspace it is
        strides = [*problem.q_strides, *problem.q_rope_strides]
        self.q_vector_strides = all(stride * ELEMENT_BYTES % VECTOR_BYTES == 0 for stride in strides)
        self.lock = threading.Lock()  # over params, from the first field set to the launch that copies them

    def run(
        self,
        call: Call,
        out: int,
        lse: int,
        softmax_scale: float,
        causal: bool,
        stream: int,
        identity: Hashable,
        capture: int,
    ) -> None:
        """Launch a call on `stream`, of which `driver.stream_state` says this; `out` and `lse` are addresses."""
        with self.lock:
            self.fill(_places(call, out, lse), softmax_scale, causal, call.lse_form, call.page_count)
            self.start(stream, identity, capture, call.q[0].owner)

    def fill(
        self,
        places: tuple[int, ...],
        softmax_scale: float,
        causal: bool,
        lse_form: LseForm = NATURAL,
        page_count: int = 0,
    ) -> None:
        """Set what a call adds to its problem, with the lock held or before others know of the launch.

        `places` are those of `_places`.
        """
        params = self.params
        if places != self.places_in_place:
            pages = places[:2]
            if pages != self.maps_in_place:
                maps = self.maps.get(pages) or self._find_maps(pages)
                ctypes.memmove(params.maps, maps, len(maps))
                self.maps_in_place = pages
            _ADDRESSES.pack_into(params, _ADDRESSES_AT, *places)
            self._note_queries(places[2], places[3])
            self.places_in_place = places
        scale = float(softmax_scale)
        options = scale, causal, lse_form, PATIENCE
        if options != self.options_in_place:
            _OPTIONS.pack_into(params, _OPTIONS_AT, causal, params.q_vector_loads, PATIENCE, scale * LOG2_E, *lse_form)
            self.options_in_place = options
        if self.problem.csr:
            params.max_pages = page_count

    def replace_queries(self, latent: int, rope: int) -> None:
        """Set where the queries are, with the lock held."""
        if (latent, rope) != self.queries_in_place:
            self.params.q_latent, self.params.q_rope = latent, rope
            self._note_queries(latent, rope)
            self.places_in_place = None

    def start(self, stream: int, identity: Hashable, capture: int, owner: Any) -> None:
        """Launch on `stream`, of which `driver.stream_state` says this, with the lock held.

        `owner` is an array of the caller's library on the device.
        """
        if capture or identity != self.workspace_of:
            workspace = workspace_for(self.problem.like, owner, self.grid.rows, identity, capture)
            scratch = workspace.partials, workspace.partial_stats, workspace.counters
            _WORKSPACE.pack_into(self.params, _WORKSPACE_AT, *scratch)
            self.workspace_of = None if capture else identity  # a graph's memory goes with the graph
        self.launch_on(stream)

    def _note_queries(self, latent: int, rope: int) -> None:
        self.params.q_vector_loads = self.q_vector_strides and (latent | rope) % VECTOR_BYTES == 0
        self.queries_in_place = latent, rope

    def _find_maps(self, pages: tuple[int, ...]) -> bytes:
        maps = tensor_maps(self.problem, *pages)
        interop.remember(self.maps, pages, maps)
        return maps


_maps: dict[tuple[Any, ...], bytes] = {}


def tensor_maps(problem: Problem, latent: int, rope: int) -> bytes:
    """The tensor maps of a cache whose parts are at these addresses; the same whatever the batch."""
    latent_strides, rope_strides = problem.cache_strides, problem.cache_rope_strides
    sizes = (problem.element, problem.latent_dim, problem.rope_dim, problem.page_size, problem.num_pages)
    key = (*sizes, latent_strides, rope_strides, latent, rope)

    def encode(address: int, dim: int, strides: tuple[int, int]) -> bytes:
        page, token = strides
        return driver.encode_tensor_map(
            problem.element,
            address,
            (dim, problem.page_size, problem.num_pages),
            (token * ELEMENT_BYTES, page * ELEMENT_BYTES),
            (CHUNK_DIMS, min(problem.page_size, TILE_KEYS), 1),
        )

    maps = _maps.get(key)
    if maps is None:
        maps = encode(latent, problem.latent_dim, latent_strides) + encode(rope, problem.rope_dim, rope_strides)
        interop.remember(_maps, key, maps)
    return maps


_launches: dict[tuple[Problem, int, object], Launch] = {}


def _launch_for(problem: Problem, sms: int) -> Launch:
    key = (problem, sms, compiler.source_key())
    launch = _launches.get(key)
    if launch is None:
        launch = Launch(problem, sms)
        interop.remember(_launches, key, launch)
    return launch
