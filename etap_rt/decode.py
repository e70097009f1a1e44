"""mla_decode: check the arguments, pick a kernel and a grid, launch."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from typing import Any

from etap_rt import arguments, compiler, driver, interop, reference
from etap_rt.arguments import ELEMENT_BYTES, Call, Problem
from etap_rt.interop import Array
from etap_rt.kernels import decode_spec
from etap_rt.schedule import TILE_KEYS, Grid, plan_grid
from etap_rt.workspace import Workspace, workspace_for

THREADS = 384  # of a CTA: two warpgroups that compute, one that loads and coordinates
CHUNK_DIMS = 64  # dims that one bulk copy brings, for the keys of a tile
SHARED_BYTES = 232448  # all that a CTA can have: what the kernel does not need otherwise is ring
VECTOR_BYTES = 16
# Tokens of a page up to which threads fetch the rows of a tile: the copy engine takes one order a page and chunk.
GATHERED_PAGE = 4
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
    call = arguments.check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse, cu_seqlens_q)
    return DecodePlan(call, *make_outputs(call, out, lse, return_lse), softmax_scale, causal)


class DecodePlan:
    """A call of `mla_decode` with checked arguments, made by `plan_decode`.

    `out` and `lse` are the arrays that it writes; `lse` is None when it was neither given nor asked for.
    """

    __slots__ = ("_call", "_causal", "_launch", "_softmax_scale", "lse", "out")

    def __init__(self, call: Call, out: Any, lse: Any, softmax_scale: float, causal: bool) -> None:
        self._call = call
        self._softmax_scale = softmax_scale
        self._causal = causal
        self._launch: Launch | None = None  # the plan's own: from its first run on the parameter holds all but q
        self.out = out
        self.lse = lse

    def run(self, q: Any) -> Any:
        """Decode queries `q`, laid out as the plan's were (shape, strides, dtype, device); returns `out`.

        The work is ordered on the current stream of q's library. Raises ArgumentError when q is laid out otherwise.
        """
        arrays, latent, rope = arguments.check_queries(self._call, q)
        problem, layout = self._call.problem, arrays[0].layout
        if problem.device_type == "cpu" or problem.total_q == 0:
            call = self._call._replace(q=arrays, q_latent=latent, q_rope=rope)
            run(call, self.out, self.lse, self._softmax_scale, self._causal)
            return self.out
        stream = interop.current_stream(layout)
        sms, launch = driver.stream_sm_count(problem.device, stream), self._launch
        if launch is not None and launch.sms == sms and launch.source == compiler.source_key():
            launch.run_again(arrays[0], latent, rope, stream)
            return self.out
        launch = Launch(problem, sms)
        call = self._call._replace(q=arrays, q_latent=latent, q_rope=rope)
        launch.run(call, *addresses(call, self.out, self.lse), self._softmax_scale, self._causal, stream)
        self._launch = launch  # only now: another thread may be on its way to `run_again`
        return self.out


def make_outputs(call: Call, out: Any, lse: Any, return_lse: bool) -> tuple[Any, Any]:
    """`out` and `lse`, made where they are needed and not given."""
    problem, like = call.problem, call.q[0]
    if out is None:
        out = interop.empty(problem.like, like.owner, problem.out_shape, problem.element)
    if lse is None and return_lse:
        lse = interop.empty(problem.like, like.owner, problem.lse_shape, "float32")
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
    sms = driver.stream_sm_count(problem.device, stream)
    _launch_for(problem, sms).run(call, *addresses(call, out, lse), softmax_scale, causal, stream)


def addresses(call: Call, out: Any, lse: Any) -> tuple[int, int]:
    """Where `out` and `lse`, those of `make_outputs`, are on the GPU; 0 for an lse that nobody wants."""
    layout = call.q[0].layout
    out_address = interop.address(layout, out) if call.out is None else call.out.pointer
    lse_address = 0 if lse is None else interop.address(layout, lse) if call.lse is None else call.lse.pointer
    return out_address, lse_address


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
        ("row_groups", ctypes.c_int32),
        ("passes", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("q_vector_loads", ctypes.c_int32),
        ("patience", ctypes.c_int32),
        ("scale_log2", ctypes.c_float),
        ("lse_factor", ctypes.c_float),
        ("lse_no_key", ctypes.c_float),
        ("trace", ctypes.c_uint64),
    ]


# Neighbours in Params that are set together: a call's addresses, those of q, a workspace's; causal ... lse_no_key.
_ADDRESSES, _ADDRESSES_AT = struct.Struct("10Q"), Params.k_latent.offset
_QUERIES, _QUERIES_AT = struct.Struct("2Q"), Params.q_latent.offset
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
    params.by_heads, params.by_page_tiles = divider(params.heads), divider(params.page_tiles)
    params.by_lanes = divider(params.lanes)
    params.share = grid.lanes // (problem.batch * grid.passes)
    params.by_share, params.by_row_groups = divider(max(1, params.share)), divider(params.row_groups)
    params.by_passes = divider(params.passes)
    return params


def divider(divisor: int) -> int:
    """The kernel's `Divider`: the number whose product with n, over 2**64, is n // divisor for n below 2**32."""
    return 0 if divisor == 1 else (1 << 64) // divisor + 1


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
            general=problem.general,
            trace=trace,
        )
        self.kernel = compiler.load(spec, problem.device)
        self.params = make_params(problem, self.grid)
        self.params_address = ctypes.addressof(self.params)
        self.start = self.kernel.prepare(self.grid.ctas, THREADS, SHARED_BYTES, self.params_address)
        self.maps: dict[tuple[int, int], bytes] = {}
        self.maps_in_place: tuple[int, int] | None = None
        self.workspace_in_place: Workspace | None = None
        strides = [*problem.q_strides, *problem.q_rope_strides]
        self.q_vector_strides = all(stride * ELEMENT_BYTES % VECTOR_BYTES == 0 for stride in strides)
        self.lock = threading.Lock()  # over params, from the first field set to the launch that copies them

    def run(self, call: Call, out: int, lse: int, softmax_scale: float, causal: bool, stream: int) -> None:
        """Launch on `stream`; `out` and `lse` are addresses, 0 for an lse that nobody wants."""
        workspace = workspace_for(self.problem.device, self.grid.rows, stream, call.q[0])
        key = (call.cache_latent, call.cache_rope)
        vector_loads = self.q_vector_strides and (call.q_latent | call.q_rope) % VECTOR_BYTES == 0
        with self.lock:
            if key != self.maps_in_place:
                maps = self.maps.get(key) or self._find_maps(call)
                ctypes.memmove(self.params.maps, maps, len(maps))
                self.maps_in_place = key
            _ADDRESSES.pack_into(
                self.params,
                _ADDRESSES_AT,
                call.cache_latent,
                call.cache_rope,
                call.q_latent,
                call.q_rope,
                out,
                lse,
                call.block_table,
                call.cache_seqlens,
                call.cu_seqlens_q,
                call.page_indptr,
            )
            _OPTIONS.pack_into(
                self.params,
                _OPTIONS_AT,
                causal,
                vector_loads,
                PATIENCE,
                float(softmax_scale) * LOG2_E,
                call.lse_form.factor,
                call.lse_form.no_key,
            )
            if self.problem.csr:
                self.params.max_pages = call.page_count
            self._start(workspace, stream)

    def run_again(self, q: Array, latent: int, rope: int, stream: int) -> None:
        """Launch on `stream` what `run` launched last, with other queries, whose parts have these addresses."""
        workspace = workspace_for(self.problem.device, self.grid.rows, stream, q)
        vector_loads = self.q_vector_strides and (latent | rope) % VECTOR_BYTES == 0
        with self.lock:
            _QUERIES.pack_into(self.params, _QUERIES_AT, latent, rope)
            self.params.q_vector_loads = vector_loads
            self._start(workspace, stream)

    def _start(self, workspace: Workspace, stream: int) -> None:
        if workspace is not self.workspace_in_place:
            scratch = workspace.partials, workspace.partial_stats, workspace.counters
            _WORKSPACE.pack_into(self.params, _WORKSPACE_AT, *scratch)
            self.workspace_in_place = None if workspace.captured else workspace  # a graph's memory goes with the graph
        if workspace.captured:
            self.kernel.launch_early(self.grid.ctas, THREADS, SHARED_BYTES, stream, self.params_address)
        else:
            self.start(stream)

    def _find_maps(self, call: Call) -> bytes:
        maps = tensor_maps(self.problem, call.cache_latent, call.cache_rope)
        interop.remember(self.maps, (call.cache_latent, call.cache_rope), maps)
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
