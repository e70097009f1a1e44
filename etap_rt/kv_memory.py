"""Where the tokens of a paged KV cache lie: arrays on the CPU or on a GPU, and what is done to them there.

Both kinds do the same: HostMemory in NumPy at once, DeviceMemory with the kernels of kv_write.cu on the current
stream of the arrays' library. Arguments are checked by the caller.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from etap_rt import compiler, driver
from etap_rt.errors import UnsupportedError
from etap_rt.interop import Array, as_numpy, current_stream, describe, empty, import_cupy, numpy_dtype
from etap_rt.kernels import ElementType, KernelSpec, batch_update_spec, kv_write_spec, page_copy_spec
from etap_rt.kv_pages import IntArray

ELEMENT_BYTES = 2
CHUNK_BYTES = 16  # of one access of the kernels
THREADS = 320  # of a block at most, and PASSES chunks a thread: as in kv_write.cu
PASSES = 4
STAGING_BUFFERS = 8  # a step uses two or three, so the host may run ahead of the GPU by two steps
STAGING_BYTES = 1 << 14  # of a buffer at first
TRANSFER_BYTES = 64 << 20  # pinned memory for export and import, if a page of all layers fits in
WRITE, COPY, UPDATE = kv_write_spec(), page_copy_spec(), batch_update_spec()


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a cache. A row is one token of one layer: its latent dims, then its rope dims."""

    num_layers: int
    num_pages: int
    page_size: int  # tokens
    latent_dim: int
    rope_dim: int
    dtype: ElementType
    max_batch: int
    max_pages: int  # of one sequence

    @property
    def row_dims(self) -> int:
        return self.latent_dim + self.rope_dim

    @property
    def row_chunks(self) -> int:
        return self.row_dims * ELEMENT_BYTES // CHUNK_BYTES

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def page_bytes(self) -> int:
        """Of one layer."""
        return self.page_size * self.row_dims * ELEMENT_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.num_layers * self.layer_bytes


