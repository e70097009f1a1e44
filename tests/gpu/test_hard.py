"""What a service does to a kernel: random problems for a minute, ten thousand calls, streams, threads, forks, exits."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from etap_rt import ArgumentError, PagedKVCache, mla_decode, plan_decode
from tests.cases import DEEPSEEK_SCALE
from tests.processes import ROOT, environment

torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

FUZZ_SECONDS = 60
FUZZ_SEED = 1_000_000
FEWEST_CASES = 300
DRAWN_CASES = 200
CALLS, WARM_UP_CALLS = 10_000, 5_000  # by then every table that is emptied when full has been full
ACCEPTED_GROWTH_BYTES = 16 << 20  # of the host, of which Python and the driver give nothing back
REPLAYS = 10_000
BUSY_RUNS = 100

Record = Callable[[str, object], None]


def run_alone(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process that imports this checkout."""
    return subprocess.run(
        [sys.executable, *arguments, *(["-c", script] if script else [])],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def problem(
    lengths: list[int], heads: int = 16, s_q: int = 1, page_size: int = 64, seed: int = 0, dtype: Any = torch.bfloat16
) -> dict[str, Any]:
    """Arguments of a decode; pages in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    columns = max(1, *counts)
    pages = torch.randperm(len(lengths) * columns, generator=generator, device="cuda").int()
    return {
        "q": torch.randn(len(lengths), s_q, heads, 576, generator=generator, device="cuda").to(dtype),
        "kv_cache": torch.randn(len(pages), page_size, 576, generator=generator, device="cuda").to(dtype),
        "block_table": pages.view(len(lengths), columns),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "softmax_scale": DEEPSEEK_SCALE,
    }


def assert_same_bits(got: tuple[Any, Any], expected: tuple[Any, Any], about: str) -> None:
    for x, y, bits in zip(got, expected, (torch.int16, torch.int32)):
        assert torch.equal(x.view(bits), y.view(bits)), about


# ---- Fuzzing ----


def test_a_minute_of_random_problems(record_property: Record) -> None:
    arguments = [
        "tools/fuzz.py",
        "--device",
        "cuda",
        "--seed",
        str(FUZZ_SEED),
        "--seconds",
        str(FUZZ_SECONDS),
        "--json",
    ]
    done = run_alone("", *arguments)
    record_property("fuzz_seed", FUZZ_SEED)
    record_property("fuzz_failures", int(done.returncode != 0))
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    for name in ("cases", "runs", "tokens", "seconds", "worst", "seen"):
        record_property(f"fuzz_{name}", summary[name])
    assert summary["cases"] >= FEWEST_CASES


def test_problems_that_hypothesis_draws(record_property: Record) -> None:
    """Fewer than the fuzzer tries, but one that fails is shrunk to a small one."""
    from tests.drawn_cases import PATIENT, cases, fuzz

    runs: list[int] = []

    @settings(PATIENT, max_examples=DRAWN_CASES, database=None)
    @given(cases("cuda"))
    def decode(case: Any) -> None:
        runs.append(fuzz.run_case(case, "cuda", None)[0])

    decode()
    record_property("drawn_cases", len(runs))
    record_property("drawn_runs", sum(runs))


# ---- Memory ----


def host_bytes() -> int:
    """Resident memory of this process that is not mapped from files."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def device_bytes() -> int:
    """Memory in use on the GPU besides what torch keeps in stock."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def test_ten_thousand_calls_of_random_shapes_need_no_more_memory(record_property: Record) -> None:
    rng = np.random.default_rng(3)
    pool = torch.randn(1 << 20, dtype=torch.bfloat16, device="cuda")
    ints = torch.zeros(1 << 14, dtype=torch.int32, device="cuda")
    allocated = torch.cuda.memory_allocated()

    def call() -> None:
        batch, s_q, heads = (int(rng.integers(1, most)) for most in (40, 4, 129))
        page_size = int(rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256]))
        pages, columns = int(rng.integers(1, 1500 // page_size + 2)), int(rng.integers(1, 300))
        dim = int(rng.choice([576, 320]))
        while batch * s_q * heads * dim > pool.numel():
            batch, heads = -(-batch // 2), -(-heads // 2)
        mla_decode(
            pool[: batch * s_q * heads * dim].view(batch, s_q, heads, dim),
            pool[: pages * page_size * dim].view(pages, page_size, dim),
            ints[: batch * columns].view(batch, columns),
            torch.full((batch,), int(rng.integers(0, columns * page_size + 1)) % 300, dtype=torch.int32, device="cuda"),
            softmax_scale=DEEPSEEK_SCALE,
            return_lse=bool(rng.integers(2)),
        )

    for _ in range(WARM_UP_CALLS):
        call()
    host, device = host_bytes(), device_bytes()
    for _ in range(CALLS - WARM_UP_CALLS):
        call()
    grown_host, grown_device = host_bytes() - host, device_bytes() - device
    record_property("calls", CALLS)
    record_property("host_growth_mib", round(grown_host / (1 << 20), 2))
    record_property("device_growth_bytes", grown_device)
    assert grown_device <= 0
    assert grown_host <= ACCEPTED_GROWTH_BYTES
    assert torch.cuda.memory_allocated() == allocated, "all outputs went back"


# ---- The same bits ----


@pytest.mark.parametrize(
    ("lengths", "heads", "s_q"),
    [([9001], 16, 1), ([0, 5000, 17, 64, 999, 2048, 1], 32, 2), ([64 * i % 700 for i in range(200)], 8, 1)],
    ids=["one-request", "mixed", "many"],
)
def test_a_hundred_runs_beside_a_busy_stream_give_the_same_bits(lengths: list[int], heads: int, s_q: int) -> None:
    call = problem(lengths, heads, s_q)
    expected = mla_decode(**call, return_lse=True)
    factor = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(BUSY_RUNS):
        with torch.cuda.stream(other):
            torch.mm(factor, factor, out=product)
        results.append(mla_decode(**call, return_lse=True))
    for i, result in enumerate(results):
        assert_same_bits(result, expected, f"run {i}")


def test_four_streams_read_one_cache_at_once() -> None:
    cache = PagedKVCache(600, dtype=torch.bfloat16, device="cuda", max_batch=64)
    sequences = [cache.new_sequence() for _ in range(24)]
    counts = [1 + 997 * i % 1500 for i in range(24)]
    slots = cache.reserve(sequences, counts)
    latent, rope = (torch.randn(sum(counts), dim, device="cuda", dtype=torch.bfloat16) for dim in (512, 64))
    cache.write(0, slots, latent, rope)
    batch = cache.batch(sequences)
    calls = []
    for stream in range(4):  # each reads other requests of the same table, with other heads
        rows = slice(6 * stream, 6 * stream + 6)
        q = torch.randn(6, 1 + stream % 2, (8, 16, 64, 128)[stream], 576, device="cuda", dtype=torch.bfloat16)
        calls.append((q, cache.pages(0), batch.block_table[rows], batch.cache_seqlens[rows]))
    expected = [mla_decode(*call, softmax_scale=DEEPSEEK_SCALE, return_lse=True) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Any]] = [[] for _ in calls]
    for _ in range(50):
        for stream, call, own in zip(streams, calls, results):
            with torch.cuda.stream(stream):
                own.append(mla_decode(*call, softmax_scale=DEEPSEEK_SCALE, return_lse=True))
    torch.cuda.synchronize()
    for own, same in zip(results, expected):
        for i, result in enumerate(own):
            assert_same_bits(result, same, f"round {i}")


def test_a_new_thread_decodes_on_the_default_stream() -> None:
    """It has no CUDA context of its own until somebody makes the device's current."""
    call = problem([300, 77])
    expected = mla_decode(**call)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(mla_decode(**call)))
    thread.start()
    thread.join()
    assert_same_bits(results, [expected], "a new thread")


