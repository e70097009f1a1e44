"""PagedKVCache on a GPU: the kernels against NumPy, the order of work on the stream, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from etap_rt import kv_memory, mla_decode
from etap_rt.errors import ArgumentError, UnsupportedError
from etap_rt.kv_cache import PagedKVCache
from tests.cache_model import (
    CUPY,
    NUMPY,
    TORCH_CUDA,
    CacheMachine,
    DecodingMachine,
    Library,
    add,
    assert_forks_decode,
    assert_holds,
    assert_tokens_come_back,
    bits,
    host,
    row_dims,
    rows,
    tables,
    write_tokens,
)
from tests.cases import DEEPSEEK_SCALE, NUMPY_DTYPES

PAGE_SIZES = (1, 16, 64, 256)
SMALL = {"num_layers": 3, "latent_dim": 256, "rope_dim": 64}


@pytest.fixture(params=[CUPY, TORCH_CUDA], ids=str)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param is TORCH_CUDA and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch without CUDA")
    return request.param


@pytest.fixture
def stream() -> Iterator[Any]:
    """A CuPy stream of its own, current during the test."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as current:
        yield current
        current.synchronize()


def hold_up(milliseconds: int) -> None:
    """Keep the current stream busy for some time."""
    import cupy

    wait = cupy.RawKernel(
        r"""
        extern "C" __global__ void wait(long long nanoseconds) {
            long long begin, now;
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
            do {
                asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
            } while (now - begin < nanoseconds);
        }
        """,
        "wait",
    )
    wait((1,), (1,), (np.int64(milliseconds * 1_000_000),))


# ---- Against the model ----


class CupyMachine(CacheMachine):
    library = CUPY


class CupyDecodingMachine(DecodingMachine):
    library = CUPY


TestRandomWalk = CupyMachine.TestCase
TestRandomWalk.settings = settings(max_examples=20, stateful_step_count=40)
TestRandomWalkWithDecode = CupyDecodingMachine.TestCase
TestRandomWalkWithDecode.settings = settings(max_examples=5, stateful_step_count=25)


# ---- Writing ----


@pytest.mark.parametrize("wide", [False, True], ids=["16-bit", "float32"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_tokens_come_back_whatever_the_page_size(library: Library, page_size: int, dtype: str, wide: bool) -> None:
    assert_tokens_come_back(library, page_size, dtype, wide, **SMALL)


@pytest.mark.parametrize("dims", [(512, 64), (256, 64), (8, 8), (2552, 8)])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, 8192])
def test_any_number_of_tokens_and_dims(count: int, dims: tuple[int, int]) -> None:
    cache = CUPY.cache(8192 // 64, 64, latent_dim=dims[0], rope_dim=dims[1])
    a = cache.new_sequence()
    add(CUPY, cache, a, list(range(count)))
    assert_holds(cache, {a: list(range(count))})


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_float32_rows_are_rounded_as_numpy_rounds(library: Library, dtype: str) -> None:
    cache = library.cache(16, 64, dtype)
    values = np.random.default_rng(0).standard_normal((1000, 576), np.float32)
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -0.0, 1e-42, 1e-7, np.inf, 1e6, -3.4e38, 65519, 65520]
    values[0, : len(ties)] = values[1, -len(ties) :] = ties
    packed = library.array(values)
    cache.write(0, cache.reserve([cache.new_sequence()], [1000]), packed[:, :512], packed[:, 512:])
    with np.errstate(over="ignore"):
        expected = values.astype(NUMPY_DTYPES[dtype])
    assert np.array_equal(bits(cache.pages(0)).reshape(-1, 576)[:1000], expected.view(np.int16))


