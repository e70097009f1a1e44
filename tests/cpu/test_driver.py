"""The driver calls, against a libcuda made of C callbacks: arguments as they arrive across the C ABI, and errors.

The callbacks have the prototypes of cuda.h; the functions that the package calls have none, like those of a real
library, so a pointer that is passed as a plain int arrives cut off.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import pytest

from etap_rt import compiler, driver, interop
from etap_rt.errors import EtapError, UnsupportedError
from etap_rt.kernels import KernelSpec

HANDLE, STREAM, CONTEXT, MODULE = 0x7F00_1234_5678, 0x5500_AABB_CCDD, 0x5611_2233_4455, 0x5622_3344_5566
PER_THREAD = 2  # CU_STREAM_PER_THREAD of cuda.h
NOT_INITIALIZED, NO_DEVICE, INVALID_IMAGE, INVALID_CONTEXT, INVALID_HANDLE = 3, 100, 200, 201, 400
ERROR_NAMES = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    NOT_INITIALIZED: b"CUDA_ERROR_NOT_INITIALIZED",
    NO_DEVICE: b"CUDA_ERROR_NO_DEVICE",
    INVALID_IMAGE: b"CUDA_ERROR_INVALID_IMAGE",
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
}
RELAXED, GLOBAL = 2, 0


class LaunchAttribute(Structure):
    _fields_ = [("id", c_int), ("padding", ctypes.c_char * 4), ("value", c_int), ("rest", ctypes.c_char * 60)]


class LaunchConfig(Structure):
    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("attribute_count", c_uint),
    ]


u32p, u64p, intp, voidpp = POINTER(c_uint32), POINTER(c_uint64), POINTER(c_int), POINTER(c_void_p)
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (intp,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (intp, c_int),
    "cuDeviceGetCount": (intp,),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (intp, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (voidpp, c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (voidpp,),
    "cuModuleLoadData": (voidpp, c_void_p),
    "cuModuleGetFunction": (voidpp, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (POINTER(LaunchConfig), c_void_p, voidpp, voidpp),
    "cuStreamIsCapturing": (c_void_p, intp),
    "cuStreamGetCaptureInfo_v2": (c_void_p, intp, u64p, c_void_p, c_void_p, c_void_p),
    "cuStreamGetGreenCtx": (c_void_p, voidpp),
    "cuGreenCtxGetDevResource": (c_void_p, c_void_p, c_int),
    "cuThreadExchangeStreamCaptureMode": (intp,),
    "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint32, c_void_p, u64p, u64p, u32p, u32p, c_int, c_int, c_int, c_int),
    "cuMemAlloc_v2": (u64p, c_size_t),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (voidpp, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
}


class FakeCuda:
    """libcuda on one Hopper GPU. `fail` makes the next calls of a function return errors; `log` has what happened."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fail: dict[str, list[int]] = {}
        self.contexts: list[int] = []
        self.capture = (0, 0)  # status, id
        self.green = 0  # SMs of the streams' green context; 0 for none
        self.capture_mode = GLOBAL
        self.capability = (9, 0)
        self._callbacks = []
        for name, prototype in PROTOTYPES.items():
            callback = ctypes.CFUNCTYPE(c_int, *prototype)(self._implementation(name))
            self._callbacks.append(callback)
            setattr(self, name, ctypes.CFUNCTYPE(c_int)(ctypes.cast(callback, c_void_p).value))

    def _implementation(self, name: str) -> Callable[..., int]:
        body = getattr(self, f"_{name.removesuffix('_v2')}", lambda *arguments: None)

        def call(*arguments: Any) -> int:
            status = self.fail.get(name, [])
            if status and (error := status.pop(0)):
                return error
            body(*arguments)
            return 0

        return call

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.log if entry[0] == name]

    def _cuGetErrorName(self, status: int, name: Any) -> None:
        name[0] = ERROR_NAMES[status]

    def _cuGetErrorString(self, status: int, text: Any) -> None:
        text[0] = b"what it means"

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 12040

    def _cuDeviceGetCount(self, count: Any) -> None:
        count[0] = 1

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device[0] = ordinal

    def _cuDeviceGetName(self, name: int, size: int, device: int) -> None:
        ctypes.memmove(name, b"Fake H200\0", 10)

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value[0] = {16: 132, 75: self.capability[0], 76: self.capability[1]}[attribute]

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        self.log.append(("retain", device))
        context[0] = CONTEXT

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent(self, context: Any) -> None:
        context[0] = self.contexts.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:
        mode[0], self.capture_mode = self.capture_mode, mode[0]

    def _cuModuleLoadData(self, module: Any, image: int) -> None:
        self.log.append(("load", ctypes.string_at(image, 6), self.capture_mode, list(self.contexts)))
        module[0] = MODULE

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        self.log.append(("function", module, name))
        function[0] = HANDLE

    def _cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.log.append(("attribute", function, attribute, value))

    def _cuLaunchKernelEx(self, config: Any, function: int, parameters: Any, extra: Any) -> None:
        numbers = [getattr(config[0], name) for name, _ in LaunchConfig._fields_[:7]]
        attributes = [(a.id, a.value) for a in config[0].attributes[: config[0].attribute_count]]
        value = ctypes.string_at(parameters[0], ctypes.sizeof(Params))
        shape = (function, *numbers, config[0].stream, attributes)
        self.log.append(("launch", *shape, value, bool(extra), list(self.contexts)))

    def _cuStreamIsCapturing(self, stream: int, status: Any) -> None:
        self.log.append(("is capturing", stream))
        status[0] = self.capture[0]

    def _cuStreamGetCaptureInfo(self, stream: int, status: Any, number: Any, *unused: Any) -> None:
        self.log.append(("capture info", stream, *unused))
        status[0], number[0] = self.capture

    def _cuStreamGetGreenCtx(self, stream: int, context: Any) -> None:
        self.log.append(("green context", stream, list(self.contexts)))
        context[0] = CONTEXT if self.green else None

    def _cuGreenCtxGetDevResource(self, context: int, resource: int, kind: int) -> None:
        assert (context, kind) == (CONTEXT, 1)
        c_uint.from_address(resource + 96).value = self.green  # of the 144 bytes of a CUdevResource

    def _cuStreamSynchronize(self, stream: int) -> None:
        self.log.append(("synchronize", stream, self.capture_mode, list(self.contexts)))

    def _cuMemAlloc(self, address: Any, size: int) -> None:
        self.log.append(("allocate", size, self.capture_mode, list(self.contexts)))
        address[0] = HANDLE

    def _cuTensorMapEncodeTiled(self, result: int, dtype: int, rank: int, address: int, *rest: Any) -> None:
        dims, strides, box, steps, *modes = rest
        arrays = [list(dims[:rank]), list(strides[: rank - 1]), list(box[:rank]), list(steps[:rank])]
        self.log.append(("encode", result % 64, dtype, address, *arrays, modes))
        ctypes.memmove(result, bytes(range(128)), 128)


