"""The few calls of the CUDA driver that etap_rt needs, through ctypes.

libcuda is opened by the first call, not at import. All work happens in the device's primary context, the one
that torch and CuPy use.

The functions on the hot path have no `argtypes` on purpose: ctypes then passes Python ints as C ints and
`c_void_p` objects as pointers, which halves the host time of a launch. So every pointer, handle and stream
that goes into one of them must be wrapped.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p, pointer
from typing import Literal

from etap_rt.errors import EtapError, UnsupportedError

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64  # of the buffer that cuTensorMapEncodeTiled writes, and of the kernel parameter

# Values of enums in cuda.h.
_CUDA_ERROR_NOT_INITIALIZED = 3
_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_CUDA_ERROR_INVALID_IMAGE = 200
_CUDA_ERROR_INVALID_CONTEXT = 201
_CUDA_ERROR_NO_BINARY_FOR_GPU = 209
_CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
_CUDA_ERROR_INVALID_HANDLE = 400
# What a call meets in a thread that made no CUDA call yet, or that works on another GPU.
_CUDA_ERRORS_OF_OTHER_CONTEXTS = (_CUDA_ERROR_INVALID_CONTEXT, _CUDA_ERROR_INVALID_HANDLE)
_CUDA_ERRORS_OF_OLD_DRIVERS = (
    _CUDA_ERROR_INVALID_IMAGE,
    _CUDA_ERROR_NO_BINARY_FOR_GPU,
    _CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
)
_LEGACY_STREAM = 0
_PER_THREAD_STREAM = 2
_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
_DEVICE_RESOURCE_TYPE_SM = 1
_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
_STREAM_CAPTURE_MODE_RELAXED = 2
_STREAM_NON_BLOCKING = 1
_TENSOR_MAP_DATA_TYPE = {"float16": 6, "bfloat16": 9}
_TENSOR_MAP_INTERLEAVE_NONE = 0
_TENSOR_MAP_SWIZZLE_128B = 3
# As wide as the rows of a box; with 256 bytes the memory delivers a tenth less. Measured on an H200, in one run, 256
# and 128 bytes: 16 requests of 64K, loads alone, 295 and 264 us; decoded, 16 of 16K 82.2 and 78.0, 32 of 8K 80.9 and
# 77.5.
_TENSOR_MAP_L2_PROMOTION_128B = 2
_TENSOR_MAP_OOB_FILL_NONE = 0

_FUNCTIONS = (
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
    "cuStreamIsCapturing",
    "cuStreamGetCaptureInfo_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuTensorMapEncodeTiled",
    "cuMemAlloc_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
)

# Of drivers for CUDA 12.4 and newer. Without them there are no green contexts either.
_FUNCTIONS_FOR_GREEN_CONTEXTS = ("cuStreamGetGreenCtx", "cuGreenCtxGetDevResource")

# In a forked process: whether the driver had been started when it was forked, after which it works no more.
_forked = False
_started_before_fork = False


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h; its value is a union of 64 bytes."""

    _fields_ = [("id", c_uint), ("padding", c_uint), ("value", c_uint * 16)]


class _SmResource(ctypes.Structure):
    """CUdevResource of cuda.h as it is for multiprocessors."""

    _fields_ = [("kind", c_uint), ("internal", c_uint * 23), ("sm_count", c_uint), ("rest", c_uint * 11)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", POINTER(_LaunchAttribute)),
        ("attribute_count", c_uint),
    ]


class _Questions:
    """What is asked about a stream before every launch on it, and where the answers go.

    To make the arguments anew would take longer than the calls. Answers are of the thread that asks.
    """

    __slots__ = ("capture_status", "green_context", "identity", "is_capturing", "which_green_context")

    def __init__(self, stream: int) -> None:
        lib, handle = _libcuda(), c_void_p(stream)
        self.identity = _questions.own_stream.identity if stream == _PER_THREAD_STREAM else stream
        self.capture_status = c_int()
        self.is_capturing = functools.partial(lib.cuStreamIsCapturing, handle, byref(self.capture_status))
        self.green_context = c_void_p()
        self.which_green_context: Callable[[], int] | None = None
        if _has_green_contexts():
            self.which_green_context = functools.partial(lib.cuStreamGetGreenCtx, handle, byref(self.green_context))


