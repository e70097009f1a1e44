"""What a paged cache must do, as a plain dictionary of lists, and a random walk that holds a cache against it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from etap_rt import interop, mla_decode
from etap_rt.errors import OutOfPagesError
from etap_rt.kv_cache import PagedKVCache
from tests.cases import DEEPSEEK_SCALE, NUMPY_DTYPES, as_is, to_torch

LAYERS = 2
MOST_SEQUENCES = 6  # at a time, in a random walk


@dataclass(frozen=True)
class Library:
    """Where a cache and its inputs live."""

    name: str
    device: str
    dtype: Callable[[str], Any]  # as PagedKVCache takes it
    array: Callable[[NDArray[Any]], Any]  # from NumPy

    def __str__(self) -> str:
        return self.name

    def cache(self, num_pages: int, page_size: int, dtype: str = "bfloat16", **sizes: Any) -> PagedKVCache:
        return PagedKVCache(num_pages, page_size, dtype=self.dtype(dtype), device=self.device, **sizes)


def torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def to_cupy(array: NDArray[Any]) -> Any:
    import cupy

    if array.dtype == ml_dtypes.bfloat16:
        return cupy.asarray(array.view(np.int16)).view(ml_dtypes.bfloat16)
    return cupy.asarray(array)


NUMPY = Library("numpy", "cpu", str, as_is)
TORCH = Library("torch", "cpu", torch_dtype, to_torch)
CUPY = Library("cupy", "cuda", str, to_cupy)
TORCH_CUDA = Library("torch-cuda", "cuda", torch_dtype, lambda x: to_torch(x).cuda())


def host(x: Any) -> NDArray[Any]:
    """Any array as NumPy."""
    return interop.to_host(interop.describe(x, "x"))


def bits(x: Any) -> NDArray[np.int16]:
    """The bits of a 16-bit array, so that equal means equal, NaN included."""
    return host(x).view(np.int16)


def row_dims(cache: PagedKVCache) -> int:
    return cache.latent_dim + cache.rope_dim


def rows(cache: PagedKVCache, layer: int, tokens: list[int]) -> NDArray[Any]:
    """Latent and rope dims of some tokens in a layer, (n, row dims) in the cache's dtype: finite, all different."""
    dims = np.arange(row_dims(cache))
    mixed = np.array(tokens, np.int64)[:, None] * 7919 + dims * 104_729 + layer * 15_485_863
    pattern = (mixed ^ (mixed >> 7)).astype(np.uint16) & 0xBFFF  # below 2 in magnitude
    return pattern.view(NUMPY_DTYPES[cache.dtype])


def write_tokens(library: Library, cache: PagedKVCache, slots: Any, tokens: list[int], wide: bool = False) -> None:
    """Write tokens into all layers, in the cache's dtype or in float32, which holds the same values."""
    for layer in range(cache.num_layers):
        new = rows(cache, layer, tokens)
        if wide:
            new = new.astype(np.float32)
        packed = library.array(new)
        cache.write(layer, slots, packed[:, : cache.latent_dim], packed[:, cache.latent_dim :])


def add(library: Library, cache: PagedKVCache, sequence: int, tokens: list[int]) -> None:
    """Reserve and write tokens at the end of a sequence."""
    write_tokens(library, cache, cache.reserve([sequence], [len(tokens)]), tokens)


