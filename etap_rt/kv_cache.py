"""PagedKVCache: the latent keys and values of many sequences and all layers, in one pool of pages."""

from __future__ import annotations

import html
import importlib
import math
import os
import re
import weakref
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from etap_rt.errors import ArgumentError, ArgumentTypeError, SequenceError, UnsupportedError
from etap_rt.interop import Array, Layout, as_numpy, describe, numpy_dtype, remember, writeable
from etap_rt.kernels import ELEMENT_TYPES, ElementType
from etap_rt.kv_memory import CHUNK_BYTES, ELEMENT_BYTES, THREADS, DeviceMemory, Geometry, HostMemory
from etap_rt.kv_pages import IntArray, PagePool, Reservation, Sequence
from etap_rt.overlap import overlap, span
from etap_rt.scalars import integer, positive, shown

MAX_INDEX = (1 << 31) - 1  # of slots and of block table entries: they are int32
MAX_BYTES = (1 << 63) - 1  # of a pool: no library has arrays beyond
SHOWN_SEQUENCES = 32  # rows of the HTML table
OWN_COLOR, SHARED_COLOR = "#4c78a8", "#f58518"


class Batch(NamedTuple):
    """What mla_decode needs to know about a batch; views of the cache's own buffers."""

    block_table: Any  # (b, max_pages_per_sequence) int32
    cache_seqlens: Any  # (b,) int32


class CacheStats(NamedTuple):
    """How full a cache is."""

    total: int  # pages
    free: int
    used: int
    shared: int  # pages that more than one sequence holds
    tokens: int  # of all sequences; a token that two of them share counts twice
    bytes: int  # memory of the pool


class SequenceTokens(NamedTuple):
    """The tokens of a sequence on the host, in the cache's dtype; of torch if the cache is, otherwise of NumPy."""

    latent: Any  # (num_layers, n, latent_dim)
    rope: Any  # (num_layers, n, rope_dim)


