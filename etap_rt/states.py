"""merge_states: attention over two parts of a context, combined into attention over both."""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from etap_rt import compiler, interop
from etap_rt.errors import ArgumentError
from etap_rt.interop import Array, Layout, as_numpy, describe, remember
from etap_rt.kernels import STATE_TYPES, KernelSpec, merge_states_spec
from etap_rt.overlap import identical, overlap, span

_Floats: TypeAlias = NDArray[Any]  # of a state's dtype or float32

VECTOR_BYTES = 16  # of one access of the kernel
THREADS = 256  # of a CTA, a warp for each row: as in merge_states.cu
ROWS_OF_A_CTA = THREADS // 32
MAX_ROWS = (1 << 31) - 1


def merge_states(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, out: Any = None, lse: Any = None
) -> tuple[Any, Any]:
    """Combine the attention of the same queries over two parts of a context, such as a prefix and the rest.

    The parts share no key. Merging is associative and the order of parts does not matter, up to rounding, so that
    any number of them can be merged one by one.

    Args:
        out_a, out_b: attention over each part, (b, s_q, h, d), or (total_q, h, d) with ragged queries: as mla_decode
            returns it. bfloat16, float16 or float32, both alike. Last dim contiguous and a multiple of 16 bytes, other
            strides and the address multiples of 16 bytes.
        lse_a, lse_b: natural logarithm of the sum of exp(scaled scores) over each part, (b, h, s_q) or (h, total_q)
            float32, any strides; -inf for a part without a key that the query sees.
        out, lse: shaped like the inputs, written in place; made when not given. They may be an input, whole and in
            its order: out_a or out_b, lse_a or lse_b. Otherwise they share no memory with the inputs or each other.

    Returns:
        (out, lse) over both parts, in the library and on the device of out_a. Computed in float32 and rounded once. A
        part whose weight is 0 in float32, as it is with lse = -inf, never reaches out, NaN included; if both
        lse are -inf, out is 0 and lse -inf. lse = NaN gives NaN.

    On a GPU one kernel on the current stream of out_a's library, which can be captured in a CUDA graph; arrays on
    the CPU are computed there. Gradients are not recorded.

    Raises:
        ArgumentError, ArgumentTypeError: before anything is launched; the message names the argument.
        UnsupportedError: the GPU or the installation lacks something; the message says what.
    """
    a, a_lse = describe(out_a, "out_a"), describe(lse_a, "lse_a")
    b, b_lse = describe(out_b, "out_b"), describe(lse_b, "lse_b")
    merged = None if out is None else describe(out, "out")
    merged_lse = None if lse is None else describe(lse, "lse")
    key = (
        a.layout,
        a_lse.layout,
        b.layout,
        b_lse.layout,
        None if merged is None else merged.layout,
        None if merged_lse is None else merged_lse.layout,
    )
    problem = _problems.get(key)
    if problem is None:
        problem = _check_layouts(*key)
        remember(_problems, key, problem)
    if merged is None:
        out = interop.empty(a.layout, a.owner, a.layout.shape, a.layout.dtype)
        merged = describe(out, "out")
    if merged_lse is None:
        lse = interop.empty(a.layout, a.owner, a_lse.layout.shape, "float32")
        merged_lse = describe(lse, "lse")
    arrays = _Arrays(a, a_lse, b, b_lse, merged, merged_lse)
    _check_addresses(arrays)
    if key[4] or key[5]:  # outputs that are made here lie nowhere else
        _check_overlaps(arrays)
    if problem.rows:
        if a.layout.device_type == "cpu":
            _merge_on_host(*map(as_numpy, arrays))
        else:
            _merge_on_device(problem, arrays)
    return out, lse


class _State(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("out_strides", ctypes.c_int64 * 3),
        ("lse_strides", ctypes.c_int64 * 3),
    ]


