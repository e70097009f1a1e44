"""FlashInfer's MLA decoding: `from etap_rt.compat import flashinfer`, then `flashinfer.mla` as before.

Plans copy no lengths to the host and never wait: the kernel divides its work itself.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from etap_rt import arguments, decode, interop
from etap_rt.arguments import MAX_HEADS, NATURAL, LseForm, Problem, check_scale
from etap_rt.compat import renamed
from etap_rt.errors import ArgumentError, ArgumentTypeError, EtapError, UnsupportedError
from etap_rt.interop import Array
from etap_rt.kernels import DIMS, ELEMENT_TYPES
from etap_rt.scalars import check_flag, integer, shown
from etap_rt.schedule import TILE_KEYS

BASE_2 = LseForm(1.0, -math.inf)
BACKENDS = ("auto", "fa2", "fa3")  # of FlashInfer; all are the same here
MAX_PAGE_SIZE = (1 << 31) - 1  # no cache has more tokens

mla = sys.modules[__name__]  # FlashInfer keeps the wrapper there

_NAMES = {
    "q[0]": "q_nope",
    "q[1]": "q_pe",
    "kv_cache[0]": "ckv_cache",
    "kv_cache[1]": "kpe_cache",
    "block_table[0]": "kv_indices",
    "block_table[1]": "kv_indptr",
    "cache_seqlens": "kv_len_arr",
    "cu_seqlens_q": "qo_indptr",
}


class BatchMLAPagedAttentionWrapper:
    """MLA attention over a paged cache for a batch of requests, as FlashInfer's class of this name.

    Args:
        float_workspace_buffer: tensor on the device to compute on; its memory is not used.
        use_cuda_graph: keep lengths, offsets and pages in the buffers below, into which every plan copies, so that a
            captured `run` follows later plans. Every plan has as many requests as there is room for.
        qo_indptr, kv_indptr: (b + 1,) int32 buffers. kv_indices: int32, for as many pages as a plan may have.
            kv_len_arr: (b,) int32. All on the device; only with use_cuda_graph.
        backend: "auto", "fa2" or "fa3", which make no difference.

    Raises UnsupportedError for the backend "cutlass"; ArgumentError or ArgumentTypeError, with the argument's name, for
    buffers of a wrong type, dtype, rank, size or device.
    """

    def __init__(
        self,
        float_workspace_buffer: Any,
        use_cuda_graph: bool = False,
        qo_indptr: Any = None,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_len_arr: Any = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(backend, str):
            raise ArgumentTypeError("backend", shown(backend), " or ".join(BACKENDS))
        if backend == "cutlass":
            raise UnsupportedError("backend cutlass of FlashInfer", f"one of {', '.join(BACKENDS)}")
        if backend not in BACKENDS:
            raise ArgumentError("backend", repr(backend), " or ".join(BACKENDS))
        check_flag(use_cuda_graph, "use_cuda_graph")
        _check_tensor(float_workspace_buffer, "float_workspace_buffer")
        _check_device(float_workspace_buffer, "float_workspace_buffer")
        self.device = float_workspace_buffer.device
        self._buffers: dict[str, Any] | None = None
        if use_cuda_graph:
            self._buffers = {
                "qo_indptr": qo_indptr,
                "kv_indptr": kv_indptr,
                "kv_indices": kv_indices,
                "kv_len_arr": kv_len_arr,
            }
            for name, buffer in self._buffers.items():
                _check_index(buffer, name)
                if buffer.device != self.device:
                    accepted = f"{self.device}, where float_workspace_buffer is"
                    raise ArgumentError(name, f"device {buffer.device}", accepted)
            _check_sizes(self._buffers)
        self._no_ropes: dict[tuple[str, int, int], _NoRope] = {}
        self._plan: _Plan | None = None
        self._checked: Problem | None = None  # of the last plan

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
        use_profiler: bool = False,
    ) -> None:
        """Say what the following runs are about.

        Args:
            qo_indptr: (b + 1,) int32; request r has the query tokens qo_indptr[r] ... qo_indptr[r + 1] - 1.
            kv_indptr, kv_indices: (b + 1,) and (kv_indptr[b],) or more, int32; request r has the pages
                kv_indices[kv_indptr[r] : kv_indptr[r + 1]].
            kv_len_arr: (b,) int32; tokens of each request in the cache, 0 is legal.
            num_heads: 1 to 128 query heads.
            head_dim_ckv, head_dim_kpe: 512 or 256, and 64 or 0.
            page_size: tokens of a page; a divisor or a multiple of 64.
            causal: the last query of a request sees all its keys, the one before one less, and so on.
            sm_scale: factor of the scores.
            q_data_type, kv_data_type: torch.bfloat16 or torch.float16, both the same.
            use_profiler: not supported.

        The four tensors may be on the host. Without CUDA graphs those that are on the device are used where they are.

        Raises ArgumentError, ArgumentTypeError or UnsupportedError; the message names the argument.
        """
        indices = {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_len_arr": kv_len_arr,
        }
        for name, index in indices.items():
            _check_index(index, name)
            _check_device(index, name)
        _check_sizes(indices)
        num_heads, head_dim_ckv, head_dim_kpe, page_size = _check_dims(num_heads, head_dim_ckv, head_dim_kpe, page_size)
        element = _check_types(q_data_type, kv_data_type)
        check_flag(causal, "causal")
        check_scale(sm_scale, "sm_scale")
        check_flag(use_profiler, "use_profiler")
        if use_profiler:
            raise UnsupportedError("use_profiler: the profiler inside FlashInfer's kernels", "use_profiler=False")

        no_rope = self._zeros(element, page_size, dict(DIMS)[head_dim_ckv]) if head_dim_kpe == 0 else None
        # Read once: every run is given the same arrays.
        on_device = {name: interop.describe(index, name) for name, index in self._keep(indices).items()}
        self._checked = None
        self._plan = _Plan(
            on_device["qo_indptr"],
            (on_device["kv_indices"], on_device["kv_indptr"]),
            on_device["kv_len_arr"],
            float(sm_scale),
            causal,
            no_rope,
            (element, num_heads, head_dim_ckv, page_size),
        )

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        ckv_cache: Any,
        kpe_cache: Any,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        profiler_buffer: Any = None,
        kv_len: Any = None,
        page_table: Any = None,
        return_lse_base_on_e: bool = False,
    ) -> Any:
        """Compute the attention of the queries over the pages of the last plan.

        Args:
            q_nope, q_pe: (total_q, num_heads, head_dim_ckv) and (total_q, num_heads, head_dim_kpe).
            ckv_cache, kpe_cache: (num_pages, page_size, head_dim_ckv) and (num_pages, page_size, head_dim_kpe).
            out: (total_q, num_heads, head_dim_ckv), written in place; made when not given.
            lse: (total_q, num_heads) float32, written in place; made when asked for and not given.
            return_lse: return (out, lse) instead of out.
            profiler_buffer, kv_len, page_table: not used, as by FlashInfer's backends fa2 and fa3.
            return_lse_base_on_e: give lse as a natural logarithm; otherwise it is one to base 2.

        A query that sees no key gives zeros and lse = -inf. With `out` and `lse` given, nothing is allocated.

        Raises what `etap_rt.mla_decode` raises, with FlashInfer's names of the arguments.
        """
        plan = self._plan
        if plan is None:
            raise EtapError("run() of a BatchMLAPagedAttentionWrapper before its first plan()")
        check_flag(return_lse, "return_lse")
        check_flag(return_lse_base_on_e, "return_lse_base_on_e")
        _check_tensor(q_nope, "q_nope", "(total_q, num_heads, head_dim_ckv)", 3)
        by_heads = None  # lse as mla_decode lays it out
        if lse is not None:
            _check_tensor(lse, "lse")
            if lse.shape != q_nope.shape[:2]:
                raise ArgumentError("lse", f"shape {tuple(lse.shape)}", str(tuple(q_nope.shape[:2])))
            by_heads = lse.T
        elif return_lse:
            lse = q_nope.new_empty(q_nope.shape[:2], dtype=sys.modules["torch"].float32)
            by_heads = lse.T
        if plan.no_rope is not None:
            _check_tensor(ckv_cache, "ckv_cache", "(num_pages, page_size, head_dim_ckv)", 3)
            page_size, planned = ckv_cache.shape[1], plan.shape[-1]
            if page_size != planned:  # the rope parts are made for it
                raise ArgumentError("ckv_cache", f"page size {page_size}", f"{planned}, as planned")
            _check_nothing(q_pe, "q_pe")
            _check_nothing(kpe_cache, "kpe_cache")
            q_pe, kpe_cache = plan.no_rope.like(q_nope, ckv_cache)
        try:
            call = arguments.check(
                (q_nope, q_pe),
                (ckv_cache, kpe_cache),
                plan.pages,
                plan.lengths,
                plan.sm_scale,
                plan.causal,
                out,
                by_heads,
                plan.starts,
                NATURAL if return_lse_base_on_e else BASE_2,
            )
            if call.problem is not self._checked:
                _check_planned(call.problem, plan)
                self._checked = call.problem
            out, _ = decode.make_outputs(call, out, by_heads, False)
            decode.run(call, out, by_heads, plan.sm_scale, plan.causal)
        except (ArgumentError, ArgumentTypeError) as error:
            raise renamed(error, _NAMES) from None
        return (out, lse) if return_lse else out

    def _keep(self, indices: dict[str, Any]) -> dict[str, Any]:
        """The indices on the device: in the buffers of a CUDA graph, or where they are."""
        if self._buffers is None:
            return {name: index.to(self.device, non_blocking=True) for name, index in indices.items()}
        for name, index in indices.items():
            size, room = index.shape[0], self._buffers[name].shape[0]
            if size > room or size < room and name != "kv_indices":
                raise ArgumentError(name, f"{size} elements", f"{room}, those of the buffer for CUDA graphs")
        for name, index in indices.items():
            self._buffers[name][: index.shape[0]].copy_(index, non_blocking=True)
        return self._buffers

    def _zeros(self, element: str, page_size: int, rope_dim: int) -> _NoRope:
        """Rope parts of zeros; kept for good, because a captured graph may read them."""
        key = (element, page_size, rope_dim)
        if key not in self._no_ropes:
            torch = sys.modules["torch"]
            page = torch.zeros(page_size, rope_dim, dtype=getattr(torch, element), device=self.device)
            self._no_ropes[key] = _NoRope(page)
        return self._no_ropes[key]


class _NoRope:
    """Zeros in place of the rope parts, for models without them: views of one page of zeros, whatever the shapes."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self._shapes: Any = None
        self._views: tuple[Any, Any] = (None, None)

    def like(self, q_nope: Any, ckv_cache: Any) -> tuple[Any, Any]:
        """Views that go with these arrays as q_pe and kpe_cache."""
        shapes = (q_nope.shape, ckv_cache.shape)
        if shapes != self._shapes:
            q_pe = self._page[0].expand(*q_nope.shape[:2], -1)
            self._views = (q_pe, self._page.expand(ckv_cache.shape[0], -1, -1))
            self._shapes = shapes
        return self._views


