"""Arrays of any library: pointer, shape, strides, dtype, device and stream, without a copy.

torch is recognised by the type of what is passed in and never imported from here. Reading a torch tensor on the
GPU costs about a microsecond, because it is on the path of every decode call; arrays that only speak DLPack go
through CuPy (on the GPU) or NumPy (on the CPU).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from etap_rt import driver
from etap_rt.errors import ArgumentError, ArgumentTypeError, UnsupportedError

MAX_REMEMBERED = 4096  # entries of a cache that is keyed by layouts; it is emptied when full
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CUPY_WANTED = "CuPy and NVRTC, from pip install 'etap-rt[cuda13]' or 'etap-rt[cuda12]'"

# DLPack's device types; managed memory is as good as the GPU's, pinned memory as good as the CPU's.
_DLPACK_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Everything about an array but its address.

    Layouts are interned: arrays that look the same have the same object, which is therefore a key that costs
    next to nothing to hash.
    """

    library: str  # "torch", "cupy", "numpy" or "dlpack"
    dtype: str  # "bfloat16", "float16", "float32", "int32", ...
    device_type: str  # "cuda", "cpu", or another of torch's
    device: int  # index; 0 on the CPU
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Array:
    """An array that was passed in: its layout, the address of its first element, and what keeps it alive.

    `owner` is the object itself, or the CuPy or NumPy array that DLPack made of it.
    """

    __slots__ = ("layout", "owner", "pointer")

    def __init__(self, layout: Layout, pointer: int, owner: Any) -> None:
        self.layout = layout
        self.pointer = pointer
        self.owner = owner


_layouts: dict[tuple[Any, ...], Layout] = {}
_readers: dict[type, Callable[[Any, str], Array]] = {Array: lambda array, name: array}  # an Array is read already


def describe(x: Any, name: str) -> Array:
    """Read an array of torch, CuPy, NumPy or any DLPack producer; `name` is what errors call it.

    Raises ArgumentTypeError if `x` is not an array with an address and strides, ArgumentError if it lies where
    neither the CPU nor a CUDA device reaches it.
    """
    reader = _readers.get(type(x))
    if reader is None:
        reader = _readers[type(x)] = _reader_of(type(x), name)
    return reader(x, name)


def tensor_signature(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, tuple[int, int, int, int]]:
    """Four torch tensors on GPUs: all about them but their addresses, as a key, and the addresses.

    Written out, because it is on the path of most calls: to `describe` the four costs twice as much. The key is None
    when one of them is anything else, for `describe` to say what.
    """
    kind = type(a)
    if kind is type(b) is type(c) is type(d) and is_tensor(a) and (a.is_cuda and b.is_cuda and c.is_cuda and d.is_cuda):
        try:
            key = (
                a.shape,
                a.stride(),
                a.dtype,
                a.get_device(),
                b.shape,
                b.stride(),
                b.dtype,
                b.get_device(),
                c.shape,
                c.stride(),
                c.dtype,
                c.get_device(),
                d.shape,
                d.stride(),
                d.dtype,
                d.get_device(),
            )
            return key, (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr())
        except RuntimeError:  # see _read_torch
            pass
    return None, (0, 0, 0, 0)


def tensors_alike(*tensors: Any) -> Callable[..., bool] | None:
    """A function that tells of as many others whether they look like these torch tensors; None where torch has none.

    It is the guard of torch.compile, which compares type, dtype, device, shape and strides of four tensors in a fifth
    of the time that it takes to ask for them. It may say no of tensors that do look alike: in another mode, such as
    inference_mode, with another requires_grad, or if one is passed twice.
    """
    guard = _tensor_guard()
    if guard is None:
        return None
    try:
        shapes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        return guard(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError, TypeError):  # not all are tensors, or it takes other arguments in this torch
        return None


class TensorLook:
    """What a torch tensor on a GPU looks like: all about it but its address."""

    __slots__ = ("_alike", "_device", "_dtype", "_kind", "_shape", "_strides")

    def __init__(self, x: Any) -> None:
        self._kind, self._dtype, self._device = type(x), x.dtype, x.get_device()
        self._shape, self._strides = x.shape, x.stride()
        self._alike = tensors_alike(x)

    def address(self, x: Any) -> int:
        """The address of a tensor that looks like this, else 0, for `describe` to say what it is."""
        alike = self._alike
        try:
            if alike is not None and alike(x):
                return x.data_ptr()  # type: ignore[no-any-return]
            if (
                type(x) is self._kind
                and x.shape == self._shape
                and x.stride() == self._strides
                and x.dtype is self._dtype
                and x.is_cuda
                and x.get_device() == self._device
            ):
                self._alike = tensors_alike(x)
                return x.data_ptr()  # type: ignore[no-any-return]
        except RuntimeError:  # see _read_torch
            pass
        return 0


def tensor_look(array: Array) -> TensorLook | None:
    """The look of an array's owner; None when that is no tensor on a GPU."""
    x = array.owner
    return TensorLook(x) if is_tensor(x) and x.is_cuda else None


def is_tensor(x: Any) -> bool:
    """Whether `x` is of a type that was read before and is torch's."""
    return _readers.get(type(x)) is _read_torch