class _Params(ctypes.Structure):
    """The kernel's parameter, field by field as in merge_states.cu."""

    _fields_ = [
        ("a", _State),
        ("b", _State),
        ("merged", _State),
        ("rows", ctypes.c_uint32),
        ("queries", ctypes.c_uint32),
        ("heads", ctypes.c_uint32),
        ("chunks", ctypes.c_uint32),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Layouts that were checked: what the kernel has to know except addresses."""

    spec: KernelSpec
    device: int
    rows: int  # heads of all query tokens
    params: _Params
    lock: threading.Lock  # over params, from the first field set to the launch that copies them


class _Arrays(NamedTuple):
    out_a: Array
    lse_a: Array
    out_b: Array
    lse_b: Array
    out: Array
    lse: Array


_problems: dict[tuple[Layout | None, ...], _Problem] = {}


def _merge_on_device(problem: _Problem, arrays: _Arrays) -> None:
    kernel = compiler.load(problem.spec, problem.device)
    stream = interop.current_stream(arrays.out_a.layout)
    with problem.lock:
        params = problem.params
        params.a.out, params.a.lse = arrays.out_a.pointer, arrays.lse_a.pointer
        params.b.out, params.b.lse = arrays.out_b.pointer, arrays.lse_b.pointer
        params.merged.out, params.merged.lse = arrays.out.pointer, arrays.lse.pointer
        kernel.launch(-(-problem.rows // ROWS_OF_A_CTA), THREADS, 0, stream, ctypes.addressof(params))


def _merge_on_host(a: _Floats, lse_a: _Floats, b: _Floats, lse_b: _Floats, out: _Floats, lse: _Floats) -> None:
    """The kernel's arithmetic in NumPy."""
    with np.errstate(all="ignore"):  # infinities and NaN are data here
        empty = np.isneginf(lse_a) & np.isneginf(lse_b)
        lesser = np.where(empty, np.float32(0), np.exp(-np.abs(lse_a - lse_b)))
        of_greater = np.where(empty, np.float32(0), 1 / (1 + lesser))
        of_lesser = lesser * of_greater
        merged_lse = np.maximum(lse_a, lse_b) + np.log1p(lesser)
        merged = _weighted(np.where(lse_a < lse_b, of_lesser, of_greater), a)
        merged += _weighted(np.where(lse_a < lse_b, of_greater, of_lesser), b)
        out[...] = merged.astype(out.dtype)
        lse[...] = merged_lse


def _weighted(weights: _Floats, values: _Floats) -> _Floats:
    """Values times the weights of their rows, float32; 0 where the weight is 0."""
    weights = weights.swapaxes(-1, -2)[..., None]
    return np.where(weights == 0, np.float32(0), weights * values.astype(np.float32))


# ---- Layouts: what follows runs once for each combination of layouts ----


def _check_layouts(
    a: Layout, lse_a: Layout, b: Layout, lse_b: Layout, out: Layout | None, lse: Layout | None
) -> _Problem:
    shape = a.shape
    if a.device_type not in ("cuda", "cpu"):
        raise ArgumentError("out_a", f"device {a.device_type}", "cuda or cpu")
    if a.dtype not in STATE_TYPES:
        raise ArgumentError("out_a", f"dtype {a.dtype}", " or ".join(STATE_TYPES))
    if len(shape) not in (3, 4):
        raise ArgumentError("out_a", f"shape {shape}", "(b, s_q, heads, dim) or (total_q, heads, dim)")
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    size = interop.numpy_dtype(a.dtype).itemsize
    for name, layout in (("out_a", a), ("out_b", b), ("out", out)):
        if layout is not None:
            _check_like(name, layout, a, a.dtype, shape)
            _check_vectors(name, layout, VECTOR_BYTES // size)
    for name, layout in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        if layout is not None:
            _check_like(name, layout, a, "float32", lse_shape)
    for name, layout in (("out", out), ("lse", lse)):
        if layout is not None:
            _check_separate(name, layout)
    rows = math.prod(shape[:-1])
    if rows > MAX_ROWS:
        raise ArgumentError("out_a", f"shape {shape}", f"at most {MAX_ROWS} rows of the last dim")

    chunk = VECTOR_BYTES // size
    params = _Params(rows=rows, queries=shape[-3], heads=shape[-2], chunks=shape[-1] // chunk)
    outs = (a.strides, b.strides, _contiguous(shape) if out is None else out.strides)
    sums = (lse_a.strides, lse_b.strides, _contiguous(lse_shape) if lse is None else lse.strides)
    for state, out_strides, lse_strides in zip((params.a, params.b, params.merged), outs, sums):
        state.out_strides[:] = [0] * (4 - len(shape)) + [stride // chunk for stride in out_strides[:-1]]
        state.lse_strides[:] = [0] * (4 - len(shape)) + list(lse_strides)
    return _Problem(merge_states_spec(a.dtype), a.device, rows, params, threading.Lock())


def _check_like(name: str, layout: Layout, a: Layout, dtype: str, shape: tuple[int, ...]) -> None:
    if layout.dtype != dtype:
        raise ArgumentError(name, f"dtype {layout.dtype}", dtype if dtype != a.dtype else f"{dtype}, as out_a")
    if (layout.device_type, layout.device) != (a.device_type, a.device):
        accepted = f"{a.device_type}:{a.device}, where out_a is"
        raise ArgumentError(name, f"device {layout.device_type}:{layout.device}", accepted)
    if layout.shape != shape:
        raise ArgumentError(name, f"shape {layout.shape}", f"{shape}, with out_a of shape {a.shape}")


def _check_vectors(name: str, layout: Layout, chunk: int) -> None:
    """Check that rows are contiguous and made of whole chunks, and begin where a chunk does."""
    *sizes, dim = layout.shape
    if dim == 0 or dim % chunk:
        raise ArgumentError(name, f"last dim {dim}", f"a positive multiple of {chunk} elements ({VECTOR_BYTES} bytes)")
    if 0 in layout.shape:
        return
    if layout.strides[-1] != 1:
        raise ArgumentError(name, f"stride {layout.strides[-1]} in the last dim", "1 (contiguous)")
    if any(stride % chunk for stride, size in zip(layout.strides, sizes) if size > 1):
        accepted = f"multiples of {chunk} elements ({VECTOR_BYTES} bytes)"
        raise ArgumentError(name, f"strides {layout.strides}", accepted)


def _check_separate(name: str, layout: Layout) -> None:
    """Check that no two elements of an output share memory."""
    extent = 1
    for stride, size in sorted((abs(stride), size) for stride, size in zip(layout.strides, layout.shape)):
        if size > 1 and stride < extent and 0 not in layout.shape:
            raise ArgumentError(name, f"strides {layout.strides}", "elements that do not overlap")
        extent += stride * (size - 1)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# ---- Addresses ----


def _check_addresses(arrays: _Arrays) -> None:
    for name, array in zip(_Arrays._fields, arrays):
        alignment = 4 if name.startswith("lse") else VECTOR_BYTES
        if array.pointer % alignment:
            raise ArgumentError(name, f"address {array.pointer:#x}", f"a multiple of {alignment} bytes")
    for name, array in (("out", arrays.out), ("lse", arrays.lse)):
        if not interop.writeable(array):
            raise ArgumentError(name, "a read-only array", "one that can be written")


_WRITTEN_OVER = tuple((i, j) for i in (4, 5) for j in range(i))  # each output in _Arrays, and what comes before it


def _check_overlaps(arrays: _Arrays) -> None:
    """Check that nothing is written over what is still to be read: rows are merged in any order, many at a time."""
    spans = [span(array) for array in arrays]
    for i, j in _WRITTEN_OVER:
        (begin, end), (other_begin, other_end) = spans[i], spans[j]
        if begin < other_end and other_begin < end:
            _check_overlap(_Arrays._fields[i], arrays[i], _Arrays._fields[j], arrays[j])


def _check_overlap(name: str, output: Array, other_name: str, other: Array) -> None:
    in_place = other_name.startswith(f"{name}_") and identical(output, other)
    if not in_place and overlap(output, other):
        accepted = f"{name}_a, {name}_b or memory apart from all other arrays"
        raise ArgumentError(name, f"memory of {other_name}", accepted)