class _Plan(NamedTuple):
    starts: Array
    pages: tuple[Array, Array]
    lengths: Array
    sm_scale: float
    causal: bool
    no_rope: _NoRope | None
    shape: tuple[str, int, int, int]  # dtype, heads, head_dim_ckv, page size


def _check_planned(problem: Problem, plan: _Plan) -> None:
    """Check that what is to be run is what was planned."""
    given = (problem.element, problem.heads, problem.latent_dim, problem.page_size)
    names = (("q_nope", "dtype"), ("q_nope", "heads"), ("q_nope", "dim"), ("ckv_cache", "page size"))
    for (name, what), value, planned in zip(names, given, plan.shape):
        if value != planned:
            raise ArgumentError(name, f"{what} {value}", f"{planned}, as planned")


def _check_tensor(x: Any, name: str, shape: str = "", dims: int | None = None) -> None:
    """Check that it is a tensor of so many dims; what else there is to check of it comes later."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(name, type(x).__name__, "a torch tensor")
    if dims is not None and x.ndim != dims:
        raise ArgumentError(name, f"shape {tuple(x.shape)}", shape)


def _check_nothing(x: Any, name: str) -> None:
    """Check that a rope part that nobody reads was not meant to be read."""
    if x is not None:
        _check_tensor(x, name)
        if x.numel():
            raise ArgumentError(name, f"shape {tuple(x.shape)}", "a last dim of 0, or None: head_dim_kpe was 0")


def _check_device(x: Any, name: str) -> None:
    if not (x.is_cuda or x.is_cpu):
        raise ArgumentError(name, f"device {x.device}", "cuda or cpu")


def _check_index(index: Any, name: str) -> None:
    _check_tensor(index, name)
    interop.describe(index, name)  # refuses tensors that are sparse
    if str(index.dtype) != "torch.int32":
        raise ArgumentError(name, f"dtype {index.dtype}", "torch.int32")
    if index.ndim != 1:
        raise ArgumentError(name, f"shape {tuple(index.shape)}", "one dim")


def _check_sizes(indices: dict[str, Any]) -> None:
    """Check that all are about the same number of requests."""
    batch = indices["qo_indptr"].shape[0] - 1
    for name, size in (("qo_indptr", max(1, batch + 1)), ("kv_indptr", batch + 1), ("kv_len_arr", batch)):
        if indices[name].shape[0] != size:
            raise ArgumentError(name, f"{indices[name].shape[0]} elements", f"{size}; qo_indptr has {batch + 1}")


def _check_dims(num_heads: Any, head_dim_ckv: Any, head_dim_kpe: Any, page_size: Any) -> tuple[int, int, int, int]:
    """Check the sizes, return them as integers."""
    heads, ckv = integer(num_heads, "num_heads"), integer(head_dim_ckv, "head_dim_ckv")
    kpe, size = integer(head_dim_kpe, "head_dim_kpe"), integer(page_size, "page_size")
    if not 1 <= heads <= MAX_HEADS:
        raise ArgumentError("num_heads", str(heads), f"1 ... {MAX_HEADS}")
    rope_dims: dict[int, int] = dict(DIMS)
    if ckv not in rope_dims:
        raise ArgumentError("head_dim_ckv", str(ckv), " or ".join(map(str, rope_dims)))
    if kpe not in (rope_dims[ckv], 0):
        raise ArgumentError("head_dim_kpe", str(kpe), f"{rope_dims[ckv]} or 0")
    if not 1 <= size <= MAX_PAGE_SIZE or (size % TILE_KEYS and TILE_KEYS % size):
        raise ArgumentError("page_size", str(size), f"a divisor or a multiple of {TILE_KEYS}, below 2**31")
    return heads, ckv, kpe, size


def _check_types(q_data_type: Any, kv_data_type: Any) -> str:
    """Check both dtypes, return their common name."""
    q_type, kv_type = (str(dtype).removeprefix("torch.") for dtype in (q_data_type, kv_data_type))
    for name, dtype in (("q_data_type", q_type), ("kv_data_type", kv_type)):
        if dtype.startswith("float8"):
            raise UnsupportedError(f"{name} {dtype}", " or ".join(ELEMENT_TYPES))
        if dtype not in ELEMENT_TYPES:
            raise ArgumentError(name, dtype, " or ".join(ELEMENT_TYPES))
    if q_type != kv_type:
        raise ArgumentError("kv_data_type", kv_type, f"{q_type}, as q_data_type")
    return q_type
