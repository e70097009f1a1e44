"""The main job end to end: fill a paged cache, decode, compare with float64, measure.

With a Hopper GPU the problem is a serving step of real size. Without one a smaller problem runs on the CPU backend,
and the kernels are compiled all the same.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from etap_rt import compiler, driver, interop
from etap_rt.decode import mla_decode
from etap_rt.errors import UnsupportedError
from etap_rt.interop import describe, to_host
from etap_rt.kernels import ELEMENT_TYPES, decode_spec
from etap_rt.kv_cache import Batch, PagedKVCache
from etap_rt.reference import decode_float64
from etap_rt.schedule import ROW_TILES

Library = Literal["torch", "cupy", "numpy"]
Step = Callable[[str], None]  # is told what is being done, before it is

REQUESTS = 16
HEADS = 16
LATENT_DIM, ROPE_DIM = 512, 64
PAGE_SIZE = 64
SCALE = (128 + 64) ** -0.5  # DeepSeek's: of the dims before absorption
SHORTEST_ON_GPU, SHORTEST_ON_CPU = 1000, 30  # tokens; the longest request has 32 times as many
FILL_TOKENS = 1024  # of each request that one step of filling writes
GPU_RUNS, CPU_RUNS = 20, 3
ACCEPTED_ERROR = 3e-3  # of the output in bfloat16: norm of the difference over the norm of the exact result
ACCEPTED_LSE_ERROR = 5e-5  # largest difference


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Distance from the exact result."""

    error: float  # norm of the output's difference over the norm of the exact output
    lse_error: float  # largest difference

    @property
    def accepted(self) -> bool:
        return self.error <= ACCEPTED_ERROR and self.lse_error <= ACCEPTED_LSE_ERROR


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did and found."""

    device: str
    library: Library
    no_gpu: str  # why it ran on the CPU; empty if it did not
    lengths: tuple[int, ...]
    accuracy: Accuracy
    times_us: tuple[float, ...]  # one a run
    kernels: tuple[compiler.Compiled, ...]  # that were compiled only to show that they compile
    no_kernels: str  # why none was; empty if that was possible, or not wanted

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def time_us(self) -> float:
        return statistics.median(self.times_us)

    @property
    def tb_per_s(self) -> float:
        """Rate at which the cache was read."""
        return self.tokens * (LATENT_DIM + ROPE_DIM) * 2 / self.time_us * 1e-6

    @property
    def tflop_per_s(self) -> float:
        """Rate of the multiplications and additions that attention needs; padding does not count."""
        return 2 * HEADS * self.tokens * (2 * LATENT_DIM + ROPE_DIM) / self.time_us * 1e-6


@dataclass(frozen=True, slots=True)
class Problem:
    """Queries and cached tokens on the host, bfloat16."""

    q: NDArray[Any]  # (requests, 1, HEADS, LATENT_DIM + ROPE_DIM)
    tokens: tuple[NDArray[Any], ...]  # a request: (length, LATENT_DIM + ROPE_DIM)


@dataclass(frozen=True, slots=True)
class Trial:
    """A problem in a paged cache, ready to be decoded."""

    q: Any
    cache: PagedKVCache
    batch: Batch

    def decode(self, return_lse: bool = False) -> Any:
        """The call that all this is about."""
        table, lengths = self.batch
        return mla_decode(self.q, self.cache.pages(0), table, lengths, softmax_scale=SCALE, return_lse=return_lse)


def run(step: Step) -> Demo:
    """Run the demo on what the machine has. `step` is told what comes next."""
    no_gpu = why_no_gpu()
    library = "numpy" if no_gpu else gpu_library()
    lengths = mixed_lengths(SHORTEST_ON_CPU if no_gpu else SHORTEST_ON_GPU)
    step(f"filling a paged cache with {sum(lengths):,} tokens")
    problem = make_problem(lengths)
    trial = prepare(problem, library)
    step("decoding" if no_gpu else "decoding, after the kernel is compiled or read from the disk cache")
    out, lse = trial.decode(return_lse=True)
    step("comparing with float64")
    accuracy = compare(problem, out, lse)
    step("measuring")
    if no_gpu:
        times_us = time_on_cpu(trial)
        kernels, no_kernels = try_to_compile(step)
        return Demo("CPU", library, no_gpu, lengths, accuracy, times_us, kernels, no_kernels)
    times_us = time_on_gpu(trial, prepare(problem, library))
    return Demo(driver.device_name(0), library, "", lengths, accuracy, times_us, (), "")


def why_no_gpu() -> str:
    """Why decode on the GPU is not possible, in words; empty if it is."""
    try:
        if driver.device_count() == 0:
            return "no GPU is visible"
        compiler.require_hopper(0)
    except UnsupportedError as error:
        return str(error)
    return ""


def gpu_library() -> Library:
    """Whose arrays to use on the GPU: torch's if it is installed with CUDA, else CuPy's."""
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return "torch"
    return "cupy"


def mixed_lengths(shortest: int) -> tuple[int, ...]:
    """Lengths of REQUESTS requests, evenly spread on a logarithmic scale from `shortest` to 32 times that."""
    return tuple(round(shortest * 32 ** (i / (REQUESTS - 1))) for i in range(REQUESTS))


def make_problem(lengths: Sequence[int]) -> Problem:
    """Normally distributed queries and tokens, the same ones every time."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[Any]:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    dims = LATENT_DIM + ROPE_DIM
    return Problem(normal(len(lengths), 1, HEADS, dims), tuple(normal(n, dims) for n in lengths))