class PagedKVCache:
    """A paged cache for MLA: `num_layers` layers of latent and rope rows, in pages of `page_size` tokens.

    A page belongs to a sequence in all layers at once, so pages are reserved once a step and written layer by layer:

        slots = cache.reserve([a, b], [n_a, n_b])
        cache.write(layer, slots, latent, rope)
        batch = cache.batch([a, b])
        mla_decode(q, cache.pages(layer), batch.block_table, batch.cache_seqlens, softmax_scale=...)

    Sequences are integers that are never used twice. A fork shares its parent's pages; a shared page that is not
    full is copied before one of its owners writes into it.

    On a GPU everything is ordered on the caller's current stream: `reserve` and `batch` follow that of the cache's
    library, `write` that of latent's. `export` and `import_` wait for the GPU. `reserve`, `batch`, and `write` with
    slots on the host upload through eight pinned buffers that take turns, and wait if the GPU still needs the one
    whose turn it is. A step of `reserve` and `batch` uses two or three, so the host may run ahead by two steps.
    Nothing else waits.

    `write` can be captured in a CUDA graph; `reserve` and `batch` change the host's books, so call them before each
    replay: `batch` fills buffers that never move, `reserve` fills the array that `out` gives it. One thread at a time.

    Args:
        num_pages: pages of the pool, shared by all sequences; num_pages * page_size is below 2**31.
        page_size: tokens of a page, 1 or more.
        num_layers: layers of the model.
        latent_dim, rope_dim: dims of a token's two parts, multiples of 8, together at most 2560.
        dtype: "bfloat16" or "float16", or such a dtype of torch or NumPy.
        device: "cuda", "cuda:1", "cpu" or a torch.device. The cache's arrays are torch's if dtype or device
            is, otherwise CuPy's on a GPU and NumPy's on the CPU.
        max_batch: most sequences that `batch` takes.
        max_pages_per_sequence: columns of the block table; by default num_pages, more than which no sequence can
            have. The block table takes max_batch * max_pages_per_sequence * 4 bytes.

    Raises:
        ArgumentError, ArgumentTypeError, SequenceError, OutOfPagesError: by all methods before anything has changed.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        num_layers: int = 1,
        latent_dim: int = 512,
        rope_dim: int = 64,
        dtype: Any = "bfloat16",
        device: Any = "cuda",
        *,
        max_batch: int = 256,
        max_pages_per_sequence: int | None = None,
    ) -> None:
        num_pages = positive(num_pages, "num_pages")
        max_pages = num_pages if max_pages_per_sequence is None else max_pages_per_sequence
        self._geometry = Geometry(
            positive(num_layers, "num_layers"),
            num_pages,
            positive(page_size, "page_size"),
            positive(latent_dim, "latent_dim"),
            positive(rope_dim, "rope_dim"),
            _element_type(dtype),
            positive(max_batch, "max_batch"),
            positive(max_pages, "max_pages_per_sequence"),
        )
        _check_geometry(self._geometry)
        device_name = _device_name(device)
        if _is_torch(dtype) or _is_torch(device):
            library = "torch"
        else:
            library = "numpy" if device_name == "cpu" else "cupy"
        self._memory: HostMemory | DeviceMemory
        if device_name == "cpu":
            self._memory = HostMemory(self._geometry, library)
        else:
            self._memory = DeviceMemory(self._geometry, library, device_name)
        self._layout = self._memory.pool.layout
        self._pool = PagePool(num_pages, self.page_size, max_pages)
        self._sequences: dict[int, Sequence] = {}
        self._next_name = 0
        self._rows: list[Sequence | None] = [None] * self.max_batch  # whose pages the block table holds
        self._issued: dict[int, tuple[weakref.ref[Any], Reservation]] = {}  # by id of the array of slots
        self._accepted: dict[tuple[Layout, ...], None] = {}  # layouts that write has checked
        self._views: dict[int, Batch] = {}

    @property
    def num_pages(self) -> int:
        return self._geometry.num_pages

    @property
    def page_size(self) -> int:
        return self._geometry.page_size

    @property
    def num_layers(self) -> int:
        return self._geometry.num_layers

    @property
    def latent_dim(self) -> int:
        return self._geometry.latent_dim

    @property
    def rope_dim(self) -> int:
        return self._geometry.rope_dim

    @property
    def dtype(self) -> ElementType:
        return self._geometry.dtype

    @property
    def device(self) -> str:
        return "cpu" if self._layout.device_type == "cpu" else f"cuda:{self._layout.device}"

    @property
    def max_batch(self) -> int:
        return self._geometry.max_batch

    @property
    def max_pages_per_sequence(self) -> int:
        return self._geometry.max_pages

    @property
    def sequences(self) -> tuple[int, ...]:
        """All live sequences, the oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, reserved ones included."""
        return self._find(sequence).length

    def new_sequence(self) -> int:
        """Begin an empty sequence; it has no pages until tokens are reserved."""
        return self._add(Sequence(0, array("i")))

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with the tokens of another one and shares its pages.

        Write reserved tokens before either goes on: a page is copied when its owner reserves the next ones.
        """
        return self._add(self._pool.fork(self._find(sequence)))

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens; pages behind them are given back."""
        found = self._find(sequence)
        length = integer(length, "length")
        if not 0 <= length <= found.length:
            raise ArgumentError("length", str(length), f"0 ... {found.length}, the tokens of sequence {sequence}")
        self._pool.truncate(found, length)

    def free(self, sequence: int) -> None:
        """End a sequence; pages that nobody else shares are given back."""
        self._pool.free(self._sequences.pop(self._number(sequence)))

    def reserve(self, sequences: Iterable[int], counts: Iterable[int], *, out: Any = None) -> Any:
        """Make room for counts[i] new tokens at the end of sequences[i], in every layer; all or nothing.

        Args:
            sequences: each at most once.
            counts: tokens, 0 or more.
            out: (m,) int32 or int64 on the cache's device, at least one element a token; takes the slots, then -1.
                An array that a captured graph writes by keeps its place this way. No view of the cache's own arrays.

        Returns:
            Slots (sum(counts),) int32 on the cache's device, sequence after sequence; or `out`. A slot is
            page * page_size + offset. It goes stale when its page is given back, cut by `truncate` or copied for a
            fork; `write` notices that of the whole array that this returned, not of slices and copies of it.

        Raises OutOfPagesError with the pages asked for and free.
        """
        found = self._find_all(sequences)
        tokens = _counts(counts, len(found))
        if len(set(map(id, found))) < len(found):
            raise ArgumentError("sequences", "one of them twice", "each sequence once")
        self._memory.make_ready("reserve")
        total = sum(tokens)
        if total > self._geometry.num_slots:
            self._pool.reserve(found, tokens)  # says what does not fit, before an array of that size is made
        if out is None:
            slots = describe(self._memory.new_array((total,), "int32"), "slots")
        else:
            slots = self._check_out(out, total)
        reservation = self._pool.reserve(found, tokens)
        values = reservation.slots
        if out is None:
            self._issue(slots.owner, reservation)
        else:
            self._issued.pop(id(out), None)  # if an earlier call returned it, it does not hold those slots any more
            values = np.full(slots.layout.shape, -1, np.int32)
            values[:total] = reservation.slots
        self._memory.begin_step(slots, values, reservation.copies)
        return slots.owner if out is None else out

    def write(self, layer: int, slots: Any, latent: Any, rope: Any) -> None:
        """Write the rows of n tokens into their slots of one layer.

        Args:
            layer: 0 ... num_layers - 1.
            slots: (n,) int32 or int64, as `reserve` returned them; on the cache's device, or on the host, whence they
                are copied. A token with slot -1 is skipped.
            latent: (n, latent_dim) in the cache's dtype, or float32, which is rounded to nearest even.
            rope: (n, rope_dim), likewise. The last dim of both is contiguous; on a GPU rows start at multiples of
                16 bytes. Neither may be a view of the layer that is written, since rows are read while others are
                written; other layers are as good as any memory.
        """
        layer = self._check_layer(layer)
        target, latent_rows, rope_rows = describe(slots, "slots"), describe(latent, "latent"), describe(rope, "rope")
        layouts = (target.layout, latent_rows.layout, rope_rows.layout)
        if layouts not in self._accepted:
            self._check_rows(*layouts)
            remember(self._accepted, layouts, None)
        if self._layout.device_type == "cuda":
            _check_alignment(latent_rows, "latent")
            _check_alignment(rope_rows, "rope")
        if target.layout.device_type == "cpu":
            self._check_slots(as_numpy(target))
        self._check_apart(layer, latent_rows, "latent")
        self._check_apart(layer, rope_rows, "rope")
        self._check_fresh(slots)
        self._memory.write(layer, target, latent_rows, rope_rows)

    def batch(self, sequences: Iterable[int], rows: int | None = None) -> Batch:
        """Block table and lengths of some sequences on the device, for mla_decode.

        Args:
            sequences: at most max_batch.
            rows: rows of the views, if more than there are sequences; the others are requests of no tokens.

        The views are of buffers that never move: a graph that was captured with them stays valid while sequences
        grow, come and go, and the next call overwrites them, in the order of the stream. Lengths past the last
        sequence are 0 up to max_batch. Only what changed since the last call goes over, so a row that keeps its
        sequence from call to call costs little.
        """
        found = self._find_all(sequences)
        rows = len(found) if rows is None else integer(rows, "rows")
        if not len(found) <= rows <= self.max_batch:
            name, least = ("sequences", 0) if rows == len(found) else ("rows", len(found))
            raise ArgumentError(name, str(rows), f"{least} ... {self.max_batch} (max_batch)")
        self._memory.make_ready("batch")
        lengths = np.zeros(self.max_batch, np.int32)
        lengths[: len(found)] = [s.length for s in found]
        self._memory.update_batch(lengths, self._changed_entries(found))
        if rows not in self._views:
            self._views[rows] = Batch(self._memory.block_table[:rows], self._memory.cache_seqlens[:rows])
        return self._views[rows]

    def pages(self, layer: int) -> Any:
        """The pages of a layer, (num_pages, page_size, latent_dim + rope_dim): a view, as mla_decode takes it."""
        return self._memory.layers[self._check_layer(layer)]

    def stats(self) -> CacheStats:
        """Count pages and tokens."""
        free, shared = self._pool.free_pages, int(np.count_nonzero(self._pool.owners > 1))
        tokens = sum(s.length for s in self._sequences.values())
        return CacheStats(self.num_pages, free, self.num_pages - free, shared, tokens, self._geometry.total_bytes)

    def export(self, sequence: int, path: str | os.PathLike[str] | None = None) -> SequenceTokens:
        """The tokens of a sequence on the host, bit for bit; with a path, also as a safetensors file.

        Waits for the GPU. The file has the tensors "latent" and "rope", as in SequenceTokens. Raises OSError when it
        cannot be written.
        """
        found = self._find(sequence)
        self._memory.make_ready("export")
        g = self._geometry
        shapes = [(g.num_layers, found.length, dim) for dim in (g.latent_dim, g.rope_dim)]
        tokens = SequenceTokens(*self._memory.new_host_arrays(*shapes))
        latent, rope = (as_numpy(describe(x, "tokens")) for x in tokens)
        if found.length:
            self._memory.read(np.array(found.pages, np.int32), latent, rope)
        if path is not None:
            _write_file(path, latent, rope)
        return tokens

    def import_(self, source: str | os.PathLike[str] | tuple[Any, Any]) -> int:
        """A new sequence with the tokens that `export` returned or wrote to a file. Waits for the GPU.

        Args:
            source: a path, or the pair (latent, rope) of host arrays as in SequenceTokens, in the cache's dtype.

        Raises OSError when a file cannot be read, ArgumentError when it is not one that `export` wrote.
        """
        pair = _read_file(source) if isinstance(source, (str, os.PathLike)) else source
        latent, rope = self._check_tokens(pair)
        self._memory.make_ready("import_")
        imported = Sequence(0, array("i"))
        try:
            self._pool.reserve([imported], [latent.shape[1]])
        except ArgumentError as error:  # of counts, which the caller did not give
            raise ArgumentError("source", f"{error.given} tokens", error.accepted) from None
        try:
            if imported.length:
                self._memory.load(np.array(imported.pages, np.int32), latent, rope)
        except BaseException:
            self._pool.free(imported)
            raise
        return self._add(imported)

    def __repr__(self) -> str:
        s = self.stats()
        layers = f"{self.num_layers} layer{'s' if self.num_layers > 1 else ''}"
        return (
            f"<PagedKVCache {self.dtype} on {self.device}, {layers} of {self.latent_dim} + {self.rope_dim} dims: "
            f"{s.used} of {s.total} pages of {self.page_size} used, {s.shared} shared, "
            f"{len(self._sequences)} sequences, {s.tokens} tokens, {_size(s.bytes)}>"
        )

    def _repr_html_(self) -> str:
        shown = list(self._sequences.items())[:SHOWN_SEQUENCES]
        rows = []
        for name, s in shown:
            shared = int(np.count_nonzero(self._pool.owners[np.array(s.pages, np.int32)] > 1))
            rows.append((name, s.length, len(s.pages) - shared, shared))
        return _render_html(repr(self), self.stats(), rows, len(self._sequences) - len(shown))

    def _add(self, sequence: Sequence) -> int:
        name = self._next_name
        self._next_name += 1
        self._sequences[name] = sequence
        return name

    def _find(self, name: Any) -> Sequence:
        return self._sequences[self._number(name)]

    def _find_all(self, names: Iterable[Any]) -> list[Sequence]:
        listed = _items(names, "sequences", "sequences in a list")
        if _all_are_int(listed):
            try:
                return [self._sequences[name] for name in listed]
            except KeyError:
                pass  # to be told below
        return [self._find(name) for name in listed]

    def _number(self, name: Any) -> int:
        """A live sequence, as the integer that it is."""
        try:
            number = integer(name, "sequence")
        except ArgumentTypeError:
            raise SequenceError(f"sequence {shown(name)} is unknown") from None
        if number not in self._sequences:
            was = "was freed" if 0 <= number < self._next_name else "is unknown"
            raise SequenceError(f"sequence {number} {was}")
        return number

    def _issue(self, slots: Any, reservation: Reservation) -> None:
        """Remember what an array of slots stands for, as long as it lives."""
        key, issued = id(slots), self._issued
        issued[key] = (weakref.ref(slots, lambda _: issued.pop(key, None)), reservation)

    def _check_fresh(self, slots: Any) -> None:
        entry = self._issued.get(id(slots))
        if entry is not None and self._pool.is_stale(entry[1]):
            raise SequenceError(
                "slots: their tokens were truncated or freed, or their page was copied for a fork, "
                "after they had been reserved; write tokens before that"
            )

    def _changed_entries(self, found: list[Sequence]) -> IntArray:
        """Entries of the block table that the device does not have yet, (n, 2) of (index, page)."""
        values = array("i")
        begins, counts = [], []
        for row, s in enumerate(found):
            if s.row != row or self._rows[row] is not s:
                s.row, s.sent = row, 0
                self._rows[row] = s
            if s.sent < len(s.pages):
                begins.append(row * self.max_pages_per_sequence + s.sent)
                counts.append(len(s.pages) - s.sent)
                values += s.pages[s.sent :]
                s.sent = len(s.pages)
        count = np.array(counts, np.int64)
        index = np.repeat(np.array(begins, np.int64) - (count.cumsum() - count), count) + np.arange(len(values))
        return np.stack([index.astype(np.int32), np.array(values, np.int32)], axis=1)

    def _check_layer(self, layer: Any) -> int:
        index = integer(layer, "layer")
        if not 0 <= index < self.num_layers:
            raise ArgumentError("layer", str(index), f"0 ... {self.num_layers - 1}")
        return index

    def _check_out(self, out: Any, tokens: int) -> Array:
        slots = describe(out, "out")
        self._check_slots_layout(slots.layout, "out", [self._layout.device_type])
        if not writeable(slots):
            raise ArgumentError("out", "a read-only array", "one that can be written")
        if slots.layout.shape[0] < tokens:
            raise ArgumentError("out", f"{slots.layout.shape[0]} elements", f"at least {tokens}, one for each token")
        if any(overlap(slots, own) for own in self._memory.own):
            raise ArgumentError("out", "a view of the cache's own arrays", "an array of the caller's")
        return slots

    def _check_apart(self, layer: int, rows: Array, name: str) -> None:
        """Check that rows to be written do not lie in the layer that they go to."""
        pool, layer_bytes = self._memory.pool.pointer, self._geometry.layer_bytes
        if not 0 <= rows.pointer - pool < self._geometry.total_bytes:
            return  # no view of the pool
        begin, end = span(rows)
        if begin < pool + (layer + 1) * layer_bytes and pool + layer * layer_bytes < end:
            raise ArgumentError(name, f"a view of layer {layer}, which is written", "other memory, such as a copy")

    def _check_rows(self, slots: Layout, latent: Layout, rope: Layout) -> None:
        """Check the arguments of write as far as layouts tell."""
        self._check_slots_layout(slots, "slots", [self._layout.device_type, "cpu"])
        tokens = slots.shape[0]
        for name, given, dim in (("latent", latent, self.latent_dim), ("rope", rope, self.rope_dim)):
            self._check_device(given, name)
            if given.shape != (tokens, dim):
                raise ArgumentError(name, f"shape {given.shape}", f"({tokens}, {dim}), a row for each slot")
            if given.dtype not in (self.dtype, "float32"):
                raise ArgumentError(name, given.dtype, f"{self.dtype}, as the cache, or float32")
            if tokens and dim > 1 and given.strides[1] != 1:  # strides of an empty array mean nothing
                raise ArgumentError(name, f"strides {given.strides}", "a contiguous last dim")
            row_bytes = given.strides[0] * numpy_dtype(given.dtype).itemsize
            if self._layout.device_type == "cuda" and tokens > 1 and row_bytes % CHUNK_BYTES:
                raise ArgumentError(name, f"rows {row_bytes} bytes apart", f"multiples of {CHUNK_BYTES} bytes")

    def _check_slots_layout(self, slots: Layout, name: str, device_types: list[str]) -> None:
        if len(slots.shape) != 1 or (slots.shape[0] > 1 and slots.strides[0] != 1):
            raise ArgumentError(name, f"shape {slots.shape}, strides {slots.strides}", "one contiguous dim")
        if slots.dtype not in ("int32", "int64"):
            raise ArgumentError(name, slots.dtype, "int32 or int64")
        if slots.device_type not in device_types or slots.device_type == "cuda":
            self._check_device(slots, name)

    def _check_device(self, given: Layout, name: str) -> None:
        if (given.device_type, given.device) != (self._layout.device_type, self._layout.device):
            device = "cpu" if given.device_type == "cpu" else f"{given.device_type}:{given.device}"
            raise ArgumentError(name, f"an array on {device}", f"one on {self.device}, where the cache is")

    def _check_slots(self, slots: np.ndarray[Any, Any]) -> None:
        """Check slots whose values the host can see."""
        wrong = (slots < -1) | (slots >= self._geometry.num_slots)
        if wrong.any():
            i = int(wrong.argmax())
            raise ArgumentError(f"slots[{i}]", str(slots[i]), f"-1 ... {self._geometry.num_slots - 1}")
        orphan = (slots >= 0) & (self._pool.owners[slots // self.page_size] == 0)
        if orphan.any():
            i = int(orphan.argmax())
            page = slots[i] // self.page_size
            raise ArgumentError(f"slots[{i}]", f"{slots[i]}, in free page {page}", "slots that were reserved")

    def _check_tokens(self, pair: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentTypeError("source", type(pair).__name__, "a path or the pair (latent, rope)")
        latent, rope = describe(pair[0], "latent"), describe(pair[1], "rope")
        tokens = latent.layout.shape[1] if len(latent.layout.shape) == 3 else "n"
        for x, name, dim in ((latent, "latent", self.latent_dim), (rope, "rope", self.rope_dim)):
            if x.layout.device_type != "cpu":
                raise ArgumentError(name, f"an array on {x.layout.device_type}", "one on the host")
            if x.layout.shape != (self.num_layers, tokens, dim):
                raise ArgumentError(name, f"shape {x.layout.shape}", f"({self.num_layers}, {tokens}, {dim})")
            if x.layout.dtype != self.dtype:
                raise ArgumentError(name, x.layout.dtype, f"{self.dtype}, as the cache")
        return as_numpy(latent), as_numpy(rope)


def _items(values: Iterable[Any], name: str, accepted: str) -> list[Any]:
    try:
        return list(values.tolist() if isinstance(values, np.ndarray) else values)  # at once, not one by one
    except TypeError as error:  # nothing that can be gone through
        raise ArgumentTypeError(name, shown(values), accepted) from error


def _all_are_int(values: list[Any]) -> bool:
    """Whether they can be taken as they are: thousands of them come each step, so they are not looked at one by one."""
    return set(map(type, values)) <= {int}


def _counts(counts: Iterable[Any], expected: int) -> list[int]:
    numbers = _items(counts, "counts", "integers in a list")
    if not _all_are_int(numbers):
        numbers = [integer(number, f"counts[{i}]") for i, number in enumerate(numbers)]
    if len(numbers) != expected:
        raise ArgumentError("counts", f"{len(numbers)} of them", f"one for each of {expected} sequences")
    if numbers and min(numbers) < 0:
        i = numbers.index(min(numbers))
        raise ArgumentError(f"counts[{i}]", str(numbers[i]), "0 or more")
    return numbers


def _is_torch(x: Any) -> bool:
    return type(x).__module__ == "torch"


def _element_type(dtype: Any) -> ElementType:
    try:
        name = str(dtype).removeprefix("torch.") if _is_torch(dtype) else np.dtype(dtype).name
    except (TypeError, ValueError, SyntaxError):  # all of them NumPy's, for what is no dtype
        name = shown(dtype)
    if dtype is None:  # which NumPy takes for float64
        name = "None"
    for element_type in ELEMENT_TYPES:
        if element_type == name:
            return element_type
    raise ArgumentError("dtype", name, " or ".join(ELEMENT_TYPES))


def _device_name(device: Any) -> str:
    name = str(device)
    if not re.fullmatch(r"cpu(:0)?|cuda(:\d+)?", name):
        raise ArgumentError("device", shown(device), '"cpu", "cuda" or "cuda:1"')
    return name.removesuffix(":0") if name.startswith("cpu") else name


def _check_geometry(g: Geometry) -> None:
    chunk_dims = CHUNK_BYTES // ELEMENT_BYTES
    for name, dim in (("latent_dim", g.latent_dim), ("rope_dim", g.rope_dim)):
        if dim % chunk_dims:
            raise ArgumentError(name, str(dim), f"a multiple of {chunk_dims}")
    if g.row_chunks > THREADS:
        raise ArgumentError("latent_dim + rope_dim", str(g.row_dims), f"at most {THREADS * chunk_dims}")
    if g.num_slots > MAX_INDEX:
        raise ArgumentError("num_pages * page_size", str(g.num_slots), f"at most {MAX_INDEX}")
    if g.total_bytes > MAX_BYTES:
        most = MAX_BYTES // g.layer_bytes
        raise ArgumentError("num_layers", str(g.num_layers), f"at most {most}, of {g.layer_bytes} bytes each")
    if g.max_batch * g.max_pages > MAX_INDEX:
        given = f"{g.max_batch} * {g.max_pages}"
        raise ArgumentError("max_batch * max_pages_per_sequence", given, f"at most {MAX_INDEX}")


def _check_alignment(x: Array, name: str) -> None:
    if x.pointer % CHUNK_BYTES:
        raise ArgumentError(name, f"address {x.pointer:#x}", f"a multiple of {CHUNK_BYTES} bytes")


def _size(size: int) -> str:
    """Bytes for people, such as 12.3 GB."""
    power = min(int(math.log10(size)) // 3, 4)
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError as error:
        raise UnsupportedError("reading and writing safetensors files", "the package safetensors") from error


def _write_file(path: str | os.PathLike[str], latent: Any, rope: Any) -> None:
    save_file, refused = _safetensors("numpy").save_file, _safetensors("").SafetensorError
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError("path", shown(path), "a path")
    try:
        save_file({"latent": latent, "rope": rope}, path)
    except refused as error:
        raise OSError(f"{os.fspath(path)} cannot be written ({error})") from error


def _read_file(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    safetensors = _safetensors("")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor("latent"), file.get_tensor("rope")
    except (safetensors.SafetensorError, AttributeError) as error:  # the latter for a dtype that NumPy does not have
        raise ArgumentError("source", f"{os.fspath(path)} ({error})", "a file that export wrote") from error


def _render_html(title: str, stats: CacheStats, rows: list[tuple[int, int, int, int]], hidden: int) -> str:
    """A bar for the pool and a line for each sequence: (name, tokens, own pages, shared pages)."""
    longest = max((own + shared for _, _, own, shared in rows), default=0)
    lines = "".join(
        f"<tr><td>{name}</td><td>{tokens}</td><td>{own + shared}</td><td>{shared}</td>"
        f"<td style='width:20em;text-align:left'>{_bar(own, shared, longest)}</td></tr>"
        for name, tokens, own, shared in rows
    )
    more = f"<p>and {hidden} more sequences</p>" if hidden else ""
    return (
        f"<div><code>{html.escape(title)}</code>"
        f"<div style='width:40em;margin:.5em 0'>{_bar(stats.used - stats.shared, stats.shared, stats.total)}</div>"
        f"<table><thead><tr><th>sequence</th><th>tokens</th><th>pages</th><th>shared</th>"
        f"<th style='text-align:left'>{_swatch(OWN_COLOR)} own {_swatch(SHARED_COLOR)} shared</th></tr></thead>"
        f"<tbody>{lines}</tbody></table>{more}</div>"
    )


def _bar(own: int, shared: int, full: int) -> str:
    """Shared pages, then own ones, then nothing, as parts of `full`."""
    parts = "".join(
        f"<span style='display:inline-block;height:1em;width:{100 * pages / full:.4g}%;background:{color}'></span>"
        for pages, color in ((shared, SHARED_COLOR), (own, OWN_COLOR))
        if pages
    )
    return f"<div style='background:#8883;height:1em;line-height:0;white-space:nowrap'>{parts}</div>"


def _swatch(color: str) -> str:
    return f"<span style='display:inline-block;width:1em;height:1em;background:{color}'></span>"