def tables(cache: PagedKVCache, sequences: list[int] | None = None) -> dict[int, list[int]]:
    """The pages of each sequence, as the device's block table has them."""
    found = {}
    names = list(cache.sequences) if sequences is None else sequences
    for first in range(0, len(names), cache.max_batch):
        some = names[first : first + cache.max_batch]
        batch = cache.batch(some)
        table, lengths = host(batch.block_table), host(batch.cache_seqlens)
        assert table.shape == (len(some), cache.max_pages_per_sequence)
        assert lengths.tolist() == [cache.length(name) for name in some]
        for name, row, length in zip(some, table, lengths):
            found[name] = row[: -(-length // cache.page_size)].tolist()
    return found


def assert_holds(cache: PagedKVCache, expected: dict[int, list[int]], sequences: list[int] | None = None) -> None:
    """The cache has exactly these sequences with these tokens, and each page is owned as it should be."""
    found = tables(cache, sequences)
    assert found.keys() == expected.keys() == set(cache.sequences)
    contents = [bits(cache.pages(layer)) for layer in range(cache.num_layers)]
    assert all(pages.shape == (cache.num_pages, cache.page_size, row_dims(cache)) for pages in contents)
    for name, tokens in expected.items():
        for layer, pages in enumerate(contents):
            read = pages[found[name]].reshape(-1, pages.shape[-1])[: len(tokens)]
            assert np.array_equal(read, rows(cache, layer, tokens).view(np.int16)), f"sequence {name}, layer {layer}"

    owners = Counter(page for pages in found.values() for page in pages)
    assert all(len(set(pages)) == len(pages) for pages in found.values()), "a sequence has a page twice"
    stats = cache.stats()
    assert stats.total == cache.num_pages == stats.free + stats.used
    assert stats.used == len(owners), "a page is leaked or owned without being used"
    assert stats.shared == sum(count > 1 for count in owners.values())
    assert stats.tokens == sum(map(len, expected.values()))


class CacheMachine(RuleBasedStateMachine):
    """Random reserve, write, fork, truncate, free, export and import, against lists of token numbers.

    Subclasses set `library`.
    """

    library: Library
    dims = (16, 8)
    page_sizes: tuple[int, ...] = (1, 2, 3, 16, 64)
    num_pages = 24

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        self.cache = self.library.cache(
            self.num_pages,
            data.draw(st.sampled_from(self.page_sizes), "page size"),
            data.draw(st.sampled_from(("bfloat16", "float16")), "dtype"),
            num_layers=LAYERS,
            latent_dim=self.dims[0],
            rope_dim=self.dims[1],
            max_batch=MOST_SEQUENCES,
        )
        self.model: dict[int, list[int]] = {self.cache.new_sequence(): []}
        self.next_token = 0
        self.seed = 0  # of the order of the sequences in a batch

    def tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def order(self) -> list[int]:
        return random.Random(self.seed).sample(sorted(self.model), len(self.model))

    def draw_sequence(self, data: Any) -> int:
        return data.draw(st.sampled_from(sorted(self.model)), "sequence")

    def reserve(self, data: Any) -> tuple[Any, list[int]] | None:
        """Slots for some new tokens of some sequences, which the model gets too; None without enough pages."""
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1, max_size=4), "chosen")
        most = min(3 * self.cache.page_size, 80)
        counts = [data.draw(st.integers(0, most), "count") for _ in chosen]
        before = self.cache.stats(), tables(self.cache)
        spare = data.draw(st.none() | st.integers(0, 3), "spare elements of out")
        out = None if spare is None else self.library.array(np.full(sum(counts) + spare, 7, np.int64))
        try:
            slots = self.cache.reserve(chosen, counts, out=out)
        except OutOfPagesError as error:
            assert error.asked > error.free == before[0].free
            assert before == (self.cache.stats(), tables(self.cache))
            return None
        assert out is None or (slots is out and (host(out)[sum(counts) :] == -1).all())
        new = []
        for name, count in zip(chosen, counts):
            self.model[name].extend(self.tokens(count))
            new += self.model[name][len(self.model[name]) - count :]
        return slots, new + [-1] * (spare or 0)

    @rule()
    @precondition(lambda self: len(self.model) < MOST_SEQUENCES)
    def new_sequence(self) -> None:
        name = self.cache.new_sequence()
        assert name not in self.model
        self.model[name] = []

    @rule(data=st.data(), wide=st.booleans())
    @precondition(lambda self: self.model)
    def step(self, data: Any, wide: bool) -> None:
        reserved = self.reserve(data)
        if reserved:
            write_tokens(self.library, self.cache, *reserved, wide)

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def two_steps_written_in_reverse(self, data: Any) -> None:
        for reserved in [self.reserve(data), self.reserve(data)][::-1]:
            if reserved:
                write_tokens(self.library, self.cache, *reserved)

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.model) < MOST_SEQUENCES)
    def fork(self, data: Any) -> None:
        parent = self.draw_sequence(data)
        self.model[self.cache.fork(parent)] = list(self.model[parent])

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def truncate(self, data: Any) -> None:
        name = self.draw_sequence(data)
        old = len(self.model[name])
        length = old - data.draw(st.integers(0, min(old, 2 * self.cache.page_size + 1)), "dropped")
        self.cache.truncate(name, length)
        del self.model[name][length:]

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def free(self, data: Any) -> None:
        name = self.draw_sequence(data)
        self.cache.free(name)
        del self.model[name]

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.model) < MOST_SEQUENCES)
    def export_and_import(self, data: Any) -> None:
        name = self.draw_sequence(data)
        exported = self.cache.export(name)
        try:
            self.model[self.cache.import_(exported)] = list(self.model[name])
        except OutOfPagesError as error:
            assert error.asked > error.free == self.cache.stats().free

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def batch_of_one(self, data: Any) -> None:
        name = self.draw_sequence(data)
        assert host(self.cache.batch([name]).cache_seqlens).tolist() == [len(self.model[name])]

    @rule(seed=st.integers(0, 1000))
    def reorder_batches(self, seed: int) -> None:
        self.seed = seed

    @invariant()
    def cache_holds_the_model(self) -> None:
        assert_holds(self.cache, self.model, self.order())

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for name in self.model:
                self.cache.free(name)
            assert self.cache.stats().free == self.num_pages
            whole = self.cache.new_sequence()
            add(self.library, self.cache, whole, self.tokens(self.num_pages * self.cache.page_size))
            assert sorted(tables(self.cache)[whole]) == list(range(self.num_pages))


