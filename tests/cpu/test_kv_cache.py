"""PagedKVCache on the CPU: its bookkeeping, which GPUs share, and the tokens as NumPy and torch keep them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

from etap_rt.compiler import build_report, compile_spec
from etap_rt.errors import (
    ArgumentError,
    ArgumentTypeError,
    EtapError,
    OutOfPagesError,
    SequenceError,
    UnsupportedError,
)
from etap_rt.kernels import batch_update_spec, kv_write_spec, page_copy_spec
from etap_rt.kv_cache import PagedKVCache
from tests.cache_model import (
    NUMPY,
    TORCH,
    CacheMachine,
    DecodingMachine,
    Library,
    add,
    assert_forks_decode,
    assert_holds,
    assert_tokens_come_back,
    bits,
    host,
    rows,
    tables,
    write_tokens,
)
from tests.cases import NUMPY_DTYPES

SMALL = {"num_layers": 2, "latent_dim": 16, "rope_dim": 8}


@pytest.fixture(params=[NUMPY, TORCH], ids=str)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param is TORCH:
        pytest.importorskip("torch")
    return request.param


def small_cache(num_pages: int = 16, page_size: int = 4, **sizes: Any) -> PagedKVCache:
    return NUMPY.cache(num_pages, page_size, **{**SMALL, **sizes})


# ---- Against the model ----


class NumpyMachine(CacheMachine):
    library = NUMPY


class NumpyDecodingMachine(DecodingMachine):
    library = NUMPY


TestRandomWalk = NumpyMachine.TestCase
TestRandomWalk.settings = settings(max_examples=150, stateful_step_count=50)
TestRandomWalkWithDecode = NumpyDecodingMachine.TestCase
TestRandomWalkWithDecode.settings = settings(max_examples=12, stateful_step_count=25)


# ---- Tokens ----


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64, 100, 256])
def test_tokens_come_back_whatever_the_page_size(library: Library, page_size: int, dtype: str) -> None:
    assert_tokens_come_back(library, page_size, dtype, **SMALL)


def test_arrays_are_of_the_library_that_dtype_and_device_name(library: Library) -> None:
    cache = library.cache(2, 4, **SMALL)
    a = cache.new_sequence()
    kind = type(library.array(np.zeros(1, np.int32)))
    arrays = [cache.reserve([a], [3]), *cache.batch([a]), cache.pages(0), *cache.export(a)]
    assert all(type(x) is kind for x in arrays)
    assert [str(x.dtype).removeprefix("torch.") for x in arrays] == ["int32"] * 3 + ["bfloat16"] * 3


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype(np.float16), "bfloat16", ml_dtypes.bfloat16])
def test_dtype_may_be_a_name_or_a_numpy_dtype(dtype: Any) -> None:
    assert PagedKVCache(2, dtype=dtype, device="cpu").pages(0).dtype == np.dtype(dtype)


def test_a_torch_device_makes_torch_arrays() -> None:
    torch = pytest.importorskip("torch")
    cache = PagedKVCache(2, dtype="float16", device=torch.device("cpu"))
    assert cache.pages(0).dtype is torch.float16 and cache.device == "cpu"


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_float32_rows_are_rounded_to_nearest_even(library: Library, dtype: str) -> None:
    cache = library.cache(1, 1024, dtype, latent_dim=16, rope_dim=8)
    values = np.random.default_rng(0).standard_normal((1000, 24), np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -0.0, 1e-42, 1e-7, np.inf], np.float32)
    values[0, :8] = values[1, 16:] = ties
    packed = library.array(values)
    cache.write(0, cache.reserve([cache.new_sequence()], [1000]), packed[:, :16], packed[:, 16:])
    expected = values.astype(NUMPY_DTYPES[dtype])
    assert np.array_equal(bits(cache.pages(0))[0, :1000], expected.view(np.int16))


def test_values_too_large_for_fp16_become_infinite() -> None:
    cache = NUMPY.cache(1, 1, "float16", **SMALL)
    cache.write(
        0, cache.reserve([cache.new_sequence()], [1]), np.full((1, 16), 1e6, np.float32), np.ones((1, 8), np.float32)
    )
    assert np.isposinf(cache.pages(0)[0, 0, :16]).all() and (cache.pages(0)[0, 0, 16:] == 1).all()


def test_latent_and_rope_may_have_different_dtypes_and_strides() -> None:
    cache = small_cache()
    wide = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    narrow = np.random.default_rng(1).standard_normal((10, 24)).astype(ml_dtypes.bfloat16)
    slots = cache.reserve([cache.new_sequence()], [5])
    cache.write(1, slots, wide[:, 32:48], narrow[::2, 8:16])
    read = cache.export(0)
    assert np.array_equal(bits(read.latent[1]), bits(wide[:, 32:48].astype(ml_dtypes.bfloat16)))
    assert np.array_equal(bits(read.rope[1]), bits(narrow[::2, 8:16].copy()))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slot_minus_one_is_skipped(library: Library, dtype: Any) -> None:
    cache = library.cache(4, 4, **SMALL)
    a = cache.new_sequence()
    add(library, cache, a, [0, 1, 2])
    untouched = bits(cache.pages(0))
    slots = host(cache.reserve([a], [2])).astype(dtype)
    slots[0] = -1
    write_tokens(library, cache, library.array(slots), [3, 4])
    written = bits(cache.pages(0))
    assert np.array_equal(written[0, :4], untouched[0, :4])
    assert np.array_equal(written[1, 0], rows(cache, 0, [4])[0].view(np.int16))


def test_page_0_is_a_page_like_any_other() -> None:
    cache = small_cache(num_pages=1)
    a = cache.new_sequence()
    add(NUMPY, cache, a, [1, 2, 3, 4])
    assert tables(cache) == {a: [0]}
    assert_holds(cache, {a: [1, 2, 3, 4]})


def test_decode_reads_through_the_cache(library: Library) -> None:
    assert_forks_decode(library)


# ---- Forks ----


def test_a_fork_shares_all_pages_until_one_of_them_writes() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4, 5])
    c = cache.fork(a)
    assert tables(cache) == {a: [0, 1], c: [0, 1]}
    assert cache.stats()[:4] == (16, 14, 2, 2)

    add(NUMPY, cache, a, [6])
    assert tables(cache) == {a: [0, 2], c: [0, 1]}
    add(NUMPY, cache, c, [7])
    assert tables(cache) == {a: [0, 2], c: [0, 1]}, "the last owner writes in place"
    assert_holds(cache, {a: [0, 1, 2, 3, 4, 5, 6], c: [0, 1, 2, 3, 4, 5, 7]})


def test_owners_that_write_in_the_same_step_copy_one_page_less_than_they_are() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1])
    family = [a, cache.fork(a), cache.fork(a)]
    write_tokens(NUMPY, cache, cache.reserve(family, [1, 1, 1]), [2, 3, 4])
    assert cache.stats().used == 3
    assert_holds(cache, {name: [0, 1, 2 + i] for i, name in enumerate(family)})


def test_a_fork_at_a_page_border_copies_nothing() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3])
    c = cache.fork(a)
    add(NUMPY, cache, c, [4])
    assert tables(cache) == {a: [0], c: [0, 1]}
    assert cache.stats().shared == 1


def test_reserving_no_tokens_copies_no_page() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0])
    c = cache.fork(a)
    assert len(cache.reserve([a, c], [0, 0])) == 0
    assert tables(cache) == {a: [0], c: [0]}


def test_many_forks_of_a_prompt_hold_it_once() -> None:
    cache = small_cache(num_pages=500, max_batch=512)
    root = cache.new_sequence()
    prompt = list(range(402))  # 100 full pages and a half
    add(NUMPY, cache, root, prompt)
    leaves = [cache.fork(root) for _ in range(200)]
    assert cache.stats()[1:4] == (399, 101, 101)
    cache.free(root)
    expected = {leaf: list(prompt) for leaf in leaves}
    for _ in range(2):
        tokens = [1000 * leaf + i for leaf in leaves for i in range(3)]
        write_tokens(NUMPY, cache, cache.reserve(leaves, [3] * 200), tokens)
        for leaf in leaves:
            expected[leaf] += [1000 * leaf + i for i in range(3)]
        assert cache.stats()[1:4] == (0, 500, 100), "each leaf has two pages of its own"
    with pytest.raises(OutOfPagesError) as caught:
        cache.reserve(leaves, [1] * 200)
    assert (caught.value.asked, caught.value.free) == (200, 0)
    assert_holds(cache, expected)


def test_a_fork_outlives_its_parent() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    c = cache.fork(cache.fork(a))
    cache.free(a)
    cache.free(1)
    add(NUMPY, cache, c, [5])
    assert_holds(cache, {c: [0, 1, 2, 3, 4, 5]})
    assert tables(cache) == {c: [0, 1]}


def test_a_truncated_fork_does_not_write_into_its_parent() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4, 5])
    c = cache.fork(a)
    cache.truncate(c, 2)
    add(NUMPY, cache, c, [7, 8, 9])
    assert_holds(cache, {a: [0, 1, 2, 3, 4, 5], c: [0, 1, 7, 8, 9]})


# ---- Pages come and go ----


def test_truncate_gives_back_what_lies_behind() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, list(range(10)))
    cache.truncate(a, 5)
    assert (cache.length(a), cache.stats().used) == (5, 2)
    cache.truncate(a, 4)
    assert cache.stats().used == 1
    cache.truncate(a, 0)
    assert cache.stats() == (16, 16, 0, 0, 0, cache.stats().bytes)
    add(NUMPY, cache, a, [77])
    assert_holds(cache, {a: [77]})


@pytest.mark.parametrize("page_size", [1, 4])
def test_rejected_draft_tokens_are_rolled_back_step_after_step(page_size: int) -> None:
    cache = small_cache(num_pages=100, page_size=page_size)
    a = cache.new_sequence()
    kept: list[int] = []
    for step in range(30):
        add(NUMPY, cache, a, [10 * step, 10 * step + 1, 10 * step + 2])
        accepted = 1 + step % 3
        cache.truncate(a, len(kept) + accepted)
        kept += [10 * step + i for i in range(accepted)]
        assert_holds(cache, {a: kept})


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    cache = small_cache(num_pages=4)
    a, b = cache.new_sequence(), cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    with pytest.raises(OutOfPagesError, match="asked for 3, 2 are free") as caught:
        cache.reserve([a, b], [4, 5])
    assert (caught.value.asked, caught.value.free) == (3, 2)
    assert_holds(cache, {a: [0, 1, 2, 3, 4], b: []})
    add(NUMPY, cache, b, [5, 6, 7, 8, 9])
    cache.free(a)
    add(NUMPY, cache, b, [10, 11, 12, 13])
    assert_holds(cache, {b: list(range(5, 14))})


def test_the_copy_of_a_shared_page_counts_when_pages_run_out() -> None:
    cache = small_cache(num_pages=2)
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    c = cache.fork(a)
    with pytest.raises(OutOfPagesError) as caught:
        cache.reserve([c], [1])
    assert (caught.value.asked, caught.value.free) == (1, 0)
    assert_holds(cache, {a: [0, 1, 2, 3, 4], c: [0, 1, 2, 3, 4]})
    cache.free(a)
    add(NUMPY, cache, c, [5])


def test_an_import_that_does_not_fit_leaves_no_sequence() -> None:
    cache = small_cache(num_pages=3)
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    with pytest.raises(OutOfPagesError):
        cache.import_(cache.export(a))
    assert_holds(cache, {a: [0, 1, 2, 3, 4]})


# ---- Batches ----


def test_batch_buffers_never_move(library: Library) -> None:
    cache = library.cache(16, 4, **SMALL, max_batch=3)
    a, b = cache.new_sequence(), cache.new_sequence()
    full = cache.batch([a, b], rows=3)
    for step in range(20):
        add(library, cache, a, [step])
        batch = cache.batch([a, b] if step % 2 else [b, a])
        assert host(batch.cache_seqlens).tolist() == ([step + 1, 0] if step % 2 else [0, step + 1])
        for new, old in zip(batch, full):
            assert host(new).ctypes.data == host(old).ctypes.data and host(new).strides == host(old).strides
    cache.free(a)
    cache.batch([b])
    assert host(full.cache_seqlens).tolist() == [0, 0, 0], "requests that left have no tokens"


def test_batch_follows_sequences_that_change_rows_and_repeat() -> None:
    cache = small_cache()
    names = [cache.new_sequence() for _ in range(3)]
    for name in names:
        add(NUMPY, cache, name, list(range(10 * name, 10 * name + 5)))
    a, b, c = names
    pages = tables(cache)
    for order in ([a, b, c], [c, a], [a, a, b], [b, a, a], [a], [b], [a], [c, b, a]):
        batch = cache.batch(order)
        assert [row[:2].tolist() for row in batch.block_table] == [pages[name] for name in order]


# ---- Slots ----


def test_reserve_fills_an_array_of_the_caller_and_pads_it(library: Library) -> None:
    cache = library.cache(16, 4, **SMALL)
    a, b = cache.new_sequence(), cache.new_sequence()
    for dtype in (np.int32, np.int64):
        out = library.array(np.zeros(6, dtype))
        assert cache.reserve([b, a], [1, 3], out=out) is out
        assert host(out)[4:].tolist() == [-1, -1]
        write_tokens(library, cache, out, [0, 1, 2, 3, 99, 99])
    assert_holds(cache, {a: [1, 2, 3, 1, 2, 3], b: [0, 0]})


def test_an_array_of_slots_may_be_filled_again(library: Library) -> None:
    """What it held before, which was truncated, is no concern of the tokens that it stands for now."""
    cache = library.cache(16, 4, **SMALL)
    a = cache.new_sequence()
    slots = cache.reserve([a], [3])
    write_tokens(library, cache, slots, [0, 1, 2])
    cache.truncate(a, 1)
    assert cache.reserve([a], [2], out=slots) is slots
    write_tokens(library, cache, slots, [5, 6, 99])
    assert_holds(cache, {a: [0, 5, 6]})


@pytest.mark.parametrize("event", ["free", "truncate", "fork"])
def test_slots_that_went_stale_are_refused(event: str) -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0])
    slots = cache.reserve([a], [2])
    expected = {a: [0, 1, 2]}
    if event == "free":
        cache.free(a)
        b = cache.new_sequence()
        add(NUMPY, cache, b, [5, 6])
        expected = {b: [5, 6]}
    elif event == "truncate":
        cache.truncate(a, 1)
        add(NUMPY, cache, a, [5, 6])
        expected = {a: [0, 5, 6]}
    else:
        write_tokens(NUMPY, cache, slots, [1, 2])
        c = cache.fork(a)
        add(NUMPY, cache, c, [3])
        expected[c] = [0, 1, 2, 3]
    with pytest.raises(SequenceError, match="slots"):
        write_tokens(NUMPY, cache, slots, [8, 9])
    assert_holds(cache, expected)


def test_slots_stay_good_while_other_sequences_change() -> None:
    cache = small_cache()
    a, b = cache.new_sequence(), cache.new_sequence()
    add(NUMPY, cache, b, [7, 8])
    slots = cache.reserve([a], [3])
    c = cache.fork(b)
    add(NUMPY, cache, c, [9])
    cache.truncate(b, 1)
    cache.free(b)
    write_tokens(NUMPY, cache, slots, [0, 1, 2])
    d = cache.fork(a)
    write_tokens(NUMPY, cache, slots, [0, 1, 2])
    assert_holds(cache, {a: [0, 1, 2], c: [7, 8, 9], d: [0, 1, 2]})


# ---- Errors ----


def rows_of(count: int, latent: int = 16, rope: int = 8, dtype: Any = np.float32) -> tuple[Any, Any]:
    return np.zeros((count, latent), dtype), np.zeros((count, rope), dtype)


MISTAKES: dict[str, tuple[type[EtapError], str, Callable[[PagedKVCache], Any]]] = {
    "freed sequence": (SequenceError, "sequence 2 was freed", lambda c: c.reserve([0, 2], [1, 1])),
    "unknown sequence": (SequenceError, "sequence 9 is unknown", lambda c: c.fork(9)),
    "freeing twice": (SequenceError, "sequence 2 was freed", lambda c: c.free(2)),
    "unhashable sequence": (SequenceError, "is unknown", lambda c: c.length([])),
    "no list of sequences": (ArgumentTypeError, "sequences: got 0", lambda c: c.batch(0)),
    "sequence twice": (ArgumentError, "sequences: got one of them twice", lambda c: c.reserve([0, 0], [1, 1])),
    "too few counts": (ArgumentError, "counts: got 1 of them", lambda c: c.reserve([0, 1], [1])),
    "negative count": (ArgumentError, r"counts\[1\]: got -1", lambda c: c.reserve([0, 1], [1, -1])),
    "fractional count": (ArgumentTypeError, "counts", lambda c: c.reserve([0], [1.5])),
    "longer than allowed": (ArgumentError, r"counts\[1\]: got 30", lambda c: c.reserve([0, 1], [1, 30])),
    "out too short": (ArgumentError, "out: got 2 elements", lambda c: c.reserve([0], [3], out=np.zeros(2, np.int32))),
    "out of floats": (ArgumentError, "out: got float32", lambda c: c.reserve([0], [1], out=np.zeros(2, np.float32))),
    "out with gaps": (ArgumentError, "out", lambda c: c.reserve([0], [1], out=np.zeros(8, np.int32)[::2])),
    "out not an array": (ArgumentTypeError, "out", lambda c: c.reserve([0], [1], out=[0, 0])),
    "longer by truncation": (ArgumentError, "length: got 6", lambda c: c.truncate(0, 6)),
    "negative length": (ArgumentError, "length: got -1", lambda c: c.truncate(0, -1)),
    "fractional length": (ArgumentTypeError, "length", lambda c: c.truncate(0, 1.0)),
    "batch too large": (
        ArgumentError,
        r"sequences: got 5, accepted is 0 \.\.\. 4",
        lambda c: c.batch([0, 1] * 2 + [0]),
    ),
    "rows too few": (ArgumentError, "rows: got 1", lambda c: c.batch([0, 1], rows=1)),
    "rows too many": (ArgumentError, "rows: got 5", lambda c: c.batch([0, 1], rows=5)),
    "wrong layer": (ArgumentError, r"layer: got 2, accepted is 0 \.\.\. 1", lambda c: c.pages(2)),
    "negative layer": (ArgumentError, "layer: got -1", lambda c: c.write(-1, np.array([8]), *rows_of(1))),
    "layer by name": (ArgumentTypeError, "layer: got 'first'", lambda c: c.pages("first")),
    "more tokens than slots": (ArgumentError, "latent: got shape", lambda c: c.write(0, np.array([1]), *rows_of(2))),
    "rope too wide": (ArgumentError, "rope: got shape", lambda c: c.write(0, np.array([1]), *rows_of(1, rope=16))),
    "other 16-bit dtype": (
        ArgumentError,
        "latent: got float16, accepted is bfloat16",
        lambda c: c.write(0, np.array([1]), *rows_of(1, dtype=np.float16)),
    ),
    "float64": (ArgumentError, "latent: got float64", lambda c: c.write(0, np.array([1]), *rows_of(1, dtype=float))),
    "columns with gaps": (
        ArgumentError,
        "latent: got strides",
        lambda c: c.write(0, np.array([1, 2]), np.zeros((16, 2), np.float32).T, rows_of(2)[1]),
    ),
    "slots in two dims": (ArgumentError, "slots: got shape", lambda c: c.write(0, np.array([[1]]), *rows_of(1))),
    "slots of floats": (ArgumentError, "slots: got float64", lambda c: c.write(0, np.array([1.0]), *rows_of(1))),
    "slots in a list": (ArgumentTypeError, "slots", lambda c: c.write(0, [1], *rows_of(1))),
    "slot past the end": (ArgumentError, r"slots\[1\]: got 64", lambda c: c.write(0, np.array([1, 64]), *rows_of(2))),
    "slot below -1": (ArgumentError, r"slots\[0\]: got -2", lambda c: c.write(0, np.array([-2]), *rows_of(1))),
    "slot nobody has": (
        ArgumentError,
        r"slots\[0\]: got 40, in free",
        lambda c: c.write(0, np.array([40]), *rows_of(1)),
    ),
    "import of one array": (ArgumentTypeError, "source: got ndarray", lambda c: c.import_(np.zeros(3))),
    "import of few layers": (
        ArgumentError,
        "latent: got shape",
        lambda c: c.import_((np.zeros((1, 3, 16), ml_dtypes.bfloat16), np.zeros((1, 3, 8), ml_dtypes.bfloat16))),
    ),
    "import of unlike lengths": (
        ArgumentError,
        "rope: got shape",
        lambda c: c.import_((np.zeros((2, 3, 16), ml_dtypes.bfloat16), np.zeros((2, 4, 8), ml_dtypes.bfloat16))),
    ),
    "import of another dtype": (
        ArgumentError,
        "latent: got float32",
        lambda c: c.import_((np.zeros((2, 3, 16), np.float32), np.zeros((2, 3, 8), np.float32))),
    ),
    "import too long": (
        ArgumentError,
        "^source: got 33 tokens, accepted is at most 32",
        lambda c: c.import_((np.zeros((2, 33, 16), ml_dtypes.bfloat16), np.zeros((2, 33, 8), ml_dtypes.bfloat16))),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_the_cache_as_it_was(mistake: str) -> None:
    cache = small_cache(max_batch=4, max_pages_per_sequence=8)
    a, b, freed = (cache.new_sequence() for _ in range(3))
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    add(NUMPY, cache, b, [5, 6, 7])
    cache.free(freed)
    before = cache.stats(), tables(cache)
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(cache)
    assert before == (cache.stats(), tables(cache))
    assert_holds(cache, {a: [0, 1, 2, 3, 4], b: [5, 6, 7]})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_pages", {"num_pages": 0}),
        ("page_size", {"page_size": 0}),
        ("num_layers", {"num_layers": -1}),
        ("latent_dim", {"latent_dim": 12}),
        ("rope_dim", {"rope_dim": 4}),
        ("latent_dim \\+ rope_dim", {"latent_dim": 2560}),
        ("num_pages \\* page_size", {"num_pages": 1 << 25}),
        ("max_batch \\* max_pages_per_sequence", {"max_batch": 1 << 28}),
        ("max_pages_per_sequence", {"max_pages_per_sequence": 0}),
        ("dtype", {"dtype": "float32"}),
        ("dtype", {"dtype": "brain"}),
        ("device", {"device": "tpu"}),
        ("device", {"device": 0}),
    ],
)
def test_a_cache_that_cannot_be_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        PagedKVCache(**{"num_pages": 16, "device": "cpu", **arguments})


def test_sizes_that_are_no_integers_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="page_size: got '64'"):
        PagedKVCache(16, "64", device="cpu")  # type: ignore[arg-type]


# ---- Save and restore ----


def test_export_and_import_keep_every_bit(library: Library, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache = library.cache(16, 4, **SMALL)
    a = cache.new_sequence()
    patterns = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (2, 11, 24), np.int16)  # NaN of all kinds
    slots = cache.reserve([a], [11])
    for layer in range(2):
        packed = library.array(patterns[layer].view(ml_dtypes.bfloat16))
        cache.write(layer, slots, packed[:, :16], packed[:, 16:])

    exported = cache.export(a, tmp_path / "prompt.safetensors")
    assert np.array_equal(bits(exported.latent), patterns[..., :16])
    assert np.array_equal(bits(exported.rope), patterns[..., 16:])
    for source in (exported, tmp_path / "prompt.safetensors", str(tmp_path / "prompt.safetensors")):
        again = cache.export(cache.import_(source))
        assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(again, exported))


def test_a_prompt_moves_to_a_cache_of_another_page_size() -> None:
    small, large = small_cache(), small_cache(num_pages=3, page_size=5)
    a = small.new_sequence()
    add(NUMPY, small, a, list(range(9)))
    b = large.import_(small.export(a))
    add(NUMPY, large, b, [9, 10])
    assert_holds(large, {b: list(range(11))})


def test_an_empty_sequence_can_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache = small_cache()
    cache.export(cache.new_sequence(), tmp_path / "empty.safetensors")
    assert cache.length(cache.import_(tmp_path / "empty.safetensors")) == 0


def test_torch_reads_an_exported_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2])
    exported = cache.export(a, tmp_path / "prompt.safetensors")
    loaded = safetensors.load_file(tmp_path / "prompt.safetensors")
    assert loaded["latent"].dtype is torch.bfloat16 and loaded["rope"].shape == (2, 3, 8)
    assert np.array_equal(bits(loaded["latent"]), bits(exported.latent))


def test_files_that_are_not_from_export_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    cache = small_cache()
    (tmp_path / "text").write_text("not at all")
    safetensors.save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    for name in ("text", "model.safetensors"):
        with pytest.raises(ArgumentError, match=f"source: got .*{name}"):
            cache.import_(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        cache.import_(tmp_path / "missing")
    assert cache.sequences == ()


def test_a_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    cache = small_cache()
    for dtype, message in (("float32", "latent: got float32"), ("float8_e4m3fn", "source: got .*float8_e4m3fn")):
        parts = {"latent": torch.zeros(2, 3, 16), "rope": torch.zeros(2, 3, 8)}
        save_file({name: x.to(getattr(torch, dtype)) for name, x in parts.items()}, tmp_path / dtype)
        with pytest.raises(ArgumentError, match=message):
            cache.import_(tmp_path / dtype)
    assert cache.sequences == () and cache.stats().used == 0


def test_without_safetensors_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = small_cache()
    a = cache.new_sequence()
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="needed: the package safetensors"):
        cache.export(a, tmp_path / "file")
    with pytest.raises(UnsupportedError, match="needed: the package safetensors"):
        cache.import_(tmp_path / "file")


# ---- To look at ----


def test_repr_says_how_full_the_cache_is() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, [0, 1, 2, 3, 4])
    cache.fork(a)
    assert repr(cache) == (
        "<PagedKVCache bfloat16 on cpu, 2 layers of 16 + 8 dims: 2 of 16 pages of 4 used, 2 shared, "
        "2 sequences, 10 tokens, 6.1 kB>"
    )


def test_html_shows_sequences_and_shared_pages() -> None:
    cache = small_cache()
    a = cache.new_sequence()
    add(NUMPY, cache, a, list(range(9)))
    c = cache.fork(a)
    add(NUMPY, cache, c, [9])
    html = cache._repr_html_()
    for name, tokens in ((a, 9), (c, 10)):
        assert f"<td>{name}</td><td>{tokens}</td><td>3</td><td>2</td>" in html
    assert "&lt;PagedKVCache" in html and html.count("<div") == html.count("</div>")


def test_html_of_many_sequences_stays_short() -> None:
    cache = small_cache()
    for _ in range(100):
        cache.new_sequence()
    html = cache._repr_html_()
    assert "and 68 more sequences" in html and html.count("<tr>") == 33


# ---- Cost ----


def step_times(page_size: int) -> list[float]:
    """Of 1024 sequences that grow by a token each, 65 times, which is over a page border; in ms."""
    tokens = 4096
    pages = -(-(tokens + 70) // page_size)
    cache = PagedKVCache(1024 * pages, page_size, 1, 8, 8, device="cpu", max_batch=1024, max_pages_per_sequence=pages)
    sequences = [cache.new_sequence() for _ in range(1024)]
    cache.reserve(sequences, [tokens] * 1024)
    cache.batch(sequences)
    times = []
    for _ in range(65):
        start = time.perf_counter()
        cache.reserve(sequences, [1] * 1024)
        times.append(1e3 * (time.perf_counter() - start))
        cache.batch(sequences)
    return times


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_step_of_1024_sequences_takes_less_than_2_ms(page_size: int) -> None:
    """A virtual processor may lose half its speed for seconds, so this looks again for a minute before it gives up."""
    times = step_times(page_size)
    end = time.monotonic() + 60
    while min(times) >= 2 and time.monotonic() < end:
        times += step_times(page_size)
    assert min(times) < 2, f"median {statistics.median(times):.2f} ms"


@pytest.mark.parametrize("spec", [kv_write_spec(), page_copy_spec(), batch_update_spec()], ids=str)
def test_kernels_build_without_spills(spec: Any) -> None:
    report = build_report(compile_spec(spec))
    assert (report.spill_stores, report.spill_loads, report.stack) == (0, 0, 0)
    assert report.registers <= 64