class Params(Structure):
    _fields_ = [("pointer", c_uint64), ("count", c_int)]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    cached = (driver._libcuda, driver._retained_context, driver.sm_count, driver.compute_capability)
    cached += (driver._has_green_contexts,)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(driver, "_open_library", lambda: fake)
    monkeypatch.setattr(driver, "_questions", driver._ThreadsQuestions())
    yield fake
    assert fake.contexts == [], "every context that was pushed is popped"
    assert fake.capture_mode == GLOBAL, "the thread's capture mode is as before"
    for function in cached:
        function.cache_clear()


def launch(kernel: driver.Kernel, shared: int = 0) -> bytes:
    """Launch with fixed numbers and return the bytes of the parameter."""
    params = Params(0x7FFF_0000_1111_2222, 7)
    kernel.launch(132, 384, shared, STREAM, ctypes.addressof(params))
    return bytes(params)


def test_a_launch_arrives_as_it_was_asked_for(cuda: FakeCuda) -> None:
    expected = launch(driver.Kernel("k", HANDLE, 0))
    assert cuda.calls("launch") == [(HANDLE, 132, 1, 1, 384, 1, 1, 0, STREAM, [], expected, False, [])]


def test_an_early_launch_is_allowed_to_overlap_the_one_before(cuda: FakeCuda) -> None:
    params = Params(0x7FFF_0000_1111_2222, 7)
    driver.Kernel("k", HANDLE, 0).prepare(132, 384, 200_000, ctypes.addressof(params), early=True)(STREAM)
    programmatic_stream_serialization = (6, 1)
    attributes = [programmatic_stream_serialization]
    assert cuda.calls("launch") == [
        (HANDLE, 132, 1, 1, 384, 1, 1, 200_000, STREAM, attributes, bytes(params), False, [])
    ]
    assert cuda.calls("attribute") == [(HANDLE, 8, 200_000)]