class _Arrays:
    """The arrays of a cache, of one library on one device.

    Attributes: pool (num_layers, num_pages, page_size, row_dims); layers, its views one by one;
    block_table (max_batch, max_pages) int32; cache_seqlens (max_batch,) int32; own, all of them as described.
    """

    def __init__(self, geometry: Geometry, library: str, device: str) -> None:
        g = geometry
        shape = (g.num_layers, g.num_pages, g.page_size, g.row_dims)
        self.geometry = geometry
        self.pool = describe(_new_array(library, device, shape, g.dtype), "pool")
        self.layers = [self.pool.owner[i] for i in range(g.num_layers)]
        self.block_table = self.new_array((g.max_batch, g.max_pages), "int32")
        self.cache_seqlens = self.new_array((g.max_batch,), "int32")
        self._table = describe(self.block_table, "block_table")
        self._lengths = describe(self.cache_seqlens, "cache_seqlens")
        self.own = (self.pool, self._table, self._lengths)

    def new_array(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised array of the same library on the same device."""
        return empty(self.pool.layout, self.pool.owner, shape, dtype)

    def new_host_arrays(self, *shapes: tuple[int, ...]) -> list[Any]:
        """Uninitialised arrays in the cache's dtype on the CPU: of torch if the cache is, otherwise of NumPy."""
        library = "torch" if self.pool.layout.library == "torch" else "numpy"
        return [_new_array(library, "cpu", shape, self.geometry.dtype) for shape in shapes]


class HostMemory(_Arrays):
    """Arrays of NumPy or torch on the CPU."""

    def __init__(self, geometry: Geometry, library: str) -> None:
        super().__init__(geometry, library, "cpu")
        rows = (geometry.num_layers, geometry.num_slots, geometry.row_dims)
        self._rows = as_numpy(self.pool).reshape(rows)
        as_numpy(self._table)[...] = 0
        as_numpy(self._lengths)[...] = 0

    def make_ready(self, what: str) -> None:
        """Nothing is captured or compiled on the CPU."""

    def begin_step(self, slots: Array, values: IntArray, copies: IntArray) -> None:
        """Copy pages, given as (n, 3) of (from page, to page, tokens), in all layers; bring `values` into `slots`."""
        size = self.geometry.page_size
        for source, target, tokens in copies.tolist():
            filled = self._rows[:, source * size : source * size + tokens]
            self._rows[:, target * size : target * size + tokens] = filled
        as_numpy(slots)[...] = values

    def update_batch(self, lengths: IntArray, entries: IntArray) -> None:
        """Set all of cache_seqlens, and entries (n, 2) of (index in the flattened block table, page)."""
        as_numpy(self._lengths)[...] = lengths
        as_numpy(self._table).reshape(-1)[entries[:, 0]] = entries[:, 1]

    def write(self, layer: int, slots: Array, latent: Array, rope: Array) -> None:
        """Bring rows of latent (n, latent_dim) and rope (n, rope_dim) into `slots` (n,) of a layer."""
        target = as_numpy(slots)
        valid = (target >= 0) & (target < self.geometry.num_slots)
        target = target[valid]
        dim = self.geometry.latent_dim
        with np.errstate(over="ignore"):  # too large for the dtype is infinite, as on the GPU
            self._rows[layer, target, :dim] = as_numpy(latent)[valid].astype(self._rows.dtype, copy=False)
            self._rows[layer, target, dim:] = as_numpy(rope)[valid].astype(self._rows.dtype, copy=False)

    def read(self, pages: IntArray, latent: Any, rope: Any) -> None:
        """Copy a sequence's tokens, all layers, into NumPy arrays (num_layers, n, dims)."""
        slots = self._slots(pages, latent.shape[1])
        latent[...] = self._rows[:, slots, : self.geometry.latent_dim]
        rope[...] = self._rows[:, slots, self.geometry.latent_dim :]

    def load(self, pages: IntArray, latent: Any, rope: Any) -> None:
        """The opposite of read."""
        slots = self._slots(pages, latent.shape[1])
        self._rows[:, slots, : self.geometry.latent_dim] = latent
        self._rows[:, slots, self.geometry.latent_dim :] = rope

    def _slots(self, pages: IntArray, tokens: int) -> IntArray:
        size = self.geometry.page_size
        return (pages[:, None] * size + np.arange(size)).reshape(-1)[:tokens]


class DeviceMemory(_Arrays):
    """Arrays of CuPy or torch on a GPU.

    Everything small goes over through pinned staging buffers, on the stream of the work that reads it.
    """

    def __init__(self, geometry: Geometry, library: str, device: str) -> None:
        driver.refuse_fork()
        index = _device_index(library, device)
        compiler.require_hopper(index)  # before the pool is allocated
        cupy = import_cupy()
        super().__init__(geometry, library, f"cuda:{index}")
        self._runtime = cupy.cuda.runtime
        self._device = cupy.cuda.Device(index)
        self._pool_side = _Side(self.pool.pointer, geometry.layer_bytes)
        self._load_kernels()  # now, so that no step waits for the compiler
        with self._device:
            self._staging = _Staging()
            for x in (self._table, self._lengths):
                self._runtime.memsetAsync(x.pointer, 0, 4 * math.prod(x.layout.shape), self._stream())

    def make_ready(self, what: str) -> None:
        """Raise, before the host's state changes, what would keep the GPU from following it in `what`.

        UnsupportedError while the current stream is being captured, CompileError for sources of `kernel_sources`.
        """
        self._refuse_capture(what, self._stream())
        self._load_kernels()

    def begin_step(self, slots: Array, values: IntArray, copies: IntArray) -> None:
        """Copy pages, given as (n, 3) of (from page, to page, tokens), in all layers; bring `values` into `slots`."""
        stream = self._stream()
        with self._device:
            self._copy_pages(copies, self._pool_side, self._pool_side, stream)
            self._upload(slots, values, stream)

    def update_batch(self, lengths: IntArray, entries: IntArray) -> None:
        """Set all of cache_seqlens, and entries (n, 2) of (index in the flattened block table, page)."""
        stream = self._stream()
        with self._device, self._staging.take(lengths.size + entries.size, stream) as (words, address):
            words[: lengths.size] = lengths
            words[lengths.size :] = entries.reshape(-1)
            params = _UpdateParams(address, self._lengths.pointer, self._table.pointer, len(lengths), len(entries))
            blocks = -(-(len(lengths) + len(entries)) // THREADS)
            self._kernel(UPDATE).launch(blocks, THREADS, 0, stream, ctypes.addressof(params))

    def write(self, layer: int, slots: Array, latent: Array, rope: Array) -> None:
        """Bring rows of latent (n, latent_dim) and rope (n, rope_dim) into `slots` (n,) of a layer.

        Runs on the current stream of latent's library. While that is captured, `slots` on the host raise
        UnsupportedError.
        """
        g = self.geometry
        tokens = latent.layout.shape[0]
        if tokens == 0:
            return
        driver.refuse_fork()
        stream = current_stream(latent.layout)
        with self._device:
            if slots.layout.device_type == "cpu":
                self._refuse_capture("write with slots on the host", stream)
                on_device = empty(latent.layout, latent.owner, slots.layout.shape, slots.layout.dtype)
                values, slots = as_numpy(slots), describe(on_device, "slots")
                self._upload(slots, values, stream)
            params = _WriteParams(
                latent.pointer,
                rope.pointer,
                slots.pointer,
                self.pool.pointer + layer * g.layer_bytes,
                _row_bytes(latent),
                _row_bytes(rope),
                g.num_slots,
                tokens,
                g.latent_dim * ELEMENT_BYTES // CHUNK_BYTES,
                g.row_chunks,
                latent.layout.dtype == "float32",
                rope.layout.dtype == "float32",
                slots.layout.dtype == "int64",
                g.dtype == "bfloat16",
            )
            rows = THREADS // g.row_chunks
            blocks = -(-tokens // (rows * PASSES))
            self._kernel(WRITE).launch(blocks, rows * g.row_chunks, 0, stream, ctypes.addressof(params))

    def read(self, pages: IntArray, latent: Any, rope: Any) -> None:
        """Copy a sequence's tokens, all layers, into NumPy arrays (num_layers, n, dims). Synchronizes."""
        stream, dim = self._stream(), self.geometry.latent_dim
        with self._device:
            for part in self._parts(pages, latent.shape[1]):
                copies = np.stack([part.pages, np.arange(len(part.pages)), part.filled], axis=1)
                self._copy_pages(copies, self._pool_side, part.side, stream)
                self._runtime.streamSynchronize(stream)
                latent[:, part.tokens] = part.rows[..., :dim]
                rope[:, part.tokens] = part.rows[..., dim:]

    def load(self, pages: IntArray, latent: Any, rope: Any) -> None:
        """The opposite of read. Synchronizes."""
        stream, dim = self._stream(), self.geometry.latent_dim
        with self._device:
            for part in self._parts(pages, latent.shape[1]):
                part.rows[..., :dim] = latent[:, part.tokens]
                part.rows[..., dim:] = rope[:, part.tokens]
                copies = np.stack([np.arange(len(part.pages)), part.pages, part.filled], axis=1)
                self._copy_pages(copies, part.side, self._pool_side, stream)
                self._runtime.streamSynchronize(stream)

    def _stream(self) -> int:
        return current_stream(self.pool.layout)

    def _refuse_capture(self, what: str, stream: int) -> None:
        if driver.capturing(self._device.id, stream):
            raise UnsupportedError(f"{what} while the stream is captured", "calling it before capture and replay")

    def _kernel(self, spec: KernelSpec) -> driver.Kernel:
        """Looked up for each launch, because `kernel_sources` may have been entered or left since the one before."""
        return compiler.load(spec, self._device.id)

    def _load_kernels(self) -> None:
        for spec in (WRITE, COPY, UPDATE):
            self._kernel(spec)

    def _upload(self, target: Array, values: np.ndarray[Any, Any], stream: int) -> None:
        """Copy integers to a contiguous int32 or int64 array."""
        if values.size == 0:
            return
        dtype = numpy_dtype(target.layout.dtype)
        size = values.size * dtype.itemsize
        with self._staging.take(size // 4, stream) as (words, address):
            words.view(dtype)[...] = values
            self._runtime.memcpyAsync(target.pointer, address, size, self._runtime.memcpyHostToDevice, stream)

    def _copy_pages(self, copies: np.ndarray[Any, Any], source: _Side, target: _Side, stream: int) -> None:
        if len(copies) == 0:
            return
        g = self.geometry
        with self._staging.take(copies.size, stream) as (words, address):
            words[...] = copies.reshape(-1)
            params = _CopyParams(
                source.address,
                target.address,
                source.layer_bytes,
                target.layer_bytes,
                g.page_bytes,
                address,
                g.num_layers,
                g.row_chunks,
            )
            self._kernel(COPY).launch(len(copies) * g.num_layers, THREADS, 0, stream, ctypes.addressof(params))

    def _parts(self, pages: IntArray, tokens: int) -> Iterator[_Part]:
        """A sequence in parts that fit into a pinned buffer, each in the same one."""
        g = self.geometry
        most = min(len(pages), max(1, TRANSFER_BYTES // (g.num_layers * g.page_bytes)))
        pinned = _pinned(most * g.num_layers * g.page_bytes)
        for begin in range(0, len(pages), most):
            part = pages[begin : begin + most]
            first = begin * g.page_size
            count = min(len(part) * g.page_size, tokens - first)
            shape = (g.num_layers, len(part) * g.page_size, g.row_dims)
            rows = np.frombuffer(pinned, np.int16, math.prod(shape)).view(numpy_dtype(g.dtype)).reshape(shape)
            filled = np.minimum(count - np.arange(len(part)) * g.page_size, g.page_size)
            side = _Side(pinned.ptr, len(part) * g.page_bytes)
            yield _Part(part, filled, slice(first, first + count), rows[:, :count], side)


class _Side(NamedTuple):
    """Where a page copy reads or writes: an address, and the bytes from one layer to the next."""

    address: int
    layer_bytes: int


class _Part(NamedTuple):
    """Some pages of a sequence, and the pinned buffer for them."""

    pages: IntArray
    filled: np.ndarray[Any, Any]  # tokens in each
    tokens: slice  # of the sequence
    rows: np.ndarray[Any, Any]  # (num_layers, tokens, row_dims), the buffer
    side: _Side


class _Staging:
    """Pinned buffers that take turns. One is filled again only when the GPU is past its last reader."""

    def __init__(self) -> None:
        cupy = import_cupy()
        self._runtime = cupy.cuda.runtime
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(STAGING_BUFFERS)]
        self._buffers = [_pinned(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._words = [np.frombuffer(buffer, np.int32, STAGING_BYTES // 4) for buffer in self._buffers]
        self._turn = 0

    @contextmanager
    def take(self, count: int, stream: int) -> Iterator[tuple[IntArray, int]]:
        """`count` int32 words to fill, and their address; what reads them must be on `stream` when the block ends."""
        turn = self._turn
        self._turn = (turn + 1) % STAGING_BUFFERS
        event = self._events[turn].ptr
        self._runtime.eventSynchronize(event)
        if count > self._words[turn].size:
            size = 1 << (4 * count - 1).bit_length()
            self._buffers[turn] = _pinned(size)
            self._words[turn] = np.frombuffer(self._buffers[turn], np.int32, size // 4)
        yield self._words[turn][:count], self._buffers[turn].ptr
        self._runtime.eventRecord(event, stream)


class _WriteParams(ctypes.Structure):
    _fields_ = [
        ("latent", ctypes.c_uint64),
        ("rope", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("layer", ctypes.c_uint64),
        ("latent_stride", ctypes.c_int64),
        ("rope_stride", ctypes.c_int64),
        ("num_slots", ctypes.c_uint32),
        ("tokens", ctypes.c_int32),
        ("latent_chunks", ctypes.c_int32),
        ("row_chunks", ctypes.c_int32),
        ("latent_is_fp32", ctypes.c_int32),
        ("rope_is_fp32", ctypes.c_int32),
        ("slots_are_int64", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
    ]


class _CopyParams(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        ("destination", ctypes.c_uint64),
        ("source_layer_bytes", ctypes.c_int64),
        ("destination_layer_bytes", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("copies", ctypes.c_uint64),
        ("layers", ctypes.c_int32),
        ("row_chunks", ctypes.c_int32),
    ]


class _UpdateParams(ctypes.Structure):
    _fields_ = [
        ("staged", ctypes.c_uint64),
        ("cache_seqlens", ctypes.c_uint64),
        ("block_table", ctypes.c_uint64),
        ("batch", ctypes.c_int32),
        ("entries", ctypes.c_int32),
    ]


def _device_index(library: str, device: str) -> int:
    """The index in "cuda:1"; for "cuda", that of the GPU on which the library allocates now."""
    index = device.partition(":")[2]
    if index:
        return int(index)
    driver.device_count()  # raises UnsupportedError without a GPU, before a library raises something of its own
    if library == "torch":
        import torch

        return int(torch.cuda.current_device())
    return int(import_cupy().cuda.runtime.getDevice())


def _new_array(library: str, device: str, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array; `device` is "cpu" or has an index, such as "cuda:0"."""
    if library == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    if device == "cpu":
        return np.empty(shape, numpy_dtype(dtype))
    cupy = import_cupy()
    with cupy.cuda.Device(int(device.partition(":")[2])):
        return cupy.empty(shape, numpy_dtype(dtype))


def _pinned(size: int) -> Any:
    return import_cupy().cuda.alloc_pinned_memory(size)


def _row_bytes(x: Array) -> int:
    return x.layout.strides[0] * numpy_dtype(x.layout.dtype).itemsize