def test_two_threads_decode_new_and_old_shapes() -> None:
    """Both meet each shape for the first time at about the same moment, then again and again."""
    shapes = [([70 * i + 1, 900], heads, 1) for i, heads in enumerate((5, 16, 24, 40, 100))]
    calls = [problem(*shape, seed=i) for i, shape in enumerate(shapes)]
    torch.cuda.synchronize()
    results: dict[int, list[tuple[Any, Any]]] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                results[index] = [mla_decode(**calls[i % len(calls)], return_lse=True) for i in range(300)]
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    expected = [mla_decode(**call, return_lse=True) for call in calls]
    for own in results.values():
        for i, result in enumerate(own):
            assert_same_bits(result, expected[i % len(calls)], f"call {i}")


def test_threads_decode_on_default_streams_of_their_own() -> None:
    """All have the same handle, so they may not share what belongs to a stream."""
    import cupy

    calls = [problem([9000 + 64 * i] * 4, seed=i, dtype=torch.float16) for i in range(4)]
    expected = [mla_decode(**call, return_lse=True) for call in calls]
    torch.cuda.synchronize()
    results: dict[int, list[tuple[Any, Any]]] = {}
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        arrays = {name: cupy.asarray(x) if isinstance(x, torch.Tensor) else x for name, x in calls[index].items()}
        with cupy.cuda.Stream.ptds:
            start.wait()
            own = [mla_decode(**arrays, return_lse=True) for _ in range(200)]
            cupy.cuda.Stream.ptds.synchronize()
            results[index] = [(torch.as_tensor(out), torch.as_tensor(lse)) for out, lse in own]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, same in enumerate(expected):
        for i, result in enumerate(results[index]):
            assert_same_bits(result, same, f"call {i} of thread {index}")


