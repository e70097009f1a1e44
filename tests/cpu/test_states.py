"""merge_states on the CPU, its errors, and what it hands to the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from etap_rt import mla_decode, states
from etap_rt.errors import ArgumentError, ArgumentTypeError
from etap_rt.states import merge_states, merge_states_spec
from tests.cache_model import host
from tests.cases import BFLOAT16_ERROR, DEEPSEEK_SCALE, as_is, to_torch
from tests.fake_gpu import STREAM, Notes, pass_tensors_for_cuda
from tests.state_cases import DTYPES, STATE_CASES, StateCase, assert_merged, make_state, place

torch: Any = pytest.importorskip("torch")

SMALL = StateCase("small", (2, 3, 4, 16))


@pytest.mark.parametrize("convert", [as_is, to_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_merging_is_exact_in_float32_and_rounded_once(case: StateCase, convert: Callable[[Any], Any]) -> None:
    a, b = make_state(case, 1), make_state(case, 2)
    out, lse = merge_states(*a.on(convert), *b.on(convert))
    assert type(out) is type(lse) is type(a.on(convert)[0])
    assert_merged(case, a, b, host(out), host(lse))


@pytest.mark.parametrize("case", [SMALL, StateCase("strided", (2, 3, 4, 16), strided=True)], ids=str)
def test_outputs_that_are_given_are_written_and_returned(case: StateCase) -> None:
    a, b = make_state(case, 1), make_state(case, 2)
    nothing = np.full(case.shape, np.nan, DTYPES[case.dtype]), np.full(case.lse_shape, np.nan, np.float32)
    out, lse = place(case, *nothing).on(to_torch)
    returned = merge_states(*a.on(to_torch), *b.on(to_torch), out=out, lse=lse)
    assert returned[0] is out and returned[1] is lse
    assert_merged(case, a, b, host(out), host(lse))


@pytest.mark.parametrize("into", ["a", "b"])
def test_outputs_may_be_inputs(into: str) -> None:
    a, b = make_state(SMALL, 1), make_state(SMALL, 2)
    parts = {"a": [x.copy() for x in a.on(as_is)], "b": [x.copy() for x in b.on(as_is)]}
    out, lse = merge_states(*parts["a"], *parts["b"], out=parts[into][0], lse=parts[into][1])
    assert out is parts[into][0] and lse is parts[into][1]
    assert_merged(SMALL, a, b, out, lse)


def test_a_part_without_keys_leaves_the_other_as_it_is() -> None:
    (out, lse), (other, nothing) = make_state(SMALL, 1).on(as_is), make_state(SMALL, 2).on(as_is)
    out[np.isnan(out)] = 0
    nothing[...] = -np.inf
    other[...] = np.nan
    for merged, merged_lse in (merge_states(out, lse, other, nothing), merge_states(other, nothing, out, lse)):
        assert np.array_equal(merged, out) and np.array_equal(merged_lse, lse)
    merged, merged_lse = merge_states(other, nothing, other, nothing)
    assert not merged.any() and np.isneginf(merged_lse).all()


def test_an_lse_that_is_no_number_is_not_hidden() -> None:
    (out, lse), state_b = make_state(SMALL, 1).on(as_is), make_state(SMALL, 2).on(as_is)
    lse[0, 1, 2] = np.nan
    merged, merged_lse = merge_states(out, lse, *state_b)
    assert np.isnan(merged[0, 2, 1]).all() and np.isnan(merged_lse[0, 1, 2])
    assert np.isnan(merged_lse).sum() == 1


def test_the_order_of_parts_does_not_matter() -> None:
    a, b = make_state(SMALL, 1).on(as_is), make_state(SMALL, 2).on(as_is)
    for x, y in zip(merge_states(*a, *b), merge_states(*b, *a)):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("causal", [True, False])
def test_decoding_in_parts_and_merging_is_decoding(causal: bool) -> None:
    """A prefix that all queries see, without a mask, and the rest, with the mask."""
    rng = np.random.default_rng(0)
    s_q, heads, prefix, tokens = 3, 4, 128, 300
    q = rng.standard_normal((1, s_q, heads, 576), np.float32).astype(DTYPES["bfloat16"])
    cache = rng.standard_normal((5, 64, 576), np.float32).astype(DTYPES["bfloat16"])
    table = np.array([[4, 1, 0, 3, 2]], np.int32)

    def decode(table: Any, length: int, causal: bool) -> Any:
        lengths = np.array([length], np.int32)
        return mla_decode(q, cache, table, lengths, softmax_scale=DEEPSEEK_SCALE, causal=causal, return_lse=True)

    whole, whole_lse = decode(table, tokens, causal)
    parts = decode(table[:, :2], prefix, False), decode(table[:, 2:], tokens - prefix, causal)
    out, lse = merge_states(*parts[0], *parts[1])
    difference = out.astype(np.float32) - whole.astype(np.float32)
    assert np.linalg.norm(difference) <= 2 * BFLOAT16_ERROR * np.linalg.norm(whole.astype(np.float32))
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 1, 4, 16), (2, 0, 4, 16), (0, 4, 16)], ids=str)
def test_nothing_merged_is_nothing(shape: tuple[int, ...]) -> None:
    case = StateCase("", shape)
    out, lse = merge_states(*make_state(case, 1).on(as_is), *make_state(case, 2).on(as_is))
    assert out.shape == shape and lse.shape == case.lse_shape


# ---- Errors ----


def zeros(*shape: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.zeros(shape, dtype=dtype)


def good_arguments() -> dict[str, Any]:
    return {
        "out_a": zeros(2, 3, 4, 16),
        "lse_a": zeros(2, 4, 3, dtype=torch.float32),
        "out_b": zeros(2, 3, 4, 16),
        "lse_b": zeros(2, 4, 3, dtype=torch.float32),
    }


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


MISTAKES = [
    ("out_a", lambda: [1.0], ArgumentTypeError, "list"),
    ("out_a", lambda: zeros(2, 16), ArgumentError, r"shape \(2, 16\)"),
    ("out_a", lambda: zeros(2, 3, 4, 16, dtype=torch.float64), ArgumentError, "float64"),
    ("out_a", lambda: zeros(2, 3, 4, 16).to("meta"), ArgumentError, "meta"),
    ("out_a", lambda: zeros(2, 3, 4, 12), ArgumentError, "last dim 12"),
    ("out_a", lambda: zeros(2, 3, 4, 0), ArgumentError, "last dim 0, accepted is a positive multiple of 8 elements"),
    ("out_a", lambda: zeros(2, 3, 16, 4).transpose(2, 3), ArgumentError, "last dim|stride"),
    ("out_a", lambda: zeros(2, 3, 4, 17)[..., :16], ArgumentError, "strides .* multiples of 8 elements"),
    ("out_a", lambda: zeros(385)[1:].view(2, 3, 4, 16), ArgumentError, "address .* a multiple of 16 bytes"),
    ("out_b", lambda: zeros(2, 3, 4, 24), ArgumentError, r"shape \(2, 3, 4, 24\)"),
    ("out_b", lambda: zeros(2, 3, 4, 16, dtype=torch.float16), ArgumentError, "float16, accepted is bfloat16"),
    ("out_b", lambda: zeros(2, 3, 4, 16).to("meta"), ArgumentError, "meta:0, accepted is cpu:0"),
    ("lse_a", lambda: zeros(2, 3, 4, dtype=torch.float32), ArgumentError, r"\(2, 4, 3\), with out_a of shape"),
    ("lse_a", lambda: zeros(2, 4, 3), ArgumentError, "bfloat16, accepted is float32"),
    ("lse_b", lambda: None, ArgumentTypeError, "NoneType"),
    ("lse_b", lambda: zeros(8, 3, dtype=torch.float32), ArgumentError, r"shape \(8, 3\)"),
    ("out", lambda: zeros(2, 3, 4, 16, dtype=torch.float32), ArgumentError, "float32, accepted is bfloat16"),
    ("out", lambda: zeros(1, 3, 4, 16).expand(2, 3, 4, 16), ArgumentError, "do not overlap"),
    ("out", lambda: read_only(np.zeros((2, 3, 4, 16), DTYPES["bfloat16"])), ArgumentError, "read-only"),
    ("lse", lambda: zeros(2, 4, 3, dtype=torch.float64), ArgumentError, "float64, accepted is float32"),
    ("lse", lambda: zeros(2, 4, 1, dtype=torch.float32).expand(2, 4, 3), ArgumentError, "do not overlap"),
]


@pytest.mark.parametrize(("name", "make", "error", "text"), MISTAKES)
def test_mistakes_are_named(name: str, make: Callable[[], Any], error: type[Exception], text: str) -> None:
    arguments = {**good_arguments(), name: make()}
    with pytest.raises(error, match=rf"^{name}: got .*({text})"):
        merge_states(**arguments)


def halves(apart: bool) -> tuple[Any, Any]:
    """Two outs in one piece of memory: row by row in turn, or the second a row behind the first."""
    if apart:
        both = zeros(2, 3, 4, 2, 16)
        return both[..., 0, :], both[..., 1, :]
    both = zeros(2 * 3 * 4 + 1, 16)
    return both[:-1].view(2, 3, 4, 16), both[1:].view(2, 3, 4, 16)


def test_outputs_may_lie_between_the_rows_of_inputs() -> None:
    a, b = make_state(SMALL, 1), make_state(SMALL, 2)
    part, out = halves(apart=True)
    part.copy_(a.on(to_torch)[0])
    _, lse = merge_states(part, a.on(to_torch)[1], *b.on(to_torch), out=out)
    assert_merged(SMALL, a, b, host(out), host(lse))


def over_another_row() -> dict[str, Any]:
    out_a, out = halves(apart=False)
    return {"out_a": out_a, "out": out}


def in_another_order() -> dict[str, Any]:
    lse_b = zeros(2, 3, 3, dtype=torch.float32)
    return {"out_a": zeros(2, 3, 3, 16), "out_b": zeros(2, 3, 3, 16), "lse_b": lse_b, "lse": lse_b.mT}


def over_lse() -> dict[str, Any]:
    memory = zeros(2, 3, 4, 16, dtype=torch.float32)
    other = zeros(2, 3, 4, 16, dtype=torch.float32)
    return {"out_a": other, "out_b": other, "out": memory, "lse_b": memory.view(-1)[:24].view(2, 4, 3)}


def over_each_other() -> dict[str, Any]:
    memory = zeros(2, 3, 4, 16, dtype=torch.float32)
    other = zeros(2, 3, 4, 16, dtype=torch.float32)
    return {"out_a": other, "out_b": other, "out": memory, "lse": memory.view(-1)[-24:].view(2, 4, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (over_another_row, "out: got memory of out_a, accepted is out_a, out_b or memory apart from all other arrays"),
        (in_another_order, "lse: got memory of lse_b, accepted is lse_a, lse_b or memory apart from all other arrays"),
        (over_lse, "out: got memory of lse_b, accepted is out_a, out_b or memory apart from all other arrays"),
        (over_each_other, "lse: got memory of out, accepted is lse_a, lse_b or memory apart from all other arrays"),
    ],
)
def test_outputs_over_what_is_still_to_be_read_are_refused(change: Callable[[], dict[str, Any]], message: str) -> None:
    arguments = good_arguments() | change()
    if arguments["out_a"].shape[2] == 3:
        arguments["lse_a"] = zeros(2, 3, 3, dtype=torch.float32)
    for x in arguments.values():
        x.fill_(7)
    with pytest.raises(ArgumentError) as caught:
        merge_states(**arguments)
    assert str(caught.value) == message
    assert all((x == 7).all() for x in arguments.values())


# ---- The kernel ----


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    notes = Notes(states._Params)
    pass_tensors_for_cuda(monkeypatch)
    monkeypatch.setattr(states.compiler, "load", notes.load)
    monkeypatch.setattr(states, "_problems", {})
    yield notes


def strides(state: Any) -> tuple[list[int], list[int]]:
    return list(state.out_strides), list(state.lse_strides)


def test_the_kernel_gets_addresses_strides_and_sizes(notes: Notes) -> None:
    case = StateCase("", (5, 3, 7, 256), strided=True)
    (out_a, lse_a), (out_b, lse_b) = (
        make_state(case, 1).on(to_torch),
        make_state(replace(case, strided=False), 2).on(to_torch),
    )
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    (params,) = notes.params
    for state, (o, l) in zip((params.a, params.b, params.merged), ((out_a, lse_a), (out_b, lse_b), (out, lse))):
        assert (state.out, state.lse) == (o.data_ptr(), l.data_ptr())
        assert strides(state) == ([stride // 8 for stride in o.stride()[:3]], list(l.stride()))
    assert (params.rows, params.queries, params.heads, params.chunks) == (5 * 3 * 7, 3, 7, 256 // 8)
    assert notes.launches == [(-(-5 * 3 * 7 // 8), 256, 0, STREAM)]
    assert notes.specs == [merge_states_spec("bfloat16")]


def test_ragged_queries_are_those_of_one_request(notes: Notes) -> None:
    case = StateCase("", (7, 5, 512), "float32")
    merge_states(*make_state(case, 1).on(to_torch), *make_state(case, 2).on(to_torch))
    (params,) = notes.params
    assert (params.rows, params.queries, params.heads, params.chunks) == (35, 7, 5, 128)
    assert strides(params.merged) == ([0, 5 * 128, 128], [0, 7, 1])
    assert notes.specs == [merge_states_spec("float32")]


def test_nothing_launches_nothing(notes: Notes) -> None:
    case = StateCase("", (0, 1, 4, 16))
    merge_states(*make_state(case, 1).on(to_torch), *make_state(case, 2).on(to_torch))
    assert not notes.launches


def test_the_parameter_is_laid_out_as_the_kernel_asserts() -> None:
    assert (ctypes.sizeof(states._State), ctypes.sizeof(states._Params)) == (64, 208)