def test_an_early_launch_that_fails_names_the_error(cuda: FakeCuda) -> None:
    cuda.fail["cuLaunchKernelEx"] = [1]
    with pytest.raises(EtapError, match=r"CUDA_ERROR_INVALID_VALUE.*132 CTAs of 384 threads"):
        driver.Kernel("k", HANDLE, 0).prepare(132, 384, 0, ctypes.addressof(Params(1, 2)), early=True)(STREAM)


def test_the_null_stream_is_a_stream(cuda: FakeCuda) -> None:
    params = Params(1, 2)
    driver.Kernel("k", HANDLE, 0).launch(1, 32, 0, 0, ctypes.addressof(params))
    assert cuda.calls("launch")[0][8] is None


def test_the_limit_of_shared_memory_is_raised_once(cuda: FakeCuda) -> None:
    kernel = driver.Kernel("k", HANDLE, 0)
    for shared in (200_000, 200_000, 1000, 232_448):
        launch(kernel, shared)
    assert cuda.calls("attribute") == [(HANDLE, 8, 200_000), (HANDLE, 8, 232_448)]


def test_too_much_shared_memory_is_an_error_that_says_how_much(cuda: FakeCuda) -> None:
    cuda.fail["cuFuncSetAttribute"] = [1]
    with pytest.raises(EtapError, match=r"CUDA_ERROR_INVALID_VALUE.*300000 bytes of shared memory for k"):
        launch(driver.Kernel("k", HANDLE, 0), 300_000)
    assert cuda.calls("launch") == []


@pytest.mark.parametrize("error", [INVALID_CONTEXT, INVALID_HANDLE])
def test_a_launch_from_a_thread_without_the_devices_context_works(cuda: FakeCuda, error: int) -> None:
    cuda.fail["cuLaunchKernelEx"] = [error]
    expected = launch(driver.Kernel("k", HANDLE, 0))
    assert cuda.calls("launch") == [(HANDLE, 132, 1, 1, 384, 1, 1, 0, STREAM, [], expected, False, [CONTEXT])]