class DecodingMachine(CacheMachine):
    """The same walk with sizes that mla_decode takes; it must not notice whose pages it reads."""

    dims = (256, 64)
    page_sizes = (64, 128)
    num_pages = 12

    @invariant()
    def decode_sees_the_tokens(self) -> None:
        names = self.order()[:4]
        if names:
            q = np.random.default_rng(self.next_token).standard_normal((len(names), 1, 2, sum(self.dims)), np.float32)
            assert_decodes(self.library, self.cache, names, [self.model[name] for name in names], q)


def assert_decodes(
    library: Library, cache: PagedKVCache, sequences: list[int], tokens: list[list[int]], q: NDArray[np.float32]
) -> None:
    """Decoding through the cache gives the same bits as decoding pages that hold just these tokens, in order."""
    queries = library.array(q.astype(NUMPY_DTYPES[cache.dtype]))
    columns = max(1, *(-(-len(some) // cache.page_size) for some in tokens))
    table = np.arange(len(tokens) * columns, dtype=np.int32).reshape(len(tokens), columns)
    lengths = np.array([len(some) for some in tokens], np.int32)
    for layer in range(cache.num_layers):
        pages = np.zeros((table.size * cache.page_size, row_dims(cache)), NUMPY_DTYPES[cache.dtype])
        for i, some in enumerate(tokens):
            first = i * columns * cache.page_size
            pages[first : first + len(some)] = rows(cache, layer, some)
        plain = library.array(pages.reshape(-1, cache.page_size, row_dims(cache)))
        expected = mla_decode(
            queries, plain, library.array(table), library.array(lengths), softmax_scale=DEEPSEEK_SCALE
        )
        batch = cache.batch(sequences)
        out = mla_decode(queries, cache.pages(layer), *batch, softmax_scale=DEEPSEEK_SCALE)
        assert np.array_equal(bits(out), bits(expected))


# ---- What a cache of any library has to do ----


def assert_tokens_come_back(library: Library, page_size: int, dtype: str, wide: bool = False, **sizes: Any) -> None:
    """Two prompts and then step after step, each written in one call for both sequences."""
    cache = library.cache(700 // page_size + 4, page_size, dtype, **sizes)
    a, b = cache.new_sequence(), cache.new_sequence()
    expected = {a: list(range(130)), b: list(range(200, 463))}
    write_tokens(library, cache, cache.reserve([a, b], [130, 263]), expected[a] + expected[b], wide)
    for step in range(70):
        write_tokens(library, cache, cache.reserve([b, a], [1, 2]), [1000 + step, 2000 + step, 3000 + step], wide)
        expected[b].append(1000 + step)
        expected[a] += [2000 + step, 3000 + step]
    assert_holds(cache, expected)


def assert_forks_decode(library: Library) -> None:
    """A sequence, its fork, which both go on by themselves, and a third decode through the cache."""
    cache = library.cache(12, 64, latent_dim=256)
    a, b = cache.new_sequence(), cache.new_sequence()
    tokens = {a: list(range(200)), b: list(range(500, 565))}
    for name in (a, b):
        add(library, cache, name, tokens[name])
    c = cache.fork(a)
    tokens[c] = [*tokens[a], 900]
    add(library, cache, c, [900])
    add(library, cache, a, [901])
    tokens[a] = [*tokens[a], 901]
    q = np.random.default_rng(0).standard_normal((3, 1, 4, 320), np.float32)
    assert_decodes(library, cache, [c, b, a], [tokens[c], tokens[b], tokens[a]], q)