class _QuestionsByStream(dict[int, _Questions]):
    def __missing__(self, stream: int) -> _Questions:
        questions = self[stream] = _Questions(stream)
        return questions


class _OwnStream:
    """The calling thread's own default stream: all threads have one, with the same handle in all of them.

    `identity` tells it apart: no handle, and of no other thread that runs.
    """

    def __init__(self) -> None:
        try:
            self.identity = _identities_left.pop()
        except IndexError:
            self.identity = next(_new_identities)
        self.devices: set[int] = set()
        self.in_green_contexts = False
        self._process = os.getpid()

    def __del__(self) -> None:
        """In the thread, when it ends: the next to have the identity must find nothing of this one's work running."""
        if self.in_green_contexts or self._process != os.getpid():  # others to wait for, or a fork without the thread
            return
        try:
            for device in self.devices:
                with _primary_context(device), _relaxed_capture():
                    _check(_libcuda().cuStreamSynchronize(c_void_p(_PER_THREAD_STREAM)), "cuStreamSynchronize")
            _identities_left.append(self.identity)
        except Exception:  # the stream is being captured, or the process is at its end: nobody gets it then
            pass


class _ThreadsQuestions(threading.local):
    def __init__(self) -> None:
        self.about = _QuestionsByStream()
        self.own_stream = _OwnStream()


_new_identities = itertools.count(-1, -1)
_identities_left: list[int] = []  # of threads that have ended
_questions = _ThreadsQuestions()