def test_a_launch_that_fails_names_the_error_and_the_kernel(cuda: FakeCuda) -> None:
    cuda.fail["cuLaunchKernelEx"] = [INVALID_HANDLE, 1]
    with pytest.raises(
        EtapError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE: what it means \(<Kernel k"
    ):
        launch(driver.Kernel("k", HANDLE, 0))


def test_loading_works_while_another_stream_is_captured(cuda: FakeCuda) -> None:
    kernel = driver.load_kernel(b"\x7fELF\0!", "mla_decode", 3)
    assert (kernel.handle, kernel.name, kernel.device) == (HANDLE, "mla_decode", 3)
    assert cuda.calls("load") == [(b"\x7fELF\0!", RELAXED, [CONTEXT])]
    assert cuda.calls("function") == [(MODULE, b"mla_decode")]
    assert cuda.calls("retain") == [(3,)]


def test_a_driver_older_than_the_compiler_is_named(cuda: FakeCuda) -> None:
    cuda.fail["cuModuleLoadData"] = [INVALID_IMAGE]
    with pytest.raises(UnsupportedError, match=r"CUDA_ERROR_INVALID_IMAGE.*needed: a driver .* for CUDA 12\.4"):
        driver.load_kernel(b"\x7fELF", "k", 0)


def test_a_function_that_is_not_in_the_module_is_an_error(cuda: FakeCuda) -> None:
    cuda.fail["cuModuleGetFunction"] = [1]
    with pytest.raises(EtapError, match=r"cuModuleGetFunction failed.*\(k\)"):
        driver.load_kernel(b"\x7fELF", "k", 0)


def test_capturing_tells_captures_apart(cuda: FakeCuda) -> None:
    assert driver.capturing(0, STREAM) == 0
    cuda.capture = (1, 2**40 + 5)
    assert driver.capturing(0, STREAM) == 2**40 + 5
    assert cuda.calls("capture info") == [(STREAM, None, None, None)]
    cuda.capture = (0, 0)
    assert driver.capturing(0, STREAM) == 0


def test_the_legacy_stream_is_not_asked_for_a_capture_that_it_cannot_have(cuda: FakeCuda) -> None:
    cuda.fail["cuStreamIsCapturing"] = [906]  # as while somebody captures a blocking stream
    assert driver.stream_state(0, 0) == (0, 0, 132)
    assert cuda.calls("green context") == [(None, [])]


@pytest.mark.parametrize("error", [INVALID_CONTEXT, INVALID_HANDLE])
def test_a_thread_without_the_devices_context_can_ask_for_captures(cuda: FakeCuda, error: int) -> None:
    cuda.capture = (1, 7)
    cuda.fail |= {"cuStreamIsCapturing": [error], "cuStreamGetCaptureInfo_v2": [error]}
    assert driver.capturing(3, STREAM) == 7
    assert cuda.calls("retain") == [(3,)]
    assert cuda.contexts == []


@pytest.mark.parametrize("call", ["cuStreamIsCapturing", "cuStreamGetCaptureInfo_v2"])
def test_a_stream_that_cannot_be_asked_is_an_error(cuda: FakeCuda, call: str) -> None:
    cuda.capture = (1, 7)
    cuda.fail[call] = [INVALID_HANDLE, INVALID_HANDLE]
    name = call.removesuffix("_v2")
    with pytest.raises(EtapError, match=f"{name} failed: CUDA_ERROR_INVALID_HANDLE.*{STREAM:#x}"):
        driver.capturing(0, STREAM)


def test_threads_that_ask_about_one_stream_get_their_own_answers(cuda: FakeCuda) -> None:
    """While one thread's question is under way, another gets the answer from before a capture began."""
    asked = threading.Event()

    def ask(stream: int, status: Any) -> int:
        if threading.current_thread() is threading.main_thread():
            status[0] = 1
            other.start()
            other.join()
        else:
            status[0] = 0
            asked.set()
        return 0

    callback = ctypes.CFUNCTYPE(c_int, *PROTOTYPES["cuStreamIsCapturing"])(ask)
    cuda.cuStreamIsCapturing = ctypes.CFUNCTYPE(c_int)(ctypes.cast(callback, c_void_p).value)  # type: ignore[attr-defined]
    cuda.capture = (1, 7)
    answers = []
    other = threading.Thread(target=lambda: answers.append(driver.capturing(0, STREAM)))
    assert driver.capturing(0, STREAM) == 7
    assert asked.is_set() and answers == [0]


@pytest.mark.parametrize(("element", "number"), [("float16", 6), ("bfloat16", 9)])
def test_a_tensor_map_is_encoded_with_these_numbers(cuda: FakeCuda, element: Any, number: int) -> None:
    address, page_bytes = 0x7F12_3456_7890, 2**33
    encoded = driver.encode_tensor_map(element, address, (512, 64, 2**31), (1152, page_bytes), (64, 64, 1))
    assert encoded == bytes(range(128))
    dims, strides, box, steps, modes = [512, 64, 2**31], [1152, page_bytes], [64, 64, 1], [1, 1, 1], [0, 3, 2, 0]
    assert cuda.calls("encode") == [(0, number, address, dims, strides, box, steps, modes)]


def test_a_tensor_map_that_the_driver_refuses_says_what_was_asked(cuda: FakeCuda) -> None:
    cuda.fail["cuTensorMapEncodeTiled"] = [1]
    with pytest.raises(EtapError, match=r"dims \(512, 3\), strides \(1000,\) bytes, box \(64, 64\)"):
        driver.encode_tensor_map("bfloat16", 0x1000, (512, 3), (1000,), (64, 64))
    with pytest.raises(ValueError, match="2 dims need 1 strides"):
        driver.encode_tensor_map("bfloat16", 0x1000, (512, 3), (), (64, 64))


def test_what_the_gpu_is(cuda: FakeCuda) -> None:
    assert driver.device_count() == 1
    assert driver.device_name(0) == "Fake H200"
    assert driver.sm_count(0) == 132
    assert driver.compute_capability(0) == (9, 0)
    assert driver.format_version(driver.driver_version()) == "12.4"


def test_a_stream_of_a_green_context_has_its_sms(cuda: FakeCuda) -> None:
    assert driver.stream_state(0, STREAM) == (STREAM, 0, 132)
    cuda.green = 32
    cuda.capture = (1, 7)
    assert driver.stream_state(0, STREAM) == (STREAM, 7, 32)
    cuda.fail["cuStreamGetGreenCtx"] = [INVALID_CONTEXT]  # a thread that made no CUDA call yet
    assert driver.stream_sm_count(0, STREAM) == 32
    assert cuda.calls("green context") == [(STREAM, [])] * 2 + [(STREAM, [CONTEXT])]


def test_each_green_context_has_default_streams(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same handles. What a thread of its own launched there is not waited for, so nobody gets its identity."""
    monkeypatch.setattr(driver, "_identities_left", [])
    cuda.green = 32
    assert driver.stream_state(0, STREAM) == (STREAM, 0, 32)
    found = []

    def ask() -> None:
        found.extend(driver.stream_state(0, stream)[0] for stream in (0, 1, PER_THREAD))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    (zero, own) = found[0], found[2]
    assert found == [(0, CONTEXT), (1, CONTEXT), (own[0], CONTEXT)] and own[0] < 0 and zero != own
    assert not driver._identities_left and not cuda.calls("synchronize")


def test_each_thread_has_a_default_stream_of_its_own(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one handle. A thread takes over the identity of one that has ended, whose work is done by then."""
    monkeypatch.setattr(driver, "_identities_left", [])

    def identity(device: int = 0) -> int:
        return driver.stream_state(device, PER_THREAD)[0]

    def identities(threads: int) -> list[tuple[int, int]]:
        """Of threads that run at the same time, each asked on both devices; they end one after the other."""
        found: list[tuple[int, int]] = []
        asked, ends = ([threading.Event() for _ in range(threads)] for _ in range(2))

        def ask(i: int) -> None:
            found.append((identity(0), identity(3)))
            asked[i].set()
            ends[i].wait()

        workers = [threading.Thread(target=ask, args=(i,)) for i in range(threads)]
        for i, worker in enumerate(workers):
            worker.start()
            asked[i].wait()
        for i, worker in enumerate(workers):
            ends[i].set()
            worker.join()
        return found

    mine = identity()
    first = identities(2)
    assert all(one == other < 0 for one, other in first) and len({mine, *(one for one, _ in first)}) == 3
    assert identity() == mine
    assert cuda.calls("synchronize") == [(PER_THREAD, RELAXED, [CONTEXT])] * 4  # both threads, on both devices
    assert identities(1)[0] in first
    cuda.fail["cuStreamSynchronize"] = [1]  # it is being captured
    taken = identities(1)[0]
    assert identities(2).count(taken) == 0


def test_a_driver_without_green_contexts_has_all_sms_on_every_stream(cuda: FakeCuda) -> None:
    del cuda.cuStreamGetGreenCtx
    assert driver.stream_sm_count(0, STREAM) == 132


def test_without_a_driver_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: no such file")

    driver._libcuda.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(UnsupportedError, match=r"libcuda.so.1: no such file.*needed: a GPU with the NVIDIA driver"):
        driver.device_count()


def test_a_driver_without_tensor_maps_is_too_old(cuda: FakeCuda) -> None:
    del cuda.cuTensorMapEncodeTiled  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match=r"no cuTensorMapEncodeTiled; needed: a driver for CUDA 12"):
        driver.device_count()


def test_a_driver_that_does_not_start_may_be_asked_again(cuda: FakeCuda) -> None:
    cuda.fail["cuInit"] = [NO_DEVICE]
    with pytest.raises(UnsupportedError, match=r"CUDA_ERROR_NO_DEVICE: what it means; needed: a working NVIDIA GPU"):
        driver.device_count()
    assert driver.device_count() == 1


def test_an_error_without_a_name_is_still_reported(cuda: FakeCuda) -> None:
    cuda.fail |= {"cuDeviceGetCount": [NOT_INITIALIZED], "cuGetErrorName": [1]}
    with pytest.raises(EtapError, match="cuDeviceGetCount failed: CUDA error 3"):
        driver.device_count()


def test_a_kernel_is_loaded_once_a_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec("k.cu", "k", ())
    monkeypatch.setattr(compiler, "_loaded", {})
    monkeypatch.setattr(
        compiler, "compile_spec", lambda spec: compiler.Compiled(spec, "sm_90a", b"cubin\0", None, "", (), 0.0, True)
    )
    first = compiler.load(spec, 0)
    assert compiler.load(KernelSpec("k.cu", "k", ()), 0) is first
    assert compiler.load(spec, 1) is not first
    assert [entry[0] for entry in cuda.calls("load")] == [b"cubin\0"] * 2
    assert cuda.calls("retain") == [(0,), (1,)]


def test_other_gpus_than_hopper_are_refused_before_anything_is_compiled(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.capability = (8, 0)
    monkeypatch.setattr(compiler, "compile_spec", lambda spec: pytest.fail("compiled"))
    with pytest.raises(UnsupportedError, match=r"Fake H200, has compute capability 8\.0; needed: a Hopper GPU .*9\.0"):
        compiler.load(KernelSpec("k.cu", "other", ()), 0)


def test_memory_is_allocated_while_another_stream_is_captured(cuda: FakeCuda) -> None:
    size = 2**33
    assert driver.allocate_zeroed(0, size) == HANDLE
    assert cuda.calls("allocate") == [(size, RELAXED, [CONTEXT])]


# ---- Forks ----


def in_forked_process(work: Callable[[], Any]) -> str:
    """What `work` raises in a process that is forked now; empty if nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


FORKED = r"UnsupportedError: process \d+ was forked after CUDA had been started.*needed: .*get_context\("


def test_a_process_that_is_forked_after_the_first_call_is_told_so(cuda: FakeCuda) -> None:
    driver.device_count()
    kernel = driver.Kernel("k", HANDLE, 0)
    layout = interop.Layout("torch", "float32", "cuda", 0, (1,), (1,))
    for work in (
        driver.device_count,
        lambda: driver.capturing(0, STREAM),
        lambda: driver.load_kernel(b"\x7fELF", "k", 0),
        lambda: interop.empty(layout, None, (1,), "float32"),
        lambda: in_forked_process(driver.device_count) and driver.device_count(),
    ):
        assert re.match(FORKED, in_forked_process(work))
    cuda.fail["cuLaunchKernelEx"] = [NOT_INITIALIZED]
    assert re.match(FORKED, in_forked_process(lambda: launch(kernel)))
    assert driver.device_count() == 1, "the parent goes on"


def test_a_process_that_is_forked_before_works(cuda: FakeCuda) -> None:
    assert in_forked_process(driver.device_count) == ""
    cuda.fail["cuInit"] = [NOT_INITIALIZED]  # as when torch or CuPy had started CUDA before
    assert re.match(FORKED, in_forked_process(driver.device_count))
    cuda.fail["cuInit"] = [NOT_INITIALIZED]
    with pytest.raises(UnsupportedError, match="does not start"):
        driver.device_count()