def empty(layout: Layout, owner: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new, uninitialised, contiguous array of the library and on the device of an array that was described."""
    if layout.device_type == "cuda":
        driver.refuse_fork()
    if layout.library == "torch":
        # Sizes one by one and no dtype that is known already: each saves a quarter of a microsecond.
        if dtype == layout.dtype:
            return owner.new_empty(*shape)
        return owner.new_empty(*shape, dtype=getattr(sys.modules["torch"], dtype))
    if layout.device_type == "cpu":
        return np.empty(shape, numpy_dtype(dtype))
    cupy = import_cupy()
    with cupy.cuda.Device(layout.device):
        return cupy.empty(shape, numpy_dtype(dtype))


def address(layout: Layout, x: Any) -> int:
    """The address of an array on the GPU that `empty` made of this layout's library."""
    return int(x.data_ptr() if layout.library == "torch" else x.data.ptr)


def current_stream(layout: Layout) -> int:
    """The CUstream that the library of an array works on now, on the array's device."""
    if layout.library == "torch":
        return _torch_stream()(layout.device)
    return int(import_cupy().cuda.get_current_stream(layout.device).ptr)


def as_numpy(array: Array) -> np.ndarray[Any, Any]:
    """An array on the CPU as a NumPy array that shares its memory; bf16 as ml_dtypes.bfloat16."""
    if array.layout.library != "torch":
        return array.owner  # type: ignore[no-any-return]
    tensor = array.owner.detach()
    if array.layout.dtype == "bfloat16":  # which torch does not hand to NumPy
        return tensor.view(sys.modules["torch"].int16).numpy().view(BFLOAT16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """The values of an array as NumPy; from the GPU they are copied, after the work on its current stream."""
    if array.layout.device_type == "cpu":
        return as_numpy(array)
    if array.layout.library == "torch":
        return as_numpy(describe(array.owner.cpu(), "array"))
    with array.owner.device:
        return array.owner.get()  # type: ignore[no-any-return]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of a Layout's dtype."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def writeable(array: Array) -> bool:
    """Whether an array may be written to; those of NumPy, and what it made of DLPack on the CPU, may be read-only."""
    return array.layout.device_type != "cpu" or array.layout.library == "torch" or bool(array.owner.flags.writeable)


def import_cupy() -> Any:
    """CuPy, which only work on a GPU needs. Raises UnsupportedError where it is missing."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"CuPy cannot be imported ({error})", CUPY_WANTED) from error
    return cupy


def remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to a cache, which is emptied first when it has MAX_REMEMBERED entries."""
    if len(cache) >= MAX_REMEMBERED:
        cache.clear()
    cache[key] = value


def _reader_of(kind: type, name: str) -> Callable[[Any, str], Array]:
    if issubclass(kind, np.ndarray):
        return _read_numpy
    for library, array_type, reader in (("torch", "Tensor", _read_torch), ("cupy", "ndarray", _read_cupy)):
        module = sys.modules.get(library)
        if module is not None and issubclass(kind, getattr(module, array_type)):
            return reader
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _read_dlpack
    raise ArgumentTypeError(name, _type_name(kind), "an array of torch, CuPy, NumPy or another DLPack producer")


def _read_torch(x: Any, name: str) -> Array:
    try:
        key = (x.shape, x.stride(), x.dtype, x.get_device() if x.is_cuda else x.device)
        pointer = x.data_ptr()
    except RuntimeError as error:  # sparse tensors have no strides, tensors that are being traced no address
        raise ArgumentTypeError(name, f"{_type_name(type(x))} ({error})", "a dense tensor with memory") from error
    layout = _layouts.get(key)
    if layout is None:
        device, dtype = x.device, str(x.dtype).removeprefix("torch.")
        layout = Layout("torch", dtype, device.type, device.index or 0, tuple(x.shape), x.stride())
        remember(_layouts, key, layout)
    return Array(layout, pointer, x)


def _read_cupy(x: Any, name: str, library: str = "cupy") -> Array:
    memory = x.data
    return Array(_strided_layout(x, name, library, "cuda", memory.device_id), memory.ptr, x)


def _read_numpy(x: Any, name: str, library: str = "numpy") -> Array:
    return Array(_strided_layout(x, name, library, "cpu", 0), x.ctypes.data, x)


def _strided_layout(x: Any, name: str, library: str, device_type: str, device: int) -> Layout:
    """The layout of a NumPy or CuPy array, whose strides are in bytes."""
    key = (x.shape, x.strides, x.dtype, library, device_type, device)
    layout = _layouts.get(key)
    if layout is None:
        size = x.dtype.itemsize
        if size == 0 or any(stride % size for stride in x.strides):
            raise ArgumentError(name, f"byte strides {x.strides}", f"multiples of the {size} bytes of an element")
        strides = tuple(stride // size for stride in x.strides)
        layout = Layout(library, str(x.dtype), device_type, device, x.shape, strides)
        remember(_layouts, key, layout)
    return layout


def _read_dlpack(x: Any, name: str) -> Array:
    device_type = _DLPACK_DEVICES.get(int(x.__dlpack_device__()[0]))
    if device_type is None:
        raise ArgumentError(name, f"DLPack device {x.__dlpack_device__()}", "memory of the CPU or a CUDA device")
    try:
        if device_type == "cpu":
            return _read_numpy(np.from_dlpack(x), name, "dlpack")
        return _read_cupy(import_cupy().from_dlpack(x), name, "dlpack")
    except (BufferError, RuntimeError, TypeError) as error:
        raise ArgumentTypeError(name, f"{_type_name(type(x))} ({error})", "a dtype that DLPack hands over") from error


@functools.cache
def _torch_stream() -> Callable[[int], int]:
    """torch's raw stream of a device: its private getter where there is one, at a fiftieth of the public one's cost."""
    torch: Any = sys.modules["torch"]
    private = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return private or (lambda device: torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _tensor_guard() -> Any:
    """torch's class of guards, which is private and may be missing."""
    try:
        return sys.modules["torch"]._C._dynamo.guards.TensorGuards
    except (AttributeError, KeyError):
        return None


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
