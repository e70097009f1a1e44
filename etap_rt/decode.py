"""mla_decode: check the arguments, pick a kernel and a grid, launch."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

from etap_rt import arguments, compiler, driver, interop, reference
from etap_rt.arguments import ELEMENT_BYTES, Call, Problem
from etap_rt.kernels import decode_spec
from etap_rt.schedule import TILE_KEYS, Grid, plan_grid
from etap_rt.workspace import workspace_for

THREADS = 384  # of a CTA: two warpgroups that compute, one that loads
CHUNK_DIMS = 64  # dims that one bulk copy brings, for the keys of a tile
SHARED_BYTES = 232448  # all that a CTA can have: what the kernel does not need otherwise is ring
VECTOR_BYTES = 16
LOG2_E = math.log2(math.e)
# Clock cycles (some 250 us) that a CTA waits for others before it leaves its part of a merge to them.
PATIENCE = 500_000


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    softmax_scale: float,
    causal: bool = True,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of new queries over a paged latent cache (MLA in its absorbed, multi-query form).

    Every query head attends to one shared latent KV head: keys have latent + rope dims, values are the latent
    dims of the same rows. Supported (latent, rope): (512, 64) and (256, 64).

    Args:
        q: (b, s_q, h, latent + rope), or the pair (latent part, rope part); bfloat16 or float16; 1 to 128 heads.
            Last dim contiguous, other strides free.
        kv_cache: (num_pages, page_size, latent + rope), with or without a dim of 1 before the last, or the pair
            (latent part, rope part); dtype of q. Last dim contiguous, strides multiples of 16 bytes; page_size 1, 2,
            4, 8, 16, 32 or a multiple of 64 tokens.
        block_table: (b, max_pages) int32; the pages of each request. Entries past its last page are never read.
        cache_seqlens: (b,) int32; tokens of each request in the cache, the s_q newest included; 0 is legal.
        softmax_scale: factor of the scores. DeepSeek's is (128 + 64) ** -0.5 times its yarn factor.
        causal: query i of s_q sees keys 0 ... seqlen - s_q + i; without it every query sees all keys.
        out: (b, s_q, h, latent) in q's dtype, written in place; made when not given.
        lse: (b, h, s_q) float32, written in place; made when not given.
        return_lse: return (out, lse) instead of out.

    Returns:
        out, or (out, lse): lse is the natural logarithm of the sum of exp(scaled scores). A query that sees no
        key gives zeros and lse = -inf. Outputs are arrays of q's library, on q's device.

    Arrays of torch, CuPy or any DLPack producer on a GPU of compute capability 9.0 come in without a copy; the
    work is ordered on the caller's current stream and nothing synchronizes, so a call can be captured in a CUDA
    graph. Arrays on the CPU (NumPy, torch) are computed there, tile by tile as on the GPU. The same inputs give
    the same bits. Gradients are not recorded.

    Raises:
        ArgumentError, ArgumentTypeError: before anything is launched; the message names the argument.
        UnsupportedError: the GPU or the installation lacks something; the message says what.
        CompileError: NVRTC refused the kernel; carries its log.

    Source: FlashMLA-ETAP, arXiv 2506.01969, section 3 (transposed attention pipeline).
    """
    call = arguments.check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse)
    problem = call.problem
    layout, owner = call.q[0].layout, call.q[0].owner
    if out is None:
        out = interop.empty(layout, owner, problem.out_shape, problem.element)
        call = call._replace(out=interop.describe(out, "out"))
    if lse is None and (return_lse or problem.device_type == "cpu"):
        lse = interop.empty(layout, owner, problem.lse_shape, "float32")
        call = call._replace(lse=interop.describe(lse, "lse"))
    if problem.batch == 0:
        pass
    elif problem.device_type == "cpu":
        reference.decode_tiled(call, softmax_scale, causal)
    else:
        _launch_for(problem).run(call, softmax_scale, causal, interop.current_stream(layout))
    return (out, lse) if return_lse else out