def test_a_graph_is_replayed_ten_thousand_times(record_property: Record) -> None:
    """Each replay moves on: lengths change on the GPU within the graph, as they do while a model decodes."""
    call = problem([900, 1, 64, 500], 16, 1)
    most = call["block_table"].shape[1] * 64
    lengths = call["cache_seqlens"]
    plan = plan_decode(**call, return_lse=True)
    plan.run(call["q"])
    torch.cuda.synchronize()
    first = lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lengths.add_(7).remainder_(most + 1)
        plan.run(call["q"])
    before = device_bytes()
    began = time.perf_counter()
    for replay in range(1, REPLAYS + 1):
        graph.replay()
        if replay % 1000 == 0:
            assert torch.equal(lengths, (first + 7 * replay) % (most + 1))
            got = plan.out.clone(), plan.lse.clone()
            assert_same_bits(got, mla_decode(**call, return_lse=True), f"replay {replay}")
    torch.cuda.synchronize()
    record_property("replays", REPLAYS)
    record_property("us_a_replay", round((time.perf_counter() - began) / REPLAYS * 1e6, 2))
    assert device_bytes() <= before


# ---- Odd, but legal ----


def test_more_than_2_to_the_31_elements_in_queries_and_outputs() -> None:
    """Each request has one key, so each of its rows is that key's latent part, exactly."""
    batch, heads = 32_800, 128
    assert batch * heads * 512 > 1 << 31
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("24 GiB of GPU memory are needed")
    q = torch.zeros(batch, 1, heads, 576, dtype=torch.bfloat16, device="cuda")
    kv_cache = torch.randn(64, 64, 576, device="cuda").to(torch.bfloat16)
    table = torch.randint(64, (batch, 1), dtype=torch.int32, device="cuda")
    lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
    out, lse = mla_decode(q, kv_cache, table, lengths, softmax_scale=DEEPSEEK_SCALE, return_lse=True)
    expected = kv_cache[table[:, 0].long(), 0, :512]
    for part in range(0, batch, 4096):
        rows = slice(part, part + 4096)
        assert (out[rows, 0] == expected[rows, None]).all(), f"requests from {part} on"
    assert not lse.any()


def test_a_table_with_far_more_columns_than_pages_in_use() -> None:
    call = problem([700, 0, 64, 65])
    expected = mla_decode(**call, return_lse=True)
    wide = torch.full((4, 3_000_000), 2_147_480_000, dtype=torch.int32, device="cuda")
    columns = call["block_table"].shape[1]
    wide[:, :columns] = call["block_table"]
    assert_same_bits(mla_decode(**{**call, "block_table": wide}, return_lse=True), expected, "wide table")
    assert_same_bits(
        mla_decode(**{**call, "block_table": wide[:, :columns]}, return_lse=True), expected, "a part of a wide table"
    )


def test_memory_that_cupy_gave_back_and_got_again() -> None:
    """What is remembered by address must not outlive what lay there."""
    import cupy

    pool = cupy.get_default_memory_pool()
    for seed in range(5):
        for page_size in (64, 16):
            call = problem([300, 77], page_size=page_size, seed=seed, dtype=torch.float16)
            expected = mla_decode(**call)
            torch.cuda.synchronize()
            arrays = {name: cupy.asarray(call[name]) for name in ("q", "block_table", "cache_seqlens", "kv_cache")}
            copies = {name: array.copy() for name, array in arrays.items()}
            out = mla_decode(**copies, softmax_scale=call["softmax_scale"])
            assert torch.equal(torch.from_dlpack(out).view(torch.int16), expected.view(torch.int16))
            del arrays, copies, out
            pool.free_all_blocks()


