"""Time mla_decode on this machine's GPU, beside the stream floor of the same run.

    python tools/bench.py [--only GROUP] [--sms N] [--samples N] [--json FILE]
    python tools/bench.py --peers [--help]
    python tools/bench.py --compare OLD NEW
    python tools/bench.py --markdown FILE

The stream floor (stream_floor.cu) brings the same pages on chip and computes nothing. It is the baseline of most calls;
others name theirs: page sizes the same call with pages of 64 tokens, ragged queries the same requests with the same
number of queries in equal parts, writes into a cache a copy of as many bytes. All are timed in turns: CUDA events
around one call, the L2 cache cleaned before each by reading 1 GiB, N samples, each the mean of two calls at places of
either parity (see time_gpu); and once all cells are done, all of them again with other pages. A figure is the median,
its noise what the medians of the two rounds differ by. Needs a Hopper GPU and torch; works from source.

`--sms` runs everything, the floor too, on N SMs of the GPU (a green context), a stand-in for GPUs with less tensor
throughput by their memory rate. Without it one cell does so.

`--compare` says which cells of two result files moved by more than their noise; the exit status is 1 if any got
slower. `--markdown` prints the tables of a result file for the README. Neither needs a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import green_context  # noqa: E402

from etap_rt import EtapError, PagedKVCache, UnsupportedError, compiler, driver, mla_decode, plan_decode  # noqa: E402

FLOOR_SOURCE = ROOT / "tools" / "stream_floor.cu"
FLOOR_THREADS = 32
FLOOR_SHARED_BYTES = 2 * 64 * 1152  # two stages of 64 keys

LATENT_DIM, ROPE_DIM = 512, 64
CACHE_DIM = LATENT_DIM + ROPE_DIM
PAGE_SIZE = 64
PAGE_BYTES = PAGE_SIZE * CACHE_DIM * 2
SOFTMAX_SCALE = (128 + 64) ** -0.5

L2_CLEANER_BYTES = 1 << 30
WARM_UP_CALLS = 3
SAMPLES = 30
ROUNDS = 2
HOST_CALLS = 50  # in one host time sample: far fewer than the launches that a stream can hold
WARM_UP_CLEANINGS = 1000  # some 0.3 s, in which the clocks rise
# No two runs agree better than that, whatever their rounds say.
LEAST_NOISE = 0.01
LEAST_NOISE_US = 0.1
LEAST_HOST_NOISE = 0.05

# The slowest to compile. The library is opened first: that time belongs to the import of CuPy.
COMPILE_CODE = """
import time
from etap_rt import compiler, kernels
compiler.nvrtc_version()
start = time.perf_counter()
compiler.compile_spec(kernels.decode_spec("bfloat16", 512, 64, 64))
print(time.perf_counter() - start)
"""

# ---- What is measured ------------------------------------------------------------------------------------------------

K = 1024
TOKENS = (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K)
TARGET_RATIOS = {  # time over the stream floor, at TOKENS, by batch
    1: (2.0, 2.0, 2.0, 2.0, 1.9, 1.8, 1.6, 1.5),
    16: (1.6, 1.5, 1.35, 1.2, 1.12, 1.08, 1.05, 1.04),
    32: (1.5, 1.35, 1.2, 1.12, 1.08, 1.05, 1.04, 1.03),
}
SCARCE_SMS = 32  # on which an H200 has about an H20's tensor throughput for each byte that it reads
PAGE_SIZE_TARGETS = {1: 1.35, 16: 1.05, 32: 1.05}  # time over that of the same call with pages of PAGE_SIZE tokens
MIXED_TOKENS = (128, 32 * K)
TABLE_GROUPS = ("lengths", "fp16")  # cells that differ by tokens: a row for each batch
HOST_GROUPS = ("host", "compile")  # measured with the host's clock


@dataclass(frozen=True)
class Target:
    """What is asked of a cell: at most `limit` us, or at most `limit` times its baseline."""

    unit: Literal["us", "ratio"]
    limit: float

    def __str__(self) -> str:
        return f"{self.limit:.2f}x" if self.unit == "ratio" else format_us(self.limit)


@dataclass(frozen=True)
class Cell:
    """One figure to measure; the fields after `target` say of which call."""

    group: str
    row: str
    column: str
    target: Target | None
    lengths: tuple[int, ...] = ()  # tokens of each request
    heads: int = 16
    s_q: int = 1
    queries: tuple[int, ...] = ()  # of each request, ragged; the baseline is the same batch with s_q of them each
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    calls_in_graph: int = 0  # captured in a CUDA graph, of which the time is divided by that; 0 is an eager call
    page_size: int = PAGE_SIZE  # with another than PAGE_SIZE the baseline is the same call with PAGE_SIZE
    planned: bool = False  # arguments checked beforehand
    written: tuple[int, ...] = ()  # not a decode but a write into a cache: new tokens of each sequence
    sms: int = 0  # that it may run on; 0 for all

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}"

    @property
    def baseline(self) -> str:
        """What runs beside it; empty for nothing."""
        if self.group in HOST_GROUPS:
            return ""
        if self.written:
            return "copy of as many bytes"
        if self.queries:
            return f"{self.s_q} queries each"
        return "stream floor" if self.page_size == PAGE_SIZE else f"page {PAGE_SIZE}"

    @property
    def pages(self) -> int:
        return sum(pages_of(length) for length in self.lengths)

    @property
    def bytes(self) -> int:
        """That have to be moved: each page once; of what is written, source and target."""
        return self.pages * PAGE_BYTES + 2 * sum(self.written) * CACHE_DIM * 2

    @property
    def flop(self) -> int:
        """Of both products, without what the causal mask leaves out."""
        queries = self.queries or (self.s_q,) * len(self.lengths)
        keys = sum(max(0, length - query) for length, count in zip(self.lengths, queries) for query in range(count))
        return 2 * keys * self.heads * (CACHE_DIM + LATENT_DIM)


def all_cells() -> list[Cell]:
    """Every cell, in the order in which they are measured and shown."""
    cells: list[Cell] = []
    for batch, ratios in TARGET_RATIOS.items():
        cells += length_cells("lengths", batch, ratios)
    cells += length_cells("fp16", 16, TARGET_RATIOS[16], dtype="float16")
    row_target = Target("ratio", 1.08)
    for heads in (8, 16, 32, 64):
        cells.append(Cell("heads", "b=128 4K", f"{heads} heads", row_target, (4 * K,) * 128, heads))
    for s_q in (1, 2, 4):
        cells.append(Cell("queries", "b=32 8K", f"s_q={s_q}", row_target, (8 * K,) * 32, s_q=s_q))
    mix, target = (1, 1, 2, 4) * 8, Target("ratio", 1.1)  # 64, as many as 2 each
    cells.append(Cell("ragged", "b=32 8K", "1, 1, 2, 4 queries", target, (8 * K,) * 32, s_q=2, queries=mix))
    cells.append(Cell("compute", "b=128 8K", "128 heads", Target("us", 480), (8 * K,) * 128, 128))
    for seed in (1, 2, 3):
        lengths = mixed_lengths(32, seed)
        cells.append(Cell("mixed", "b=32 mixed lengths", f"seed {seed}", Target("ratio", 1.15), lengths))
    column, target = f"{SCARCE_SMS} SMs", Target("ratio", 1.3)
    cells.append(Cell("sms", "b=16 16K", column, target, (16 * K,) * 16, sms=SCARCE_SMS))
    for calls, target in ((1, None), (20, Target("us", 5))):
        column = f"CUDA graph of {calls}"
        cells.append(Cell("graph", "b=16 64 tokens", column, target, (64,) * 16, calls_in_graph=calls))
    for page_size, limit in PAGE_SIZE_TARGETS.items():
        target = Target("ratio", limit)
        cells.append(Cell("pages", "b=16 16K", f"page {page_size}", target, (16 * K,) * 16, page_size=page_size))
    # At least 60% of the rate at which the driver copies as many bytes.
    cells.append(Cell("write", "write", "8K tokens", Target("ratio", 1 / 0.6), written=(8 * K,)))
    step = (1,) * 128
    cells.append(Cell("write", "write", "128 x 1 token, graph of 20", Target("us", 4), written=step, calls_in_graph=20))
    cells.append(Cell("host", "b=16 64 tokens", "host time", Target("us", 15), (64,) * 16))
    cells.append(Cell("host", "b=16 64 tokens", "host time, planned", Target("us", 6), (64,) * 16, planned=True))
    cells.append(Cell("compile", "one kernel", "cold compile", Target("us", 3e6)))
    return cells


def cells_on(sms: int, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that the GPU's SMs matter to, on `sms` of them. What is asked of all SMs is not asked of a part."""
    return [replace(cell, sms=sms, target=None) for cell in cells if not cell.sms and cell.group not in HOST_GROUPS]


