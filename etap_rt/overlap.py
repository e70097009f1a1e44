"""Whether arrays share memory, told from their addresses and layouts: nothing is read, so they may lie on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from etap_rt.interop import MAX_REMEMBERED, Array, Layout, numpy_dtype

MAX_WORK = 10_000  # steps of the exact answer, some milliseconds


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays have a byte in common.

    Exact, for rows of one may lie between those of the other; but where finding out takes too long, no.
    """
    begin, end = span(a)
    other_begin, other_end = span(b)
    if end <= other_begin or other_end <= begin or not _same_device(a, b):
        return False
    try:
        return np.shares_memory(_bytes_of(a), _bytes_of(b), max_work=MAX_WORK)  # type: ignore[arg-type]  # any number
    except RuntimeError:  # NumPy's TooHardError, whose name has moved
        return False


def identical(a: Array, b: Array) -> bool:
    """Whether two arrays of the same shape and dtype are the same elements in the same order."""
    strides = zip(a.layout.shape, a.layout.strides, b.layout.strides)
    return a.pointer == b.pointer and all(stride == other for size, stride, other in strides if size > 1)


def span(array: Array) -> tuple[int, int]:
    """The addresses of the first byte and past the last one; the same where there are no elements."""
    first, past = reach(array.layout)
    return array.pointer + first, array.pointer + past


@functools.lru_cache(MAX_REMEMBERED)
def reach(layout: Layout) -> tuple[int, int]:
    """The span of an array that looks like this, from the address of the element at index 0 on."""
    if 0 in layout.shape:
        return 0, 0
    size = numpy_dtype(layout.dtype).itemsize
    ways = [(n - 1) * stride * size for n, stride in zip(layout.shape, layout.strides)]
    return sum(x for x in ways if x < 0), sum(x for x in ways if x > 0) + size


def _same_device(a: Array, b: Array) -> bool:
    return (a.layout.device_type, a.layout.device) == (b.layout.device_type, b.layout.device)


def _bytes_of(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy array of these addresses, which must not be read."""
    return np.asarray(_Addresses(array))


class _Addresses:
    def __init__(self, array: Array) -> None:
        size = numpy_dtype(array.layout.dtype).itemsize
        self.__array_interface__ = {
            "version": 3,
            "data": (array.pointer, True),
            "typestr": f"|V{size}",
            "shape": array.layout.shape,
            "strides": tuple(stride * size for stride in array.layout.strides),
        }
