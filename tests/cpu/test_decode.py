"""mla_decode on NumPy and torch arrays of the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import etap_rt
from etap_rt import arguments
from etap_rt.errors import ArgumentError
from etap_rt.reference import _in_float16, decode_float64, decode_tiled
from tests.cases import (
    CASES,
    DEEPSEEK_SCALE,
    RAGGED_CASES,
    UNUSED_ENTRY,
    Case,
    as_is,
    assert_close,
    make_inputs,
    prepared,
    to_torch,
)

SMALL_RAGGED = Case("small-ragged", lengths=(0, 1, 64, 200), queries=(1, 3, 0, 2), heads=4, csr=True)
SMALL = Case("small", lengths=(0, 1, 64, 200), heads=4, s_q=2)


def numpy_arguments(case: Case) -> dict[str, Any]:
    return prepared(case)[0].on(as_is)


def to_numpy(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return array
    torch = pytest.importorskip("torch")
    return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if array.dtype == torch.bfloat16 else array.numpy()


@pytest.mark.parametrize("convert", [as_is, to_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", CASES + RAGGED_CASES, ids=str)
def test_decode_matches_float64(case: Case, convert: Callable[[Any], Any]) -> None:
    if convert is to_torch:
        pytest.importorskip("torch")
    inputs, exact_out, exact_lse = prepared(case)
    call = inputs.on(convert)

    out, lse = etap_rt.mla_decode(**call, return_lse=True)

    q = call["q"][0] if case.split_q else call["q"]
    assert type(out) is type(lse) is type(q)
    assert out.dtype == q.dtype and str(lse.dtype).endswith("float32")
    assert_close(case, to_numpy(out), to_numpy(lse), exact_out, exact_lse)


def test_float64_reference_is_the_definition() -> None:
    """Against sums written out with math.exp, for one query that sees three of four keys."""
    rng = np.random.default_rng(1)
    q, kv_cache = rng.standard_normal((1, 2, 1, 576)), rng.standard_normal((1, 64, 576))
    kv_cache[0, 4:] = np.nan
    out, lse = decode_float64(q, kv_cache, np.zeros((1, 1), np.int32), np.array([4], np.int32), 0.05, True)

    weights = [math.exp(0.05 * math.fsum(q[0, 0, 0] * kv_cache[0, key])) for key in range(3)]
    total = math.fsum(weights)
    expected = [math.fsum(w * kv_cache[0, key, dim] for key, w in enumerate(weights)) / total for dim in range(512)]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-12, atol=1e-14)
    assert lse[0, 0, 0] == pytest.approx(math.log(total), rel=1e-12)


def test_only_out_is_returned_unless_lse_is_asked_for() -> None:
    call = numpy_arguments(SMALL)
    out = etap_rt.mla_decode(**call)
    assert isinstance(out, np.ndarray) and out.shape == (4, 2, 4, 512)
    again, lse = etap_rt.mla_decode(**call, return_lse=True)
    assert lse.shape == (4, 4, 2)
    assert out.tobytes() == again.tobytes()


def test_causal_is_the_default() -> None:
    call = numpy_arguments(SMALL)
    assert call.pop("causal") is True
    out = etap_rt.mla_decode(**call)
    assert out.tobytes() == etap_rt.mla_decode(**call, causal=True).tobytes()
    assert out.tobytes() != etap_rt.mla_decode(**call, causal=False).tobytes()


def test_preallocated_outputs_are_written_in_place_and_returned() -> None:
    call = numpy_arguments(SMALL)
    expected, expected_lse = etap_rt.mla_decode(**call, return_lse=True)
    out = np.full((4, 2, 4, 512), np.nan, ml_dtypes.bfloat16)
    lse = np.full((4, 4, 2), np.nan, np.float32)

    assert etap_rt.mla_decode(**call, out=out, lse=lse) is out
    assert out.tobytes() == expected.tobytes() and lse.tobytes() == expected_lse.tobytes()

    returned = etap_rt.mla_decode(**call, out=out, lse=lse, return_lse=True)
    assert returned[0] is out and returned[1] is lse


def test_strided_outputs_are_written_and_their_gaps_left_alone() -> None:
    call = numpy_arguments(SMALL)
    expected, expected_lse = etap_rt.mla_decode(**call, return_lse=True)
    base = np.full((4, 3, 5, 520), 7, ml_dtypes.bfloat16)
    lse_base = np.full((2, 4, 9), 7, np.float32)
    out, lse = base[:, :2, :4, :512], lse_base[:, :, :4].transpose(2, 1, 0)

    etap_rt.mla_decode(**call, out=out, lse=lse)

    assert np.array_equal(out, expected) and np.array_equal(lse, expected_lse)
    assert (base[:, 2] == 7).all() and (base[:, :, 4] == 7).all() and (base[..., 512:] == 7).all()
    assert (lse_base[:, :, 4:] == 7).all()


def test_torch_outputs_are_written_in_place() -> None:
    torch = pytest.importorskip("torch")
    call = prepared(SMALL)[0].on(to_torch)
    expected, expected_lse = etap_rt.mla_decode(**call, return_lse=True)
    out, lse = torch.empty(4, 2, 4, 512, dtype=torch.bfloat16), torch.empty(4, 4, 2)
    returned = etap_rt.mla_decode(**call, out=out, lse=lse, return_lse=True)
    assert returned[0] is out and returned[1] is lse
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_an_empty_batch_gives_empty_outputs() -> None:
    q = np.zeros((0, 1, 16, 576), np.float16)
    kv_cache = np.zeros((1, 64, 576), np.float16)
    table, lengths = np.zeros((0, 4), np.int32), np.zeros(0, np.int32)
    out, lse = etap_rt.mla_decode(q, kv_cache, table, lengths, softmax_scale=1.0, return_lse=True)
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1)


def test_a_table_without_columns_serves_requests_without_tokens() -> None:
    q = np.ones((2, 1, 16, 576), np.float16)
    kv_cache = np.full((1, 64, 576), np.nan, np.float16)
    table, lengths = np.zeros((2, 0), np.int32), np.zeros(2, np.int32)
    out, lse = etap_rt.mla_decode(q, kv_cache, table, lengths, softmax_scale=1.0, return_lse=True)
    assert not out.any() and np.isneginf(lse).all()


def test_requests_may_share_pages() -> None:
    inputs = make_inputs(Case("", lengths=(130, 130), heads=2))
    call = inputs.on(as_is)
    call["block_table"][1, :2] = call["block_table"][0, :2]
    call["q"][1] = call["q"][0]
    call["cache_seqlens"][1] = 128
    call["cache_seqlens"][0] = 128
    out = etap_rt.mla_decode(**call)
    assert out[0].tobytes() == out[1].tobytes()


@pytest.mark.parametrize("length", [-1, 257, 2**31 - 1])
def test_a_length_that_does_not_fit_the_table_is_refused(length: int) -> None:
    call = numpy_arguments(Case("", lengths=(100, 100), heads=1))
    call["cache_seqlens"] = np.array([100, length], np.int32)
    assert call["block_table"].shape == (2, 4)
    with pytest.raises(ArgumentError, match=r"cache_seqlens\[1\]: got -?\d+, accepted is 0 ... 256"):
        etap_rt.mla_decode(**call)


@pytest.mark.parametrize("growth", [0.5, 7.9, 8.1, 100.0, -3.0])
def test_scores_that_keep_growing_or_falling_are_rescaled(growth: float) -> None:
    """Scores move by `growth` powers of two from tile to tile, for odd heads the other way."""
    length, heads = 64 * 20, 3
    rng = np.random.default_rng(2)
    q = np.zeros((1, 1, heads, 576), np.float16)
    q[..., 575] = (1.0, -1.0, 1.0)  # the rope dim that carries the score
    kv_cache = rng.standard_normal((20, 64, 576)).astype(np.float16)
    kv_cache[..., 575] = growth * np.arange(20)[:, None] + rng.standard_normal((20, 64))
    table, lengths = np.arange(20, dtype=np.int32)[None], np.array([length], np.int32)
    call = (q, kv_cache, table, lengths, math.log(2), True)

    out, lse = np.empty((1, 1, heads, 512), np.float16), np.empty((1, heads, 1), np.float32)
    decode_tiled(arguments.check(*call, out, lse), *call[4:], sm_count=1)

    exact_out, exact_lse = decode_float64(*call)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6)
    error = np.linalg.norm(out.astype(np.float64) - exact_out)
    assert error <= 2**-11 * np.linalg.norm(exact_out)


@pytest.mark.parametrize("heads", [9, 40], ids=["24 rows", "64 rows"])
@pytest.mark.parametrize("sm_count", [1, 3, 24, 132])
def test_any_division_of_the_work_gives_the_same_result(sm_count: int, heads: int) -> None:
    case = Case("", lengths=(0, 1, 65, 1000, 3000), heads=heads, s_q=2)
    inputs, exact_out, exact_lse = prepared(case)
    out, lse = np.empty(exact_out.shape, ml_dtypes.bfloat16), np.empty(exact_lse.shape, np.float32)
    call = arguments.check(**inputs.on(as_is), out=out, lse=lse)
    decode_tiled(call, case.scale, case.causal, sm_count)
    assert_close(case, out, lse, exact_out, exact_lse)


def test_huge_scores_do_not_overflow() -> None:
    inputs = make_inputs(Case("", lengths=(300,), heads=2, scale=1e4))
    out, lse = etap_rt.mla_decode(**inputs.on(as_is), return_lse=True)
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()


def test_a_python_scale_and_a_numpy_scale_are_the_same() -> None:
    call = numpy_arguments(SMALL)
    out = etap_rt.mla_decode(**call)
    call["softmax_scale"] = np.float64(DEEPSEEK_SCALE)
    assert etap_rt.mla_decode(**call).tobytes() == out.tobytes()


# ---- Ragged queries and page lists ----


def test_ragged_queries_of_one_length_give_the_bits_of_a_batch() -> None:
    case = Case("", lengths=(0, 1, 64, 200, 3000), heads=24, s_q=3)
    call = numpy_arguments(case)
    out, lse = etap_rt.mla_decode(**call, return_lse=True)
    call["q"] = call["q"].reshape(15, 24, 576)
    ragged_out, ragged_lse = etap_rt.mla_decode(
        **call, cu_seqlens_q=np.arange(0, 16, 3, dtype=np.int32), return_lse=True
    )
    assert ragged_out.shape == (15, 24, 512) and ragged_lse.shape == (24, 15)
    assert ragged_out.tobytes() == out.tobytes()
    assert np.array_equal(ragged_lse, lse.transpose(1, 0, 2).reshape(24, 15))


@pytest.mark.parametrize("queries", [(), (1, 0, 3, 2)], ids=["batch", "ragged"])
def test_page_lists_give_the_bits_of_a_table(queries: tuple[int, ...]) -> None:
    case = Case("", lengths=(0, 1, 64, 1000), queries=queries)
    call = numpy_arguments(case)
    expected = etap_rt.mla_decode(**call)
    table = call["block_table"]
    counts = [0, 1, 1, 16]
    indices = np.concatenate([row[:count] for row, count in zip(table, counts)])
    call["block_table"] = [indices, np.cumsum([0, *counts], dtype=np.int32)]
    assert etap_rt.mla_decode(**call).tobytes() == expected.tobytes()


def test_ragged_outputs_are_written_in_place_and_their_gaps_left_alone() -> None:
    call = numpy_arguments(SMALL_RAGGED)
    expected, expected_lse = etap_rt.mla_decode(**call, return_lse=True)
    assert expected.shape == (6, 4, 512) and expected_lse.shape == (4, 6)
    base = np.full((7, 5, 520), 7, ml_dtypes.bfloat16)
    lse_base = np.full((6, 9), 7, np.float32)
    out, lse = base[:6, :4, :512], lse_base[:, :4].T

    returned = etap_rt.mla_decode(**call, out=out, lse=lse, return_lse=True)

    assert returned[0] is out and returned[1] is lse
    assert np.array_equal(out, expected) and np.array_equal(lse, expected_lse)
    assert (base[6] == 7).all() and (base[:, 4] == 7).all() and (base[..., 512:] == 7).all()
    assert (lse_base[:, 4:] == 7).all()


def test_queries_that_no_request_has_are_left_alone() -> None:
    inputs, exact_out, exact_lse = prepared(SMALL_RAGGED)
    call = inputs.on(as_is)
    call["q"] = np.concatenate([np.full((2, 4, 576), np.nan, call["q"].dtype), call["q"], call["q"]])
    call["cu_seqlens_q"] = call["cu_seqlens_q"] + np.int32(2)
    out, lse = np.full((14, 4, 512), 7, ml_dtypes.bfloat16), np.full((4, 14), 7, np.float32)
    etap_rt.mla_decode(**call, out=out, lse=lse)
    assert_close(SMALL_RAGGED, out[2:8], lse[:, 2:8], exact_out, exact_lse)
    assert (out[:2] == 7).all() and (out[8:] == 7).all() and (lse[:, :2] == 7).all() and (lse[:, 8:] == 7).all()


def test_no_queries_at_all_give_empty_outputs() -> None:
    call = numpy_arguments(SMALL_RAGGED)
    call |= {"q": call["q"][:0], "cu_seqlens_q": np.zeros(5, np.int32)}
    out, lse = etap_rt.mla_decode(**call, return_lse=True)
    assert out.shape == (0, 4, 512) and lse.shape == (4, 0)


@pytest.mark.parametrize("csr", [False, True], ids=["table", "csr"])
def test_no_requests_at_all_give_empty_outputs(csr: bool) -> None:
    q = np.zeros((0, 16, 576), np.float16)
    kv_cache = np.zeros((1, 64, 576), np.float16)
    table = (np.zeros(0, np.int32), np.zeros(1, np.int32)) if csr else np.zeros((0, 4), np.int32)
    out = etap_rt.mla_decode(
        q, kv_cache, table, np.zeros(0, np.int32), softmax_scale=1.0, cu_seqlens_q=np.zeros(1, np.int32)
    )
    assert out.shape == (0, 16, 512)


def test_an_empty_page_list_serves_requests_without_tokens() -> None:
    q = np.ones((2, 1, 16, 576), np.float16)
    kv_cache = np.full((1, 64, 576), np.nan, np.float16)
    pages = (np.zeros(0, np.int32), np.zeros(3, np.int32))
    out, lse = etap_rt.mla_decode(q, kv_cache, pages, np.zeros(2, np.int32), softmax_scale=1.0, return_lse=True)
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("heads", [3, 40], ids=["24 rows", "64 rows"])
@pytest.mark.parametrize("sm_count", [1, 3, 24])
def test_any_division_of_ragged_work_gives_the_same_result(sm_count: int, heads: int) -> None:
    case = Case("", lengths=(0, 1, 65, 1000, 3000), heads=heads, queries=(1, 9, 0, 2, 4), csr=True)
    inputs, exact_out, exact_lse = prepared(case)
    out, lse = np.empty(exact_out.shape, ml_dtypes.bfloat16), np.empty(exact_lse.shape, np.float32)
    call = arguments.check(**inputs.on(as_is), out=out, lse=lse)
    decode_tiled(call, case.scale, case.causal, sm_count)
    assert_close(case, out, lse, exact_out, exact_lse)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("cu_seqlens_q", [0, 1, 4, 3, 6], r"cu_seqlens_q\[3\]: got 3, accepted is 4 ... 6 \(query tokens\)"),
        ("cu_seqlens_q", [0, 1, 4, 4, 7], r"cu_seqlens_q\[4\]: got 7, accepted is 4 ... 6"),
        ("cu_seqlens_q", [-1, 1, 4, 4, 6], r"cu_seqlens_q\[0\]: got -1, accepted is 0 ... 6"),
        ("indptr", [0, 9, 1, 2, 6], r"block_table\[1\]\[2\]: got 1, accepted is 9 ... 12 \(page indices\)"),
        (
            "cache_seqlens",
            [0, 65, 64, 200],
            r"cache_seqlens\[1\]: got 65, accepted is 0 ... 64 \(1 pages \* page_size\)",
        ),
        ("indptr", [0, 0, 2, 3, 7], r"block_table\[0\]\[0\]: got 2147480000, accepted is 0 ... 8"),
    ],
)
def test_offsets_that_make_no_sense_are_refused(name: str, values: list[int], message: str) -> None:
    call = numpy_arguments(SMALL_RAGGED)
    array = np.array(values, np.int32)
    if name == "indptr":
        call["block_table"] = (call["block_table"][0], array)
    else:
        call[name] = array
    with pytest.raises(ArgumentError, match=message):
        etap_rt.mla_decode(**call)


def test_a_ragged_plan_computes_what_a_call_computes() -> None:
    call = numpy_arguments(SMALL_RAGGED)
    plan = etap_rt.plan_decode(**call, return_lse=True)
    for _ in range(2):
        call["q"] = np.random.default_rng(3).standard_normal(call["q"].shape).astype(call["q"].dtype)
        out, lse = etap_rt.mla_decode(**call, return_lse=True)
        assert plan.run(call["q"]) is plan.out
        assert plan.out.tobytes() == out.tobytes() and np.array_equal(plan.lse, lse)


def test_page_lists_of_other_lengths_are_the_same_problem() -> None:
    call = numpy_arguments(SMALL_RAGGED)
    indices, indptr = call["block_table"]
    first = arguments.check(**call)
    call["block_table"] = (np.concatenate([indices, np.full(100, UNUSED_ENTRY, np.int32)]), indptr)
    second = arguments.check(**call)
    assert first.problem is second.problem
    assert second.page_count == first.page_count + 100


@pytest.mark.parametrize("magnitude", [1.0, 2.0**120, 2.0**-110], ids=["1", "2^120", "2^-110"])
def test_partial_results_in_float16_are_off_by_half_an_ulp_at_most(magnitude: float) -> None:
    rng = np.random.default_rng(0)
    o = (rng.standard_normal((2, 3, 512)) * magnitude).astype(np.float32)
    o[0, :, :64] *= np.float32(2.0**-14)  # of one warp: 2**14 below the others of the CTA
    kept = _in_float16(o)
    assert kept.dtype == np.float32
    assert (np.abs(kept.astype(np.float64) - o) <= 2.0**-11 * np.abs(o)).all()
    assert not np.array_equal(kept, o)


def test_partial_results_in_float16_keep_what_is_not_finite_where_it_is() -> None:
    o = np.ones((1, 8, 256), np.float32)
    o[0, 1, 3], o[0, 2, 70], o[0, 3, 200] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        assert np.array_equal(_in_float16(o), o, equal_nan=True)
    assert not _in_float16(np.zeros((1, 8, 256), np.float32)).any()
