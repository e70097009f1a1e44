"""PagedKVCache on a GPU, seen through a CuPy that takes notes: its memory is the host's, its kernels do nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from etap_rt import compiler, driver, kv_memory
from etap_rt.errors import CompileError, UnsupportedError
from etap_rt.interop import BFLOAT16
from etap_rt.kv_cache import PagedKVCache
from tests.fake_gpu import pass_tensors_for_cuda

torch: Any = pytest.importorskip("torch")

STREAMS = {"cupy": 0xC, "torch": 0x7}  # current in each library
SIZES: dict[str, Any] = {"num_layers": 2, "latent_dim": 16, "rope_dim": 8}


class CupyArray:
    """What is read of a CuPy array, over one of NumPy. Its flags know nothing of writing, like those of CuPy."""

    def __init__(self, array: Any, device: int = 0) -> None:
        self.array = array
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.data = SimpleNamespace(ptr=array.ctypes.data, device_id=device)
        self.flags = SimpleNamespace(c_contiguous=True)

    def __getitem__(self, index: Any) -> CupyArray:
        return CupyArray(self.array[index], self.data.device_id)


class DlpackArray:
    """An array that only speaks DLPack."""

    def __init__(self, array: Any, device_type: int) -> None:
        self.array = array
        self.device_type = device_type

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0


class Pinned(np.ndarray[Any, Any]):
    """Pinned memory."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


class Gpu:
    """CuPy, the compiler and the driver with GPUs that take notes."""

    def __init__(self) -> None:
        self.current = 0  # device
        self.checked: list[int] = []  # devices that had to be Hoppers
        self.captured: set[int] = set()  # streams
        self.launches: list[tuple[str, Any, int]] = []  # entry, source_key when it was loaded, stream
        self.uploads: list[int] = []  # streams
        self.pending: set[int] = set()  # events that were recorded and not waited for
        self.waits = 0

    def load(self, spec: Any, device: int) -> Any:
        """In place of `compiler.load`."""
        sources = compiler.source_key()

        def launch(grid: int, block: int, shared_bytes: int, stream: int, params_address: int) -> None:
            self.launches.append((spec.entry, sources, stream))

        return SimpleNamespace(launch=launch)

    def cupy(self) -> Any:
        runtime = SimpleNamespace(
            getDevice=lambda: self.current,
            memcpyHostToDevice=1,
            memcpyAsync=self._copy,
            memsetAsync=lambda address, value, size, stream: ctypes.memset(address, value, size),
            eventRecord=lambda event, stream: self.pending.add(event),
            eventSynchronize=self._wait,
        )
        events = iter(range(1000))
        return SimpleNamespace(
            ndarray=CupyArray,
            empty=lambda shape, dtype: CupyArray(np.empty(shape, dtype), self.current),
            from_dlpack=lambda x: CupyArray(x.array),
            cuda=SimpleNamespace(
                runtime=runtime,
                Device=self._device,
                Event=lambda disable_timing: SimpleNamespace(ptr=next(events)),
                alloc_pinned_memory=lambda size: np.zeros(size, np.int8).view(Pinned),
            ),
        )

    def _device(self, index: int | None) -> Any:
        """A context manager with the device's id, in which it is current."""
        gpu = self

        class Device:
            id = gpu.current if index is None else index

            def __enter__(self) -> None:
                self.outer, gpu.current = gpu.current, self.id

            def __exit__(self, *error: object) -> None:
                gpu.current = self.outer

        return Device()

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        ctypes.memmove(target, source, size)
        self.uploads.append(stream)

    def _wait(self, event: int) -> None:
        self.waits += event in self.pending
        self.pending.discard(event)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    pass_tensors_for_cuda(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy())
    monkeypatch.setattr(kv_memory, "current_stream", lambda layout: STREAMS[layout.library])
    monkeypatch.setattr(driver, "device_count", lambda: 2)
    monkeypatch.setattr(driver, "capturing", lambda device, stream: stream in gpu.captured)
    monkeypatch.setattr(compiler, "require_hopper", gpu.checked.append)
    monkeypatch.setattr(compiler, "load", gpu.load)
    return gpu


def small_cache(**options: Any) -> PagedKVCache:
    return PagedKVCache(16, 4, **SIZES, **options)


# ---- Where the pool lies ----


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("dtype", ["float16", torch.float16], ids=["cupy", "torch"])
def test_without_cupy_the_error_says_what_is_needed(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dtype: Any, device: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UnsupportedError, match=r"needed: CuPy .*pip install 'etap-rt\[cuda13\]'"):
        small_cache(dtype=dtype, device=device)