class Params(ctypes.Structure):
    """The kernel's parameter, field by field as in mla_decode.cu; strides are in elements."""

    _fields_ = [
        ("maps", ctypes.c_uint64 * (2 * driver.TENSOR_MAP_BYTES // 8)),
        ("q_latent", ctypes.c_uint64),
        ("q_rope", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("block_table", ctypes.c_uint64),
        ("cache_seqlens", ctypes.c_uint64),
        ("partials", ctypes.c_uint64),
        ("partial_stats", ctypes.c_uint64),
        ("counters", ctypes.c_uint64),
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
        ("batch", ctypes.c_int32),
        ("s_q", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("max_pages", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("page_tiles", ctypes.c_int32),
        ("tile_pages", ctypes.c_int32),
        ("lanes", ctypes.c_int32),
        ("share", ctypes.c_int32),
        ("row_groups", ctypes.c_int32),
        ("passes", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("q_vector_loads", ctypes.c_int32),
        ("patience", ctypes.c_int32),
        ("scale_log2", ctypes.c_float),
        ("padding", ctypes.c_char * 36),  # tensor maps give the kernel's struct an alignment of 64 bytes
    ]


def make_params(problem: Problem, grid: Grid) -> Params:
    """The parameter with everything filled in that depends on the problem and the grid alone."""
    params = Params()
    params.q_strides[:] = problem.q_strides
    params.q_rope_strides[:] = problem.q_rope_strides
    params.out_strides[:] = problem.out_strides
    params.lse_strides[:] = problem.lse_strides
    params.table_stride = problem.block_table_stride
    params.seqlens_stride = problem.cache_seqlens_stride
    params.batch, params.s_q, params.heads = problem.batch, problem.s_q, problem.heads
    params.max_pages = problem.max_pages
    params.page_size = problem.page_size
    params.page_tiles = max(1, problem.page_size // TILE_KEYS)
    params.tile_pages = max(1, TILE_KEYS // problem.page_size)
    params.lanes, params.row_groups, params.passes = grid.lanes, grid.row_groups, grid.passes
    params.by_heads, params.by_page_tiles = divider(params.heads), divider(params.page_tiles)
    params.by_lanes = divider(params.lanes)
    params.share = grid.lanes // (problem.batch * grid.passes)
    params.by_share, params.by_row_groups = divider(max(1, params.share)), divider(params.row_groups)
    params.patience = PATIENCE
    return params


def divider(divisor: int) -> int:
    """The kernel's `Divider`: the number whose product with n, over 2**64, is n // divisor for n below 2**32."""
    return 0 if divisor == 1 else (1 << 64) // divisor + 1


class _Launch:
    """What a problem needs every time, prepared once: the kernel, the grid, the parameter and the tensor maps."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.grid = plan_grid(problem.s_q * problem.heads, driver.sm_count(problem.device))
        spec = decode_spec(problem.element, problem.latent_dim, problem.rope_dim, self.grid.rows)
        self.kernel = compiler.load(spec, problem.device)
        self.params = make_params(problem, self.grid)
        self.maps: dict[tuple[int, int], bytes] = {}
        strides = [*problem.q_strides, *problem.q_rope_strides]
        self.q_vector_strides = all(stride * ELEMENT_BYTES % VECTOR_BYTES == 0 for stride in strides)
        self.lock = threading.Lock()  # over params, from the first field set to the launch that copies them

    def run(self, call: Call, softmax_scale: float, causal: bool, stream: int) -> None:
        workspace = workspace_for(self.problem.device, self.grid.rows, stream, call.q[0])
        params = self.params
        assert call.out is not None
        with self.lock:
            maps = self.maps.get((call.cache_latent, call.cache_rope)) or self._make_maps(call)
            ctypes.memmove(params.maps, maps, len(maps))
            params.q_latent, params.q_rope = call.q_latent, call.q_rope
            params.out = call.out.pointer
            params.lse = call.lse.pointer if call.lse is not None else 0
            params.block_table, params.cache_seqlens = call.block_table, call.cache_seqlens
            params.partials, params.partial_stats = workspace.partials, workspace.partial_stats
            params.counters = workspace.counters
            params.causal = causal
            params.q_vector_loads = self.q_vector_strides and (call.q_latent | call.q_rope) % VECTOR_BYTES == 0
            params.scale_log2 = softmax_scale * LOG2_E
            self.kernel.launch(self.grid.ctas, THREADS, SHARED_BYTES, stream, ctypes.addressof(params))

    def _make_maps(self, call: Call) -> bytes:
        problem = self.problem

        def encode(address: int, dim: int, strides: tuple[int, int]) -> bytes:
            page, token = strides
            return driver.encode_tensor_map(
                problem.element,
                address,
                (dim, problem.page_size, problem.num_pages),
                (token * ELEMENT_BYTES, page * ELEMENT_BYTES),
                (CHUNK_DIMS, min(problem.page_size, TILE_KEYS), 1),
            )

        maps = encode(call.cache_latent, problem.latent_dim, problem.cache_strides)
        maps += encode(call.cache_rope, problem.rope_dim, problem.cache_rope_strides)
        interop.remember(self.maps, (call.cache_latent, call.cache_rope), maps)
        return maps


_launches: dict[Problem, _Launch] = {}


def _launch_for(problem: Problem) -> _Launch:
    launch = _launches.get(problem)
    if launch is None:
        launch = _Launch(problem)
        interop.remember(_launches, problem, launch)
    return launch
