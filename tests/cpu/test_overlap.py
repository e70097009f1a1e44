"""Whether arrays share memory, against NumPy's own answer, and for addresses that nobody can read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from etap_rt.interop import Array, Layout, describe
from etap_rt.overlap import identical, overlap, span

MEMORY_BYTES = 320
GPU_ADDRESS = 0x7F0000000000


def draw(rng: random.Random, memory: Any) -> Any:
    """Any view of some bytes, as float16 or float32: strides of all signs and sizes, dims of no elements too."""
    memory = memory.view(rng.choice([np.float16, np.float32]))
    shape = [rng.choice([0, 1, 2, 2, 3, 3, 4]) for _ in range(rng.randrange(4))]
    strides = [rng.randrange(-6, 7) for _ in shape]
    ends = [(n - 1) * stride for n, stride in zip(shape, strides) if n]
    first, last = sum(min(0, end) for end in ends), sum(max(0, end) for end in ends)
    start = rng.randrange(-first, len(memory) - last)
    size = memory.itemsize
    return np.lib.stride_tricks.as_strided(memory[start:], shape, [stride * size for stride in strides])


def test_views_share_memory_where_numpy_says_so() -> None:
    rng, memory = random.Random(0), np.zeros(MEMORY_BYTES, np.uint8)
    shared = between = 0
    for _ in range(5000):
        x, y = draw(rng, memory), draw(rng, memory)
        expected = np.shares_memory(x, y)
        assert overlap(describe(x, "x"), describe(y, "y")) == expected, (x.shape, x.strides, y.shape, y.strides)
        shared += expected
        between += np.may_share_memory(x, y) and not expected
    assert shared > 200 and between > 100


def on_gpu(offset: int, *shape: int, device: int = 0, strides: tuple[int, ...] = (2048, 1024, 1)) -> Array:
    return Array(Layout("torch", "bfloat16", "cuda", device, shape, strides), GPU_ADDRESS + offset, None)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (on_gpu(0, 4, 2, 512), True),
        (on_gpu(1024, 4, 2, 512), False),  # between the rows
        (on_gpu(1022, 4, 2, 512), True),
        (on_gpu(0, 4, 0, 512), False),
        (on_gpu(0, 4, 2, 512, device=1), False),
        (on_gpu(1 << 40, 4, 2, 512), False),
    ],
)
def test_addresses_of_a_gpu_are_compared_and_not_read(other: Array, expected: bool) -> None:
    rows = on_gpu(0, 4, 2, 512)
    assert overlap(rows, other) == overlap(other, rows) == expected


def test_identical_arrays_have_the_same_elements_in_the_same_order() -> None:
    x = np.zeros((4, 1, 6), np.float32)
    stretched = np.lib.stride_tricks.as_strided(x, x.shape, (24, 8, 4))  # the stride of one element means nothing
    assert identical(describe(x, "x"), describe(stretched, "y"))
    square = np.zeros((3, 3), np.float32)
    for one, other in ((x, x[::-1]), (x, x.copy()), (square, square.T)):
        assert not identical(describe(one, "x"), describe(other, "y"))


def test_a_span_is_from_the_first_byte_to_past_the_last() -> None:
    x = np.zeros((4, 6), np.float32)
    begin = x.ctypes.data
    for view in (x, x[::-1], x[:, ::-1], x.T):
        assert span(describe(view, "x")) == (begin, begin + x.nbytes)
    assert span(describe(x[1:3, 2:4], "x")) == (begin + 32, begin + 64)