def prepare(problem: Problem, library: Library) -> Trial:
    """Put a problem into a cache. Tokens arrive in turns, as in serving, so the pages of the requests mix."""
    pages = sum(-(-len(tokens) // PAGE_SIZE) for tokens in problem.tokens)
    cache = PagedKVCache(pages, PAGE_SIZE, 1, LATENT_DIM, ROPE_DIM, **_placement(library))
    sequences = [cache.new_sequence() for _ in problem.tokens]
    for start in range(0, max(map(len, problem.tokens)), FILL_TOKENS):
        parts = [tokens[start : start + FILL_TOKENS] for tokens in problem.tokens]
        slots = cache.reserve(sequences, [len(part) for part in parts])
        rows = to_device(np.concatenate(parts), library)
        cache.write(0, slots, rows[:, :LATENT_DIM], rows[:, LATENT_DIM:])
    return Trial(to_device(problem.q, library), cache, cache.batch(sequences))


def to_device(array: NDArray[Any], library: Library) -> Any:
    """A bfloat16 array of NumPy as an array of `library`, on the GPU unless that is NumPy."""
    if library == "numpy":
        return array
    if library == "torch":
        import torch

        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return interop.import_cupy().asarray(array)


def compare(problem: Problem, out: Any, lse: Any) -> Accuracy:
    """Hold a result against the exact one, which is computed from the tokens and knows nothing of the cache."""
    lengths = np.array([len(tokens) for tokens in problem.tokens], np.int32)
    squares = exact_squares = lse_error = 0.0
    host_out, host_lse = to_host(describe(out, "out")), to_host(describe(lse, "lse"))
    for i, tokens in enumerate(problem.tokens):
        as_one_page = tokens[None], np.zeros((1, 1), np.int32), lengths[i : i + 1]
        exact_out, exact_lse = decode_float64(problem.q[i : i + 1], *as_one_page, SCALE, True)
        squares += float(np.square(host_out[i] - exact_out[0]).sum())
        exact_squares += float(np.square(exact_out).sum())
        lse_error = max(lse_error, float(np.abs(host_lse[i] - exact_lse[0]).max()))
    return Accuracy((squares / exact_squares) ** 0.5, lse_error)


def time_on_cpu(trial: Trial) -> tuple[float, ...]:
    """Microseconds of each of CPU_RUNS calls."""
    times = []
    for _ in range(CPU_RUNS):
        start = time.perf_counter()
        trial.decode()
        times.append((time.perf_counter() - start) * 1e6)
    return tuple(times)


def time_on_gpu(trial: Trial, other: Trial) -> tuple[float, ...]:
    """Microseconds on the GPU of each of GPU_RUNS calls, with nothing that they need in the L2 cache.

    What cleans the L2 cache is decode itself, reading `other`, several times as large as L2. It runs twice, so that
    the GPU is still busy with it when the measured call is enqueued, and the host's time stays out of the result.
    """
    from cupy.cuda import Event, get_elapsed_time

    times = []
    for _ in range(GPU_RUNS):
        start, end = Event(), Event()
        other.decode()
        other.decode()
        start.record()
        trial.decode()
        end.record()
        end.synchronize()
        times.append(get_elapsed_time(start, end) * 1e3)
    return tuple(times)


def try_to_compile(step: Step) -> tuple[tuple[compiler.Compiled, ...], str]:
    """Compile the decode kernels of the demo's dims for sm_90a. Without NVRTC: none, and what is missing."""
    specs = [decode_spec(dtype, LATENT_DIM, ROPE_DIM, rows) for dtype in ELEMENT_TYPES for rows in ROW_TILES]
    step(f"compiling {len(specs)} kernels for {compiler.ARCH}")
    try:
        return tuple(compiler.compile_specs(specs)), ""
    except UnsupportedError as error:
        return (), str(error)


def _placement(library: Library) -> dict[str, Any]:
    """How PagedKVCache is told the library and the device of its arrays."""
    if library == "torch":
        import torch

        return {"dtype": torch.bfloat16, "device": "cuda"}
    return {"dtype": "bfloat16", "device": "cpu" if library == "numpy" else "cuda"}
