"""Streams that run on a part of the GPU's SMs only: green contexts of the CUDA driver, from CUDA 12.5 on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_int, c_uint, c_uint64, c_void_p
from typing import Any

from etap_rt import EtapError, UnsupportedError

# Values of enums in cuda.h.
_RESOURCE_TYPE_SM = 1
_GREEN_CONTEXT_DEFAULT_STREAM = 1  # the only flag, and required
_STREAM_NON_BLOCKING = 1  # required, too


class Resource(ctypes.Structure):
    """CUdevResource of cuda.h as it is for SMs. What is not named here is the driver's."""

    _fields_ = [
        ("type", c_int),
        ("internal", c_char * 92),
        ("sm_count", c_uint),
        ("more", c_uint),
        ("rest", c_uint64 * 5),
    ]


_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetDevResource": (c_int, POINTER(Resource), c_int),
    "cuDevSmResourceSplitByCount": (
        POINTER(Resource),
        POINTER(c_uint),
        POINTER(Resource),
        POINTER(Resource),
        c_uint,
        c_uint,
    ),
    "cuDevResourceGenerateDesc": (POINTER(c_void_p), POINTER(Resource), c_uint),
    "cuGreenCtxCreate": (POINTER(c_void_p), c_void_p, c_int, c_uint),
    "cuGreenCtxStreamCreate": (POINTER(c_void_p), c_void_p, c_uint, c_int),
}


def stream_on(sms: int, device: int) -> int:
    """A new CUstream whose work runs on `sms` SMs of `device`, always the same ones; it stays for good.

    CUDA has to be in use already. Raises UnsupportedError where the GPU cannot be divided like that.
    """
    call = _caller()
    number, everything, part, groups = c_int(), Resource(), Resource(), c_uint(1)
    call("cuDeviceGet", byref(number), device)
    call("cuDeviceGetDevResource", number, byref(everything), _RESOURCE_TYPE_SM)
    if not 0 < sms <= everything.sm_count:
        raise UnsupportedError(f"{sms} SMs of a GPU that has {everything.sm_count}", "a smaller number")
    call("cuDevSmResourceSplitByCount", byref(part), byref(groups), byref(everything), None, 0, sms)
    if groups.value != 1 or part.sm_count != sms:
        raise UnsupportedError(
            f"this GPU gives {part.sm_count if groups.value else 0} SMs where {sms} are asked for",
            "a multiple of 8, as Hopper's SMs are divided",
        )
    description, context, stream = c_void_p(), c_void_p(), c_void_p()
    call("cuDevResourceGenerateDesc", byref(description), byref(part), 1)
    call("cuGreenCtxCreate", byref(context), description, number, _GREEN_CONTEXT_DEFAULT_STREAM)
    call("cuGreenCtxStreamCreate", byref(stream), context, _STREAM_NON_BLOCKING, 0)
    assert stream.value
    return stream.value


def _open_library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the CUDA driver cannot be opened ({error})", "a GPU with the NVIDIA driver") from error


def _caller() -> Callable[..., None]:
    """Calls a driver function by name; raises EtapError if it fails."""
    library = _open_library()

    def call(name: str, *arguments: Any) -> None:
        function = getattr(library, name, None)
        if function is None:
            raise UnsupportedError(f"the CUDA driver has no {name}", "a driver for CUDA 12.5 or newer")
        function.argtypes = _PROTOTYPES[name]
        status = function(*arguments)
        if status:
            raise EtapError(f"{name} failed: CUDA error {status}")

    return call