@pytest.mark.parametrize(("latent_dtype", "rope_dtype"), [("float32", "float16"), ("float16", "float32")])
def test_latent_and_rope_may_have_different_dtypes_and_strides(latent_dtype: str, rope_dtype: str) -> None:
    cache = CUPY.cache(4, 16, "float16")
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((80, 1024), np.float32).astype(latent_dtype)
    rope = rng.standard_normal((40, 200), np.float32).astype(rope_dtype)
    slots = cache.reserve([cache.new_sequence()], [40])
    cache.write(0, slots, CUPY.array(latent)[::2, 256:768], CUPY.array(rope)[:, 8:72])
    read = cache.export(0)
    assert np.array_equal(bits(read.latent[0]), bits(latent[::2, 256:768].astype(np.float16)))
    assert np.array_equal(bits(read.rope[0]), bits(rope[:, 8:72].astype(np.float16)))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_only_slots_within_the_layer_are_written(library: Library, dtype: Any, on_host: bool) -> None:
    cache = library.cache(4, 4, **SMALL)
    a = cache.new_sequence()
    cache.reserve([a], [16])
    write_tokens(library, cache, library.array(np.arange(16)), list(range(16)))
    slots = np.array([-1, 3, -1, 12], dtype)
    if not on_host:  # where they cannot be checked
        slots[2] = 16
        slots = np.concatenate([slots, np.array([-2, 2**31 - 1, *([2**32 + 5] if dtype is np.int64 else [])], dtype)])
    tokens = list(range(100, 100 + len(slots)))
    write_tokens(library, cache, slots if on_host else library.array(slots), tokens)
    assert_holds(cache, {a: [0, 1, 2, 101, *range(4, 12), 103, 13, 14, 15]})


@pytest.mark.parametrize(
    ("name", "latent", "rope"),
    [
        ("latent", (slice(None), slice(1, 513)), (slice(None), slice(0, 64))),
        ("rope", (slice(None), slice(0, 512)), (slice(None), slice(513, 577))),
    ],
)
def test_rows_that_are_not_aligned_are_refused(name: str, latent: Any, rope: Any) -> None:
    cache = CUPY.cache(4, 4)
    slots = cache.reserve([cache.new_sequence()], [3])
    packed = CUPY.array(np.zeros((3, 584), np.float32))
    with pytest.raises(ArgumentError, match=f"^{name}: got address"):
        cache.write(0, slots, packed[latent], packed[rope])
    odd = CUPY.array(np.zeros((3, 577), np.float32))
    with pytest.raises(ArgumentError, match="latent: got rows 2308 bytes apart"):
        cache.write(0, slots, odd[:, :512], packed[:, :64])


def test_rows_on_the_host_are_refused() -> None:
    cache = CUPY.cache(4, 4)
    slots = cache.reserve([cache.new_sequence()], [1])
    with pytest.raises(ArgumentError, match="latent: got an array on cpu"):
        cache.write(0, slots, np.zeros((1, 512), np.float32), np.zeros((1, 64), np.float32))


# ---- Forks ----