def length_cells(
    group: str, batch: int, ratios: Sequence[float], dtype: Literal["bfloat16", "float16"] = "bfloat16"
) -> Iterator[Cell]:
    row = f"b={batch}" if dtype == "bfloat16" else f"b={batch} {dtype}"
    for tokens, ratio in zip(TOKENS, ratios):
        yield Cell(group, row, format_tokens(tokens), Target("ratio", ratio), (tokens,) * batch, dtype=dtype)


def mixed_lengths(batch: int, seed: int) -> tuple[int, ...]:
    """Log-uniform over MIXED_TOKENS, the same for a seed on every machine."""
    generator = random.Random(seed)
    low, high = map(math.log, MIXED_TOKENS)
    return tuple(round(math.exp(generator.uniform(low, high))) for _ in range(batch))


def pages_of(length: int, page_size: int = PAGE_SIZE) -> int:
    return -(-length // page_size)


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Of one round: times of a call, in us, and of its baseline where there is one."""

    ours: list[float]
    baseline: list[float]


class FloorParams(ctypes.Structure):
    """Params in stream_floor.cu."""

    _fields_ = [
        ("map", ctypes.c_uint64 * (driver.TENSOR_MAP_BYTES // 8)),
        ("pages", ctypes.c_uint64),
        ("tiles", ctypes.c_int32),
        ("padding", ctypes.c_char * 52),  # the tensor map gives the kernel's struct an alignment of 64 bytes
    ]


class Problem:
    """The arrays of a cell on the GPU: normal numbers, pages in random order."""

    def __init__(self, cell: Cell, seed: int) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        dtype = getattr(torch, cell.dtype)
        batch = len(cell.lengths)

        def normal(*shape: int) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)

        tokens = (sum(cell.queries),) if cell.queries else (batch, cell.s_q)
        self.q = normal(*tokens, cell.heads, CACHE_DIM)
        self.starts = None
        if cell.queries:
            self.starts = torch.tensor(list(accumulate(cell.queries, initial=0)), dtype=torch.int32, device="cuda")
        counts = [pages_of(length, cell.page_size) for length in cell.lengths]
        self.cache = normal(sum(counts), cell.page_size, CACHE_DIM)
        self.out = normal(*tokens, cell.heads, LATENT_DIM)
        self.page_order = torch.randperm(sum(counts), generator=generator, device="cuda").int()
        self.block_table = torch.nn.utils.rnn.pad_sequence(self.page_order.split(counts), batch_first=True)
        self.cache_seqlens = torch.tensor(cell.lengths, dtype=torch.int32, device="cuda")

    def decode(self) -> None:
        mla_decode(
            self.q,
            self.cache,
            self.block_table,
            self.cache_seqlens,
            softmax_scale=SOFTMAX_SCALE,
            cu_seqlens_q=self.starts,
            out=self.out,
        )

    def plan(self) -> Callable[[], None]:
        plan = plan_decode(
            self.q, self.cache, self.block_table, self.cache_seqlens, softmax_scale=SOFTMAX_SCALE, out=self.out
        )
        return lambda: plan.run(self.q)

    def decode_into_new(self) -> None:
        mla_decode(self.q, self.cache, self.block_table, self.cache_seqlens, softmax_scale=SOFTMAX_SCALE)


class Write:
    """New tokens on their way into a cache, and a copy of as many bytes to hold it against."""

    def __init__(self, tokens: Sequence[int]) -> None:
        import torch

        pages = sum(pages_of(count) for count in tokens)
        self.cache = PagedKVCache(pages, PAGE_SIZE, dtype=torch.bfloat16, device="cuda")
        self.slots = self.cache.reserve([self.cache.new_sequence() for _ in tokens], list(tokens))
        self.rows = torch.randn(sum(tokens), CACHE_DIM, device="cuda").to(torch.bfloat16)
        self.target = torch.empty_like(self.rows)

    def write(self) -> None:
        self.cache.write(0, self.slots, self.rows[:, :LATENT_DIM], self.rows[:, LATENT_DIM:])

    def copy(self) -> None:
        self.target.copy_(self.rows)


class Bench:
    """The GPU with what every measurement on it needs."""

    def __init__(self, samples: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("torch cannot use the GPU", "a torch build for CUDA")
        self.torch = torch
        self.samples = samples
        self.device = torch.cuda.current_device()
        self.sms = driver.sm_count(self.device)  # that calls run on
        self.part_streams: dict[int, int] = {}  # by SMs, streams that run on a part of the GPU
        self.floor_kernel = driver.load_kernel(compile_floor(), "stream_floor", self.device)
        self.l2_cleaner = torch.zeros(L2_CLEANER_BYTES // 4, dtype=torch.int32, device="cuda")
        for _ in range(WARM_UP_CLEANINGS):
            self.clean_l2()

    def sample(self, cell: Cell, seed: int) -> Samples:
        """One round of a cell."""
        if cell.group == "compile":
            return Samples([time_compile()], [])
        if cell.group == "host":
            problem = Problem(cell, seed)
            return Samples(self.time_host(problem.plan() if cell.planned else problem.decode_into_new), [])
        with self.on_sms(cell.sms):
            calls = self.calls_of(cell, seed)
            if cell.calls_in_graph:
                calls = [self.capture(call, cell.calls_in_graph) for call in calls]
            times = self.time_gpu(calls)
        return Samples(*([us / max(1, cell.calls_in_graph) for us in series] for series in times))

    def possible(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that can be measured here; says of the others why they cannot."""
        reasons = {cell: self.why_not(cell) for cell in cells}
        for cell, reason in reasons.items():
            if reason:
                print(f"{cell.name} is skipped: {reason}", file=sys.stderr)
        return [cell for cell, reason in reasons.items() if not reason]

    def why_not(self, cell: Cell) -> str:
        """Why a cell cannot be measured: the GPU cannot be divided like that; empty if it can."""
        try:
            if cell.sms:
                self.part_stream(cell.sms)
        except EtapError as error:
            return str(error)
        return ""

    def part_stream(self, sms: int) -> int:
        """The stream that runs on so many SMs."""
        if sms not in self.part_streams:
            self.part_streams[sms] = green_context.stream_on(sms, self.device)
        return self.part_streams[sms]

    @contextmanager
    def on_sms(self, count: int) -> Iterator[None]:
        """Within, torch's current stream runs on `count` SMs; 0 leaves everything as it is."""
        if not count:
            yield
            return
        all_sms = self.sms
        self.torch.cuda.synchronize()
        try:
            with self.torch.cuda.stream(self.torch.cuda.ExternalStream(self.part_stream(count))):
                self.sms = count
                yield
        finally:
            self.sms = all_sms
            self.torch.cuda.synchronize()

    def calls_of(self, cell: Cell, seed: int) -> list[Callable[[], None]]:
        """What a cell is about, and its baseline."""
        if cell.written:
            write = Write(cell.written)
            return [write.write, write.copy]
        problem = Problem(cell, seed)
        if cell.page_size == PAGE_SIZE and not cell.queries:
            return [problem.decode, self.floor_call(problem)]
        return [problem.decode, Problem(replace(cell, page_size=PAGE_SIZE, queries=()), seed).decode]

    def floor_call(self, problem: Problem) -> Callable[[], None]:
        """A call of the stream floor over the problem's pages, on torch's current stream."""
        params = FloorParams(pages=problem.page_order.data_ptr(), tiles=len(problem.page_order))
        page_bytes, token_bytes = PAGE_BYTES, CACHE_DIM * 2
        # Numbers are not looked at, so one type of two bytes serves for both.
        params.map[:] = memoryview(
            driver.encode_tensor_map(
                "bfloat16",
                problem.cache.data_ptr(),
                (CACHE_DIM, PAGE_SIZE, problem.cache.shape[0]),
                (token_bytes, page_bytes),
                (64, PAGE_SIZE, 1),
            )
        ).cast("Q")
        ctas = self.sms

        def call() -> None:
            stream = self.torch.cuda.current_stream().cuda_stream
            self.floor_kernel.launch(ctas, FLOOR_THREADS, FLOOR_SHARED_BYTES, stream, ctypes.addressof(params))

        return call

    def capture(self, call: Callable[[], None], times: int) -> Callable[[], None]:
        """Replay a CUDA graph of so many calls, each after the one before."""
        graph = self.torch.cuda.CUDAGraph()
        # A graph runs on the SMs of the stream that it was captured on.
        stream = None if self.sms == driver.sm_count(self.device) else self.torch.cuda.current_stream()
        with self.torch.cuda.graph(graph, stream=stream):
            for _ in range(times):
                call()
        replay: Callable[[], None] = graph.replay
        return replay

    def time_gpu(self, calls: Sequence[Callable[[], None]]) -> list[list[float]]:
        """GPU time of each call in us, measured in turns.

        Cleaning takes longer than the host needs for a call, so the GPU never waits for the host between events. What
        events read still depends on where in the sequence they are: on an H100 every second pair of them reads 0.4 to
        0.8 us more, whatever is between. So the calls are made in one order and in the other, and a sample is the mean.
        A kernel that follows itself takes 0.2 to 0.4 us less on an H200: half of the samples do, of each of two calls.
        """
        for _ in range(WARM_UP_CALLS):
            for call in calls:
                call()
        spans: list[list[tuple[Any, Any]]] = [[] for _ in calls]
        turns = list(zip(calls, spans))
        for _ in range(self.samples):
            for call, span in [*turns, *reversed(turns)]:
                start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.clean_l2()
                start.record()
                call()
                end.record()
                span.append((start, end))
        self.torch.cuda.synchronize()
        times = [[start.elapsed_time(end) * 1e3 for start, end in span] for span in spans]
        return [[(one + other) / 2 for one, other in zip(series[::2], series[1::2])] for series in times]

    def clean_l2(self) -> None:
        """Reading leaves nothing behind to be written back, which would be charged to the next call."""
        self.l2_cleaner.max()

    def time_host(self, call: Callable[[], None]) -> list[float]:
        """Host time of one eager call in us, while the stream has room for more."""
        times = []
        for _ in range(WARM_UP_CALLS + self.samples):
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
        self.torch.cuda.synchronize()
        return times[WARM_UP_CALLS:]


def time_compile() -> float:
    """Time in us to compile one kernel in a new process with an empty disk cache."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), compiler.CACHE_VARIABLE: empty}
        environment["CUDA_CACHE_DISABLE"] = "1"  # NVRTC keeps a cache of its own
        command = [sys.executable, "-c", COMPILE_CODE]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout) * 1e6


def compile_floor() -> bytes:
    """The stream floor's cubin. Raises CuPy's NVRTCError."""
    compiler.nvrtc_version()  # says what is missing if NVRTC cannot be opened
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(FLOOR_SOURCE.read_text(), FLOOR_SOURCE.name, (), ())
    try:
        options = (f"-arch={compiler.ARCH}", "-std=c++17", "-default-device", f"-I{ROOT / 'cuda_src'}")
        nvrtc.compileProgram(program, options)
        cubin: bytes = nvrtc.getCUBIN(program) + b"\0"  # CuPy drops the last byte
    finally:
        nvrtc.destroyProgram(program)
    return cubin


def entry_of(cell: Cell, rounds: Sequence[Samples]) -> dict[str, Any]:
    """What the result file says about a cell; rates count each page once."""
    entry: dict[str, Any] = {"group": cell.group, "row": cell.row, "column": cell.column}
    entry["us"], entry["noise_us"] = summarize([samples.ours for samples in rounds])
    if rounds[0].baseline:
        entry["baseline"] = cell.baseline
        entry["floor_us"], entry["floor_noise_us"] = summarize([samples.baseline for samples in rounds])
        entry["ratio"] = round(entry["us"] / entry["floor_us"], 4)
        entry["tb_per_s"] = round(cell.bytes / entry["us"] / 1e6, 3)
        entry["tflop_per_s"] = round(cell.flop / entry["us"] / 1e6, 2)
    if cell.target:
        entry["target"] = {cell.target.unit: cell.target.limit}
        entry["met"] = entry[cell.target.unit] <= cell.target.limit
    return entry


def summarize(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The median of all samples, and how far the medians of the rounds lie apart."""
    medians = [statistics.median(samples) for samples in rounds]
    median = statistics.median(sample for samples in rounds for sample in samples)
    return round(median, 3), round(max(medians) - min(medians), 3)


def run(groups: Sequence[str], samples: int, sms: int, output: Path | None) -> int:
    from gpu_check import describe_machine, hash_sources

    start = time.monotonic()
    try:
        machine = describe_machine()
        bench = Bench(samples)
    except (EtapError, ImportError) as error:
        print(f"cannot measure here: {error}", file=sys.stderr)
        return 2
    cells = [cell for cell in all_cells() if cell.group in groups]
    cells = bench.possible(cells_on(sms, cells) if sms else cells)
    if not cells:
        print("nothing to measure", file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources_sha256": hash_sources(),
        **machine,
        "sms_used": sms or machine["sms"],
        "samples": samples,
        "rounds": ROUNDS,
    }
    rounds = [[bench.sample(cell, seed) for cell in with_progress(cells, seed)] for seed in range(ROUNDS)]
    results["cells"] = {cell.name: entry_of(cell, samples) for cell, samples in zip(cells, zip(*rounds))}
    results["seconds"] = round(time.monotonic() - start, 1)
    print(describe_run(results))
    print_results(results)
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {output}")
    return 0


def with_progress(cells: Sequence[Cell], seed: int) -> Iterator[Cell]:
    """The cells, each named on the terminal while it is under way."""
    shown = sys.stderr.isatty()
    for number, cell in enumerate(cells, seed * len(cells) + 1):
        if shown:
            print(f"\r\033[K{number} of {ROUNDS * len(cells)}: {cell.name}", end="", file=sys.stderr, flush=True)
        yield cell
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- Showing and comparing -------------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    headings = ("call", "us", "+-", "baseline us", "ratio", "target", "met", "TB/s", "TFLOP/s", "baseline")
    entries = results["cells"]
    print_table(headings, [[name, *format_entry(entry)] for name, entry in entries.items()])
    asked = [entry["met"] for entry in entries.values() if "met" in entry]
    print(f"{sum(asked)} of {len(asked)} targets met, {results['seconds']} s")


def format_entry(entry: dict[str, Any]) -> list[str]:
    target = "".join(str(Target(unit, limit)) for unit, limit in entry.get("target", {}).items())
    return [
        format_us(entry["us"]),
        format_us(entry["noise_us"]),
        format_us(entry.get("floor_us")),
        format_number(entry.get("ratio"), 3),
        target,
        {True: "yes", False: "NO", None: ""}[entry.get("met")],
        format_number(entry.get("tb_per_s"), 2),
        format_number(entry.get("tflop_per_s"), 1),
        entry.get("baseline", ""),
    ]


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print the cells that moved by more than the noise of both files; 1 if any got slower, else 0."""
    print(f"old: {describe_run(old)}\nnew: {describe_run(new)}")
    if machine_of(old) != machine_of(new):
        print("different machines: look at the baseline too")
    common = [name for name in old["cells"] if name in new["cells"]]
    moved, slower = [], 0
    for name in common:
        before, after = old["cells"][name], new["cells"][name]
        change, noise = after["us"] - before["us"], noise_between(before, after)
        if abs(change) > noise:
            slower += change > 0
            word = "slower" if change > 0 else "faster"
            times = [format_us(value) for value in (before["us"], after["us"], noise)]
            moved.append([name, *times, percent(before, after, "us"), percent(before, after, "floor_us"), word])
    if moved:
        print_table(("call", "old us", "new us", "noise us", "change", "baseline", ""), moved)
    print(f"{slower} slower, {len(moved) - slower} faster, {len(common) - len(moved)} within the noise")
    for label, these, others in (("old", old, new), ("new", new, old)):
        alone = [name for name in these["cells"] if name not in others["cells"]]
        if alone:
            print(f"only in {label}: {'; '.join(alone)}")
    return 1 if slower else 0


def machine_of(results: Mapping[str, Any]) -> tuple[Any, ...]:
    return results["gpu"], results["sms"], sms_used(results), results["driver"]


def sms_used(results: Mapping[str, Any]) -> int:
    """SMs that the calls could use; files from before `--sms` do not say."""
    return int(results.get("sms_used", results["sms"]))


def noise_between(before: dict[str, Any], after: dict[str, Any]) -> float:
    """How far the two times, in us, may lie apart by chance."""
    least = LEAST_HOST_NOISE if before["group"] in HOST_GROUPS else LEAST_NOISE
    measured: float = before["noise_us"] + after["noise_us"]
    return max(measured, least * float(before["us"]), LEAST_NOISE_US)


def percent(before: dict[str, Any], after: dict[str, Any], field: str) -> str:
    if field not in before or field not in after:
        return ""
    return f"{100 * (after[field] / before[field] - 1):+.1f}%"


def markdown(results: dict[str, Any]) -> str:
    """The README's tables: lengths against batches, then all else a line each."""
    entries = list(results["cells"].values())
    by_length: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        if entry["group"] in TABLE_GROUPS:
            by_length.setdefault(entry["row"], {})[entry["column"]] = entry
    lines = [f"{describe_run(results)}.", ""]
    if by_length:
        columns = [format_tokens(tokens) for tokens in TOKENS]
        lines += ["Time of a call in us, and in brackets that time over the stream floor; 16 heads, a page of 64.", ""]
        lines += markdown_table(
            ["", *columns],
            [[row, *(format_short(cells.get(column)) for column in columns)] for row, cells in by_length.items()],
        )
        lines.append("")
    others = [
        [f"{entry['row']}, {entry['column']}", *(format_entry(entry)[i] for i in (0, 2, 3, 6, 7, 8))]
        for entry in entries
        if entry["group"] not in TABLE_GROUPS
    ]
    if others:
        lines += markdown_table(["", "us", "baseline us", "ratio", "TB/s", "TFLOP/s", "baseline"], others)
    return "\n".join(lines).rstrip()


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def format_short(entry: dict[str, Any] | None) -> str:
    return f"{format_us(entry['us'])} ({entry['ratio']:.2f})" if entry else ""


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich if it is there and somebody is looking, else as plain text."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            table.add_column(headings[0], no_wrap=True)
            for heading in headings[1:]:
                table.add_column(heading, justify="right")
            for row in rows:
                table.add_row(*row, style="red" if {"NO", "slower"} & set(row) else None)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    for row in (headings, *rows):
        first, *others = (text.rjust(width) for text, width in zip(row, widths))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def describe_run(results: Mapping[str, Any]) -> str:
    used = sms_used(results)
    sms = f"{used} of {results['sms']}" if used < results["sms"] else results["sms"]
    machine = f"{results['gpu']} ({sms} SMs), driver {results['driver']}"
    compiled = f"NVRTC {results['versions']['nvrtc']}"
    return f"{machine}, {compiled}, {results['date'][:10]}, sources {results['sources_sha256'][:12]}"


def format_us(us: float | None) -> str:
    """Microseconds to a tenth; from a second on, seconds with their unit."""
    if us is None:
        return ""
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us:.1f}"


def format_number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_tokens(tokens: int) -> str:
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--peers" in arguments:
        import peer_bench  # which imports this module

        arguments.remove("--peers")
        return peer_bench.main(arguments)
    groups = list(dict.fromkeys(cell.group for cell in all_cells()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=groups, help="measure this group; may be given again")
    parser.add_argument("--sms", type=positive, default=0, metavar="N", help="on N SMs of the GPU (default: all)")
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="of each round (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="beside other libraries; see --peers --help")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument("--compare", type=read_results, nargs=2, metavar=("OLD", "NEW"), help="compare result files")
    reading.add_argument("--markdown", type=read_results, metavar="FILE", help="print a result file's tables")
    options = parser.parse_args(arguments)
    if options.compare:
        return compare(*options.compare)
    if options.markdown:
        print(markdown(options.markdown))
        return 0
    return run(options.only or groups, options.samples, options.sms, options.json)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def read_results(text: str) -> dict[str, Any]:
    try:
        results = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error}") from error
    if not isinstance(results, dict) or "cells" not in results:
        raise argparse.ArgumentTypeError(f"{text} is no result file of this program")
    return results


if __name__ == "__main__":
    sys.exit(main())