def test_without_a_gpu_the_error_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> int:
        raise UnsupportedError("the CUDA driver does not start", "a working NVIDIA GPU")

    monkeypatch.setattr(driver, "device_count", no_gpu)
    with pytest.raises(UnsupportedError, match="needed: a working NVIDIA GPU"):
        small_cache(device="cuda")


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:1", 1), ("cuda:0", 0)])
def test_a_cupy_pool_lies_on_the_device_that_was_checked(gpu: Gpu, device: str, index: int) -> None:
    gpu.current = 1
    cache = small_cache(device=device)
    assert cache.device == f"cuda:{index}" and gpu.checked == [index]


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:1", 1), ("cuda:0", 0)])
def test_a_torch_pool_lies_on_the_device_that_was_checked(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    devices, empty = [], torch.empty

    def note_device(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        devices.append(device)
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", note_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    small_cache(dtype=torch.float16, device=device)
    assert devices == [f"cuda:{index}"] and gpu.checked == [index]


# ---- Slots ----


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_reserve_fills_a_dlpack_array_on_the_gpu_and_returns_it(gpu: Gpu, dtype: Any) -> None:
    cache = small_cache(device="cuda")
    out = DlpackArray(np.zeros(4, dtype), device_type=2)
    assert cache.reserve([cache.new_sequence()], [3], out=out) is out
    assert out.array.tolist() == [0, 1, 2, -1]


def test_reserve_fills_a_dlpack_array_on_the_cpu_and_returns_it() -> None:
    cache = small_cache(device="cpu")
    out = DlpackArray(np.zeros(4, np.int32), device_type=1)
    if not np.from_dlpack(out).flags.writeable:
        pytest.skip("what comes through DLPack is read-only with this NumPy")
    assert cache.reserve([cache.new_sequence()], [3], out=out) is out
    assert out.array.tolist() == [0, 1, 2, -1]


# ---- Kernels ----


def own_sources(directory: Path) -> Path:
    (directory / "kv_write.cu").write_text("// mine")
    return directory


def take_a_step(cache: PagedKVCache, sequence: int) -> None:
    """With a launch of each kernel: the sequence's last page is shared."""
    cache.fork(sequence)
    slots = cache.reserve([sequence], [1])
    cache.write(0, slots, CupyArray(np.zeros((1, 16), BFLOAT16)), CupyArray(np.zeros((1, 8), BFLOAT16)))
    cache.batch([sequence])


@pytest.mark.parametrize("made_within", [False, True])
def test_kernel_sources_hold_for_the_calls_within(gpu: Gpu, tmp_path: Path, made_within: bool) -> None:
    with compiler.kernel_sources(own_sources(tmp_path)) if made_within else nullcontext():
        cache = small_cache(device="cuda")
    a = cache.new_sequence()
    cache.reserve([a], [1])
    take_a_step(cache, a)
    with compiler.kernel_sources(tmp_path if made_within else own_sources(tmp_path)):
        own = compiler.source_key()
        take_a_step(cache, a)
    take_a_step(cache, a)
    entries = ["page_copy", "kv_write", "batch_update"]
    launches = [(entry, sources) for entry, sources, _ in gpu.launches]
    assert launches == [(entry, sources) for sources in (None, own, None) for entry in entries]


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.reserve([0], [5]),
        lambda cache: cache.batch([0]),
        lambda cache: cache.import_((np.zeros((2, 3, 16), BFLOAT16), np.zeros((2, 3, 8), BFLOAT16))),
    ],
    ids=["reserve", "batch", "import_"],
)
def test_sources_that_do_not_compile_leave_the_cache_as_it_was(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Callable[[PagedKVCache], Any]
) -> None:
    cache = small_cache(device="cuda")
    cache.reserve([cache.new_sequence()], [3])

    def refuse(spec: Any, device: int) -> Any:
        raise CompileError(spec, (), "error: expected a declaration")

    before = cache.stats(), cache.sequences, cache._sequences[0].sent
    with monkeypatch.context() as broken, compiler.kernel_sources(own_sources(tmp_path)):
        broken.setattr(compiler, "load", refuse)
        with pytest.raises(CompileError):
            call(cache)
    assert before == (cache.stats(), cache.sequences, cache._sequences[0].sent)


# ---- Streams ----


def test_write_follows_the_stream_of_the_rows(gpu: Gpu) -> None:
    cache = small_cache(device="cuda")
    cache.reserve([cache.new_sequence()], [2])
    gpu.captured = {STREAMS["cupy"]}  # which is of no concern to rows of torch
    gpu.uploads.clear()
    cache.write(0, np.array([0, 1]), torch.zeros(2, 16), torch.zeros(2, 8))
    assert gpu.launches == [("kv_write", None, STREAMS["torch"])] and gpu.uploads == [STREAMS["torch"]]


def test_slots_on_the_host_are_refused_while_the_stream_of_the_rows_is_captured(gpu: Gpu) -> None:
    cache = small_cache(device="cuda")
    cache.reserve([cache.new_sequence()], [2])
    gpu.captured = {STREAMS["torch"]}
    gpu.uploads.clear()
    with pytest.raises(UnsupportedError, match="^write with slots on the host while the stream is captured"):
        cache.write(0, np.array([0, 1]), torch.zeros(2, 16), torch.zeros(2, 8))
    assert gpu.launches == gpu.uploads == []


@pytest.mark.parametrize(
    "call",
    [lambda cache: cache.reserve([0], [1]), lambda cache: cache.batch([0]), lambda cache: cache.export(0)],
    ids=["reserve", "batch", "export"],
)
def test_what_the_host_decides_is_refused_while_the_stream_of_the_cache_is_captured(
    gpu: Gpu, call: Callable[[PagedKVCache], Any]
) -> None:
    cache = small_cache(device="cuda")
    cache.new_sequence()
    gpu.captured = {STREAMS["cupy"]}
    with pytest.raises(UnsupportedError, match="captured"):
        call(cache)


def test_the_host_waits_only_for_a_buffer_that_the_gpu_still_needs(gpu: Gpu) -> None:
    cache = small_cache(device="cuda")
    a = cache.new_sequence()
    for _ in range(kv_memory.STAGING_BUFFERS // 2):  # a step uses one to reserve, one for the batch
        cache.reserve([a], [1])
        cache.batch([a])
    assert gpu.waits == 0
    cache.reserve([a], [1])
    assert gpu.waits == 1