@pytest.mark.parametrize("page_size", PAGE_SIZES[1:])
def test_a_forks_page_is_copied_before_it_is_written(page_size: int, stream: Any) -> None:
    cache = CUPY.cache(200, page_size, **SMALL)
    a = cache.new_sequence()
    prompt = list(range(page_size + page_size // 2))
    add(CUPY, cache, a, prompt)
    stream.synchronize()
    hold_up(50)  # all that follows is still to be done when the host is through with it
    family = [a, *(cache.fork(a) for _ in range(60))]
    expected = {}
    write_tokens(CUPY, cache, cache.reserve(family, [1] * 61), list(range(1000, 1061)))
    for i, name in enumerate(family):
        expected[name] = [*prompt, 1000 + i]
    assert cache.stats().used == 1 + 61
    assert_holds(cache, expected)


def test_all_layers_of_a_page_are_copied() -> None:
    cache = CUPY.cache(8, 256, num_layers=61)
    a = cache.new_sequence()
    add(CUPY, cache, a, list(range(255)))
    c = cache.fork(a)
    add(CUPY, cache, c, [1000, 1001])
    add(CUPY, cache, a, [2000])
    assert_holds(cache, {a: [*range(255), 2000], c: [*range(255), 1000, 1001]})


def test_decode_reads_through_the_cache(library: Library) -> None:
    assert_forks_decode(library)


# ---- Steps ----


def test_a_batch_of_1024_sequences(library: Library) -> None:
    lengths = [1 + 7 * i % 300 for i in range(1024)]
    caches = [
        x.cache(1024 * 80, 4, latent_dim=8, rope_dim=8, max_batch=1024, max_pages_per_sequence=80)
        for x in (library, NUMPY)
    ]
    for cache in caches:
        names = [cache.new_sequence() for _ in lengths]
        cache.reserve(names, lengths)
    assert tables(caches[0]) == tables(caches[1])


def test_steps_are_safe_while_the_host_runs_ahead(stream: Any) -> None:
    """The stream is held up again and again, so that staging buffers come round while the GPU still needs them."""
    cache, twin = (x.cache(256, 2, latent_dim=8, rope_dim=8, max_batch=8) for x in (CUPY, NUMPY))
    names = [cache.new_sequence() for _ in range(8)]
    assert names == [twin.new_sequence() for _ in range(8)]
    seen, expected = [], []
    for step in range(60):
        if step % 12 == 0:
            hold_up(20)
        some = names[step % 3 :]
        slots, twin_slots = (x.reserve(some, [1] * len(some)) for x in (cache, twin))
        batch, twin_batch = cache.batch(some), twin.batch(some)
        seen.append((slots, *(x.copy() for x in batch)))
        expected.append((twin_slots, *(x.copy() for x in twin_batch)))
    for got, wanted in zip(seen, expected):
        assert all(np.array_equal(host(x), y) for x, y in zip(got, wanted))


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_a_graph_of_write_and_decode_follows_growing_sequences(page_size: int, dtype: str, stream: Any) -> None:
    """Captured once, replayed 64 times, while sequences cross page borders, leave and come; bit for bit as eager."""
    steps, rows_of_batch, heads = 64, 4, 16
    graph_cache, eager_cache = (CUPY.cache(64, page_size, dtype, max_batch=8) for _ in range(2))

    def both(change: Callable[[PagedKVCache], int | None]) -> Any:
        name, same_name = change(graph_cache), change(eager_cache)
        assert name == same_name
        return name

    names = [both(lambda cache: cache.new_sequence()) for _ in range(3)]
    for name, length in zip(names, (page_size - 3, 5, 3 * page_size - 40)):
        both(lambda cache, name=name, length=length: add(CUPY, cache, name, list(range(length))))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((steps, rows_of_batch, 1, heads, 576), np.float32).astype(NUMPY_DTYPES[dtype])

    slots = CUPY.array(np.full(rows_of_batch, -1, np.int32))
    new_rows = CUPY.array(rows(graph_cache, 0, [0] * rows_of_batch))
    queries, out = CUPY.array(q[0]), CUPY.array(np.zeros((rows_of_batch, 1, heads, 512), NUMPY_DTYPES[dtype]))
    batch = graph_cache.batch(names, rows=rows_of_batch)

    def step() -> None:
        graph_cache.write(0, slots, new_rows[:, :512], new_rows[:, 512:])
        mla_decode(queries, graph_cache.pages(0), *batch, softmax_scale=DEEPSEEK_SCALE, out=out)

    step()  # makes the workspace
    stream.synchronize()
    stream.begin_capture()
    step()
    graph = stream.end_capture()

    for i in range(steps):
        if i == 20:  # one leaves
            left = names.pop(0)
            both(lambda cache, name=left: cache.free(name))
        if i == 40:  # two forks come
            names += [both(lambda cache, name=name: cache.fork(name)) for name in names]
        tokens = [1000 + 10 * i + k for k in range(len(names))]
        padded = rows(graph_cache, 0, tokens + [0] * (rows_of_batch - len(names)))

        new_rows.view(np.int16).set(padded.view(np.int16))
        queries.view(np.int16).set(q[i].view(np.int16))
        graph_cache.reserve(names, [1] * len(names), out=slots)
        graph_cache.batch(names)
        graph.launch(stream)

        write_tokens(CUPY, eager_cache, eager_cache.reserve(names, [1] * len(names)), tokens)
        eager_batch = eager_cache.batch(names, rows=rows_of_batch)
        eager = mla_decode(CUPY.array(q[i]), eager_cache.pages(0), *eager_batch, softmax_scale=DEEPSEEK_SCALE)
        assert np.array_equal(bits(out), bits(eager)), f"step {i}"
        assert not bits(out)[len(names) :].any(), "requests without tokens give zeros"
    assert graph_cache.batch(names, rows=rows_of_batch) is batch


def test_what_the_host_decides_cannot_be_captured(stream: Any) -> None:
    cache = CUPY.cache(8, 4, **SMALL)
    a = cache.new_sequence()
    add(CUPY, cache, a, [0, 1, 2])
    latent, rope = CUPY.array(np.zeros((1, 256), np.float32)), CUPY.array(np.zeros((1, 64), np.float32))
    calls: list[Callable[[], Any]] = [
        lambda: cache.reserve([a], [1]),
        lambda: cache.batch([a]),
        lambda: cache.export(a),
        lambda: cache.write(0, np.array([2]), latent, rope),
    ]
    stream.synchronize()
    stream.begin_capture()
    try:
        for call in calls:
            with pytest.raises(UnsupportedError, match="captured"):
                call()
    finally:
        stream.end_capture()
    assert_holds(cache, {a: [0, 1, 2]})


# ---- Save and restore ----


def test_export_and_import_keep_every_bit(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(kv_memory, "TRANSFER_BYTES", 3 * 3 * 16 * 320 * 2)  # three pages of all layers at a time
    cache = library.cache(40, 16, **SMALL)
    hole, a = cache.new_sequence(), cache.new_sequence()
    for first in range(0, 200, 10):
        add(library, cache, hole, [7000 + first] * 3)
        add(library, cache, a, list(range(first, first + 10)))
    exported = cache.export(a, tmp_path / "prompt.safetensors")
    assert np.array_equal(
        np.concatenate([bits(exported.latent[2]), bits(exported.rope[2])], axis=1),
        rows(cache, 2, list(range(200))).view(np.int16),
    )
    cache.free(hole)
    expected = {a: list(range(200))}
    for source in (exported, tmp_path / "prompt.safetensors"):
        expected[cache.import_(source)] = list(range(200))
        expected.pop(min(expected))
        cache.free(min(cache.sequences))
        assert_holds(cache, expected)


# ---- Cost ----


def graph_time_us(stream: Any, work: Callable[[], None], repeats: int) -> float:
    """GPU time of one of `repeats` calls captured in a graph, the best of several replays."""
    import cupy

    work()
    stream.synchronize()
    stream.begin_capture()
    for _ in range(repeats):
        work()
    graph = stream.end_capture()
    times = []
    for _ in range(10):
        events = cupy.cuda.Event(), cupy.cuda.Event()
        events[0].record(stream)
        graph.launch(stream)
        events[1].record(stream)
        events[1].synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(*events) / repeats)
    return min(times)


def test_writing_a_decode_step_takes_less_than_4_us(stream: Any) -> None:
    cache = CUPY.cache(256, 64)
    names = [cache.new_sequence() for _ in range(128)]
    slots = cache.reserve(names, [1] * 128)
    packed = CUPY.array(rows(cache, 0, list(range(128))))
    time_us = graph_time_us(stream, lambda: cache.write(0, slots, packed[:, :512], packed[:, 512:]), 50)
    assert time_us < 4, f"{time_us:.2f} us"


def test_writing_a_prompt_runs_near_the_rate_of_a_copy(stream: Any) -> None:
    import cupy

    tokens, layers = 8192, 16  # layer after layer, so that neither finds its data in L2
    cache = CUPY.cache(tokens // 64, 64, num_layers=layers)
    slots = cache.reserve([cache.new_sequence()], [tokens])
    size = tokens * row_dims(cache) * 2
    source = cupy.zeros((layers, tokens, row_dims(cache)), np.float16).view(NUMPY_DTYPES["bfloat16"])

    def write() -> None:
        for layer in range(layers):
            cache.write(layer, slots, source[layer, :, :512], source[layer, :, 512:])

    def copy() -> None:
        for layer in range(layers):
            target = cache.pages(layer).data.ptr
            cupy.cuda.runtime.memcpyAsync(
                target, source[layer].data.ptr, size, cupy.cuda.runtime.memcpyDeviceToDevice, stream.ptr
            )

    write_us, copy_us = (graph_time_us(stream, work, 4) / layers for work in (write, copy))
    assert copy_us / write_us >= 0.6, f"write {write_us:.2f} us, copy {copy_us:.2f} us"