def test_tensors_that_require_gradients_are_read_and_the_result_has_none() -> None:
    call = problem([300, 77])
    expected = mla_decode(**call)
    call["q"].requires_grad_(True)
    call["kv_cache"] = torch.nn.Parameter(call["kv_cache"])
    out = mla_decode(**call)
    assert not out.requires_grad and torch.equal(out, expected)


def test_arrays_on_different_gpus_are_refused_by_name() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    call = problem([300, 77])
    for name in ("kv_cache", "block_table", "cache_seqlens"):
        with pytest.raises(ArgumentError, match=f"^{name}: got device cuda:1, accepted is cuda:0, where q is"):
            mla_decode(**{**call, name: call[name].to("cuda:1")})


# ---- Processes ----

SETTING = """
import torch
import etap_rt
q = torch.randn(2, 1, 16, 576, dtype=torch.bfloat16, device="cuda")
kv_cache = torch.randn(8, 64, 576, dtype=torch.bfloat16, device="cuda")
table = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
lengths = torch.tensor([200, 100], dtype=torch.int32, device="cuda")
def decode(**outputs):
    return etap_rt.mla_decode(q, kv_cache, table, lengths, softmax_scale=0.1, **outputs)
"""

FORK = """
import os, sys, traceback
out, expected = torch.empty(2, 1, 16, 512, dtype=torch.bfloat16, device="cuda"), decode()
plan = etap_rt.plan_decode(q, kv_cache, table, lengths, softmax_scale=0.1)
cache = etap_rt.PagedKVCache(8, dtype=torch.bfloat16, device="cuda")
sequence = cache.new_sequence()
slots, latent, rope = cache.reserve([sequence], [2]), kv_cache[0, :2, :512], kv_cache[0, :2, 512:]
torch.cuda.synchronize()
def create():
    etap_rt.PagedKVCache(8, dtype="bfloat16", device="cuda")
def write():
    cache.write(0, slots, latent, rope)
calls = [decode, lambda: decode(out=out), lambda: plan.run(q), lambda: cache.reserve([sequence], [5]), create, write]
for number, call in enumerate(calls):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            call()
            print(number, "no error")
        except BaseException as error:
            print(number, type(error).__name__, error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
torch.cuda.synchronize()
print("parent", bool((decode(out=out) == expected).all()))
"""


def test_a_forked_process_is_told_that_cuda_does_not_work_in_it() -> None:
    done = run_alone(SETTING + FORK)
    assert done.returncode == 0, done.stderr
    *children, parent = done.stdout.splitlines()
    assert len(children) == 6, done.stdout
    for number, line in enumerate(children):
        assert (
            line.startswith(f"{number} UnsupportedError process ") and "was forked after CUDA had been started" in line
        )
    assert parent == "parent True"


AT_THE_END = {
    "arrays, a cache, a plan and a graph, work under way": """
import cupy
cache = etap_rt.PagedKVCache(8, dtype=torch.bfloat16, device="cuda")
slots = cache.reserve([cache.new_sequence()], [5])
x, pages = cupy.zeros((1, 1, 16, 576), cupy.float16), cupy.zeros((1, 64, 576), cupy.float16)
of_cupy = etap_rt.mla_decode(x, pages, cupy.zeros((1, 1), "int32"), cupy.ones(1, "int32"), softmax_scale=0.1)
plan = etap_rt.plan_decode(q, kv_cache, table, lengths, softmax_scale=0.1)
plan.run(q)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    plan.run(q)
for _ in range(1000):
    graph.replay()
    out, lse = decode(return_lse=True)
""",
    # Into outputs that are there: torch itself aborts if a thread is within torch.empty when the process ends.
    "a thread that decodes": """
import threading, time
out = decode()
def work():
    while True:
        decode(out=out)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
""",
}


@pytest.mark.parametrize("alive", AT_THE_END)
def test_a_process_ends_without_noise(alive: str) -> None:
    done = run_alone(SETTING + AT_THE_END[alive], "-W", "ignore")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
