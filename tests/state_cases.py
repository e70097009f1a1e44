"""One table of states to merge that every backend runs, with their exact results and tolerances.

Where a part's lse is -inf its out is NaN, and so are the gaps of strided arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.cases import HALF_ULP, NUMPY_DTYPES, View

DTYPES: dict[str, Any] = {**NUMPY_DTYPES, "float32": np.float32}
EMPTY_ROWS = 0.2  # of each part


@dataclass(frozen=True)
class StateCase:
    name: str
    shape: tuple[int, ...]  # of out
    dtype: str = "bfloat16"
    strided: bool = False  # neither out nor lse is contiguous
    spread: float = 2.0  # standard deviation of lse

    def __str__(self) -> str:
        return self.name

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-3], self.shape[-2], self.shape[-3])


STATE_CASES = (
    *(StateCase(dtype, (3, 2, 16, 512), dtype) for dtype in DTYPES),
    *(StateCase(f"ragged-{dtype}", (7, 5, 512), dtype) for dtype in DTYPES),
    *(StateCase(f"strided-{dtype}", (5, 3, 7, 256), dtype, strided=True) for dtype in DTYPES),
    StateCase("ragged-strided", (9, 6, 512), strided=True),
    StateCase("one-row", (1, 1, 1, 512)),
    StateCase("one-chunk", (2, 1, 9, 8)),
    StateCase("long-rows", (2, 3, 2, 2056)),
    StateCase("long-rows-float32", (2, 3, 2, 1028), "float32"),
    StateCase("one-part-outweighs", (3, 1, 64, 512), spread=60.0),
    StateCase("many-rows", (33, 1, 128, 512)),
)


class State(NamedTuple):
    """A part's attention, as mla_decode returns it."""

    out: View
    lse: View

    def on(self, convert: Callable[[NDArray[Any]], Any]) -> tuple[Any, Any]:
        return self.out.on(convert), self.lse.on(convert)


def make_state(case: StateCase, seed: int) -> State:
    """A random part of a case."""
    rng = np.random.default_rng(seed)
    lse = (case.spread * rng.standard_normal(case.lse_shape)).astype(np.float32)
    lse[rng.random(case.lse_shape) < EMPTY_ROWS] = -np.inf
    out = rng.standard_normal(case.shape, np.float32).astype(DTYPES[case.dtype])
    out[np.isneginf(lse.swapaxes(-1, -2))] = np.nan
    return place(case, out, lse)


def place(case: StateCase, out: NDArray[Any], lse: NDArray[Any]) -> State:
    """Arrays of the case's shapes as it wants them in memory."""
    if not case.strided:
        return State(View(np.ascontiguousarray(out)), View(np.ascontiguousarray(lse)))
    return State(_place(out, (0, 1), gap=8), _place(lse, (0, lse.ndim - 1), gap=1))


def exact(a: State, b: State) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """out and lse of two merged parts in float64, and the sum of the magnitudes that were added for out."""
    (out_a, lse_a), (out_b, lse_b) = ([x.astype(np.float64) for x in state.on(lambda array: array)] for state in (a, b))
    lse = np.logaddexp(lse_a, lse_b)
    parts = []
    for out, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        with np.errstate(invalid="ignore"):
            weight = np.where(np.isneginf(part_lse), 0.0, np.exp(part_lse - lse)).swapaxes(-1, -2)[..., None]
        parts.append(np.where(weight == 0, 0.0, weight * out))
    return parts[0] + parts[1], lse, abs(parts[0]) + abs(parts[1])


def assert_merged(case: StateCase, a: State, b: State, out: NDArray[Any], lse: NDArray[Any]) -> None:
    """Hold a merged state (NumPy) against the exact one: float32 arithmetic, rounded once."""
    exact_out, exact_lse, magnitude = exact(a, b)
    assert out.shape == case.shape and out.dtype == DTYPES[case.dtype]
    assert lse.shape == case.lse_shape and lse.dtype == np.float32
    accepted = 1e-6 * magnitude + 1e-40
    if case.dtype != "float32":
        accepted += HALF_ULP[case.dtype] * abs(exact_out) + (2.0**-25 if case.dtype == "float16" else 0.0)
    assert (abs(out.astype(np.float64) - exact_out) <= accepted).all()
    assert np.array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    seen = ~np.isneginf(exact_lse)
    np.testing.assert_allclose(lse[seen], exact_lse[seen], rtol=1.5e-7, atol=3e-7)


def _place(array: NDArray[Any], axes: tuple[int, int], gap: int) -> View:
    """The array with two axes swapped in memory, and gaps after all of them."""
    swapped = array.swapaxes(*axes)
    base = np.full([size + (gap if axis == array.ndim - 1 else 1) for axis, size in enumerate(swapped.shape)], np.nan)
    base = base.astype(array.dtype)
    index = tuple(slice(0, size) for size in swapped.shape)
    base[index] = swapped
    return View(base, index, swapped=axes)