class Kernel:
    """A function of a loaded module on one device. `handle` is its CUfunction."""

    __slots__ = ("_function", "_launch", "_shared_limit", "device", "handle", "name")

    def __init__(self, name: str, handle: int, device: int) -> None:
        self.name = name
        self.handle = handle
        self.device = device
        self._function = c_void_p(handle)
        self._launch = _libcuda().cuLaunchKernelEx
        self._shared_limit = 0

    def __repr__(self) -> str:
        return f"<Kernel {self.name} on CUDA device {self.device}>"

    def launch(self, grid: int, block: int, shared_bytes: int, stream: int, params_address: int) -> None:
        """Launch `grid` CTAs of `block` threads with `shared_bytes` of dynamic shared memory on `stream`.

        `stream` is a CUstream, 0 for the legacy default stream. The kernel has one parameter, passed by value:
        it is read from the host address `params_address` before this returns.
        """
        self.prepare(grid, block, shared_bytes, params_address)(stream)

    def prepare(
        self, grid: int, block: int, shared_bytes: int, params_address: int, early: bool = False
    ) -> Callable[[int], None]:
        """`launch` with all but the stream given, for what is launched again and again, by one thread at a time.

        An `early` kernel may start before the stream's previous one has ended, and has to wait for it itself: that is
        "griddepcontrol.wait" of the PTX manual.
        """
        self.allow_shared(shared_bytes)
        config = _LaunchConfig(grid, 1, 1, block, 1, 1, shared_bytes)
        if early:
            attribute = _LaunchAttribute(_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            attribute.value[0] = 1
            config.attributes, config.attribute_count = pointer(attribute), 1
        # cuLaunchKernel would take eleven arguments, which are converted again in every call.
        launch = functools.partial(self._launch, byref(config), self._function, byref(c_void_p(params_address)), None)

        def launch_on(stream: int) -> None:
            config.stream = stream
            status = launch()
            if status:
                _try_again(status, self.device, launch, "cuLaunchKernelEx", self._about(config))

        return launch_on

    def allow_shared(self, shared_bytes: int) -> None:
        """Raise the function's limit of dynamic shared memory, 48 KiB unless asked, to at least `shared_bytes`."""
        if shared_bytes <= self._shared_limit:
            return
        with _primary_context(self.device):
            status = _libcuda().cuFuncSetAttribute(
                self._function, _FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )
        _check(status, "cuFuncSetAttribute", f"{shared_bytes} bytes of shared memory for {self.name}")
        self._shared_limit = shared_bytes

    def _about(self, config: _LaunchConfig) -> str:
        return f"{self!r}, {config.grid_x} CTAs of {config.block_x} threads, {config.shared_bytes} bytes shared"


def load_kernel(cubin: bytes, entry: str, device: int) -> Kernel:
    """Load a cubin on `device` and return its function `entry`. The module stays loaded for good.

    May be called while a stream is being captured.
    """
    lib = _libcuda()
    module, function = c_void_p(), c_void_p()
    with _primary_context(device), _relaxed_capture():
        status = lib.cuModuleLoadData(byref(module), c_char_p(cubin))
        if status in _CUDA_ERRORS_OF_OLD_DRIVERS:
            raise UnsupportedError(
                f"the driver cannot load {entry} ({_error_name(status)})",
                f"a driver at least as new as the compiler; this one is for CUDA {format_version(driver_version())}",
            )
        _check(status, "cuModuleLoadData", entry)
        _check(lib.cuModuleGetFunction(byref(function), module, c_char_p(entry.encode())), "cuModuleGetFunction", entry)
    assert function.value is not None
    return Kernel(entry, function.value, device)


def stream_state(device: int, stream: int) -> tuple[Hashable, int, int]:
    """What there is to know of a stream of `device` before a launch on it: (identity, capture, multiprocessors).

    The identity is its handle, or what tells it apart where other streams have the same: 0 and 1 stand for the default
    stream of the context that is current, and 2 for the calling thread's own there. `capture` is the id of the capture
    that it is part of, 0 for none. The multiprocessors that its work may use are those of its green context, without
    one all of the device. All is asked anew each time, as captures begin and end, and a handle may come back with
    another stream.
    """
    if _started_before_fork:
        refuse_fork()
    questions = _questions.about[stream]
    identity: Hashable = questions.identity
    capture = 0
    if stream != _LEGACY_STREAM:  # which CUDA does not let anybody capture
        if stream == _PER_THREAD_STREAM:
            _questions.own_stream.devices.add(device)
        status = questions.is_capturing()
        if status:
            _try_again(status, device, questions.is_capturing, "cuStreamIsCapturing", f"stream {stream:#x}")
        if questions.capture_status:
            capture = _capture_id(device, stream)
    ask = questions.which_green_context
    if ask is not None:
        status = ask()
        if status:
            _try_again(status, device, ask, "cuStreamGetGreenCtx", f"stream {stream:#x}")
        if questions.green_context:
            if stream <= _PER_THREAD_STREAM:  # handles of which each context has a stream
                identity = identity, questions.green_context.value
                _questions.own_stream.in_green_contexts |= stream == _PER_THREAD_STREAM
            return identity, capture, _green_context_sms(questions.green_context)
    return identity, capture, sm_count(device)


def capturing(device: int, stream: int) -> int:
    """The id of the capture that `stream` of `device` is part of, 0 when it is not being captured."""
    return stream_state(device, stream)[1]


def stream_sm_count(device: int, stream: int) -> int:
    """Multiprocessors that work on `stream` of `device` may use."""
    return stream_state(device, stream)[2]


def _capture_id(device: int, stream: int) -> int:
    status, number = c_int(), c_uint64()
    question = c_void_p(stream), byref(status), byref(number), None, None, None
    ask = functools.partial(_libcuda().cuStreamGetCaptureInfo_v2, *question)
    error = ask()
    if error:
        _try_again(error, device, ask, "cuStreamGetCaptureInfo", f"stream {stream:#x}")
    return number.value if status else 0


def _green_context_sms(context: c_void_p) -> int:
    resource, lib = _SmResource(), _libcuda()
    _check(lib.cuGreenCtxGetDevResource(context, byref(resource), _DEVICE_RESOURCE_TYPE_SM), "cuGreenCtxGetDevResource")
    return int(resource.sm_count)


def allocate_zeroed(device: int, size: int) -> int:
    """The address of `size` new bytes on the device, all zero; never freed. Waits for the GPU, but not for other work.

    May be called while a stream is being captured.
    """
    lib = _libcuda()
    memory, stream = c_uint64(), c_void_p()
    with _primary_context(device), _relaxed_capture():
        _check(lib.cuMemAlloc_v2(byref(memory), c_size_t(size)), "cuMemAlloc", f"{size} bytes on CUDA device {device}")
        _check(lib.cuStreamCreate(byref(stream), _STREAM_NON_BLOCKING), "cuStreamCreate")
        status = lib.cuMemsetD8Async(memory, 0, c_size_t(size), stream) or lib.cuStreamSynchronize(stream)
        lib.cuStreamDestroy_v2(stream)
        _check(status, "cuMemsetD8Async", f"{size} bytes")
    return memory.value


def encode_tensor_map(
    element_type: Literal["bfloat16", "float16"],
    address: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
) -> bytes:
    """The 128 bytes of a tensor map over global memory at `address` (a multiple of 16).

    dims           elements in each dimension, the contiguous one first
    strides_bytes  of dims[1:], multiples of 16
    box            elements in each dimension that one copy brings

    Rows of 128 bytes are laid out with the 128-byte swizzle, elements outside of dims arrive as zeros. Raises EtapError
    when the driver refuses the numbers.
    """
    rank = len(dims)
    if len(strides_bytes) != rank - 1 or len(box) != rank:
        raise ValueError(f"{rank} dims need {rank - 1} strides and {rank} box sizes, got {strides_bytes} and {box}")
    buffer = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(buffer) % TENSOR_MAP_ALIGNMENT
    status = _libcuda().cuTensorMapEncodeTiled(
        byref(buffer, offset),
        _TENSOR_MAP_DATA_TYPE[element_type],
        rank,
        c_void_p(address),
        (c_uint64 * rank)(*dims),
        (c_uint64 * rank)(*strides_bytes),
        (c_uint32 * rank)(*box),
        (c_uint32 * rank)(*[1] * rank),
        _TENSOR_MAP_INTERLEAVE_NONE,
        _TENSOR_MAP_SWIZZLE_128B,
        _TENSOR_MAP_L2_PROMOTION_128B,
        _TENSOR_MAP_OOB_FILL_NONE,
    )
    _check(
        status,
        "cuTensorMapEncodeTiled",
        f"{element_type} at {address:#x}, dims {dims}, strides {strides_bytes} bytes, box {box}",
    )
    return buffer.raw[offset : offset + TENSOR_MAP_BYTES]


def driver_version() -> int:
    """The newest CUDA version that the driver supports, as 1000 * major + 10 * minor."""
    version = c_int()
    _check(_libcuda().cuDriverGetVersion(byref(version)), "cuDriverGetVersion")
    return version.value


def format_version(version: int) -> str:
    """A CUDA version number as people write it: 12040 is "12.4"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device_count() -> int:
    """GPUs that this process may use."""
    count = c_int()
    _check(_libcuda().cuDeviceGetCount(byref(count)), "cuDeviceGetCount")
    return count.value


def device_name(device: int) -> str:
    """What the GPU is called, such as "NVIDIA H200"."""
    name = ctypes.create_string_buffer(256)
    _check(_libcuda().cuDeviceGetName(name, len(name), _device(device)), "cuDeviceGetName")
    return name.value.decode(errors="replace")


@functools.cache
def sm_count(device: int) -> int:
    """Multiprocessors of the GPU."""
    return _device_attribute(device, _DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)


@functools.cache
def _has_green_contexts() -> bool:
    return all(hasattr(_libcuda(), name) for name in _FUNCTIONS_FOR_GREEN_CONTEXTS)


@functools.cache
def compute_capability(device: int) -> tuple[int, int]:
    """(major, minor); Hopper is (9, 0)."""
    return (
        _device_attribute(device, _DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        _device_attribute(device, _DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )


def refuse_fork() -> None:
    """Raise UnsupportedError in a process that was forked after CUDA had been started; costs 0.05 us elsewhere."""
    if _started_before_fork:
        raise UnsupportedError(
            f"process {os.getpid()} was forked after CUDA had been started, so CUDA does not work in it",
            'a process of its own: multiprocessing.get_context("spawn"), or a fork before anything uses the GPU',
        )


def _note_fork() -> None:
    global _forked, _started_before_fork
    _forked = True
    _started_before_fork = _started_before_fork or _libcuda.cache_info().currsize > 0
    _libcuda.cache_clear()


os.register_at_fork(after_in_child=_note_fork)


def _open_library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the CUDA driver cannot be opened ({error})", "a GPU with the NVIDIA driver") from error


@functools.cache
def _libcuda() -> ctypes.CDLL:
    """libcuda, opened and initialised by the first call. A failure is not remembered, so one may try again."""
    global _started_before_fork
    refuse_fork()
    lib = _open_library()
    missing = [name for name in _FUNCTIONS if not hasattr(lib, name)]
    if missing:
        raise UnsupportedError(f"the CUDA driver has no {missing[0]}", "a driver for CUDA 12.0 or newer")
    status = lib.cuInit(c_uint(0))
    if status == _CUDA_ERROR_NOT_INITIALIZED and _forked:  # not we, but another library had started it
        _started_before_fork = True
        refuse_fork()
    if status:
        raise UnsupportedError(f"the CUDA driver does not start: {_describe(lib, status)}", "a working NVIDIA GPU")
    return lib


def _device(ordinal: int) -> c_int:
    device = c_int()
    _check(_libcuda().cuDeviceGet(byref(device), ordinal), "cuDeviceGet", f"CUDA device {ordinal}")
    return device


def _device_attribute(device: int, attribute: int) -> int:
    value = c_int()
    _check(_libcuda().cuDeviceGetAttribute(byref(value), attribute, _device(device)), "cuDeviceGetAttribute")
    return value.value


@functools.cache
def _retained_context(device: int) -> c_void_p:
    """The device's primary context, created if nobody did, and kept until the process ends."""
    context = c_void_p()
    status = _libcuda().cuDevicePrimaryCtxRetain(byref(context), _device(device))
    _check(status, "cuDevicePrimaryCtxRetain", f"CUDA device {device}")
    return context


@contextmanager
def _primary_context(device: int) -> Iterator[None]:
    """Within, the primary context of `device` is current; after, what was before."""
    lib = _libcuda()
    _check(lib.cuCtxPushCurrent_v2(_retained_context(device)), "cuCtxPushCurrent")
    try:
        yield
    finally:
        lib.cuCtxPopCurrent_v2(byref(c_void_p()))


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Within, calls that are unsafe to capture, such as loading a module, do not end a capture under way."""
    lib = _libcuda()
    mode = c_int(_STREAM_CAPTURE_MODE_RELAXED)
    _check(lib.cuThreadExchangeStreamCaptureMode(byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        lib.cuThreadExchangeStreamCaptureMode(byref(mode))


def _try_again(status: int, device: int, call: Callable[[], int], name: str, about: str) -> None:
    """After a call that failed: once more with the device's context current, if it was not, else raise.

    A thread that made no CUDA call yet has no context, and one that works on another GPU has that GPU's.
    Finding out before each call would cost as much as the call.
    """
    if status in _CUDA_ERRORS_OF_OTHER_CONTEXTS:
        with _primary_context(device):
            status = call()
    _check(status, name, about)


def _error_name(status: int) -> str:
    return _describe(_libcuda(), status).partition(":")[0]


def _describe(lib: ctypes.CDLL, status: int) -> str:
    """CUDA's name of an error and its sentence."""
    name, text = c_char_p(), c_char_p()
    if lib.cuGetErrorName(status, byref(name)) or lib.cuGetErrorString(status, byref(text)):
        return f"CUDA error {status}"
    return f"{(name.value or b'').decode()}: {(text.value or b'').decode()}"


def _check(status: int, call: str, about: str = "") -> None:
    if status:
        raise EtapError(f"{call} failed: {_describe(_libcuda(), status)}" + (f" ({about})" if about else ""))
