"""Ragged queries and page lists on a GPU: the table of cases, graphs, and offsets that make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from etap_rt import check_inputs, mla_decode, plan_decode
from etap_rt.errors import ArgumentError
from tests.cache_model import CUPY, TORCH_CUDA, Library, host
from tests.cases import (
    DEEPSEEK_SCALE,
    RAGGED_CASES,
    UNUSED_ENTRY,
    Case,
    assert_close,
    prepared,
)
from tests.gpu_cases import assert_matches_float64, assert_same_bits, on_gpu, run, with_libraries

torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

QUERIES = (1, 2, 4, 0, 1, 3, 2, 1, 5, 1)
MIXED_BOTH = Case("both", queries=QUERIES, csr=True)
CUPY_CASES = ("ragged", "csr-page-size-16", "csr-ragged", "csr-ragged-strided", "ragged-all-without-keys")
# Units that one lane has alone, that some share, that all share; one and more passes; row tiles of 8, 16 and 64.
DIVISIONS = (
    MIXED_BOTH,
    Case("one-request", lengths=(9001,), queries=(2,), heads=8),
    Case("128-heads", lengths=(4500, 0, 70), queries=(5, 1, 2), heads=128, csr=True),
    Case(
        "many-short", lengths=tuple(7 * i % 211 for i in range(300)), queries=tuple(i % 4 for i in range(300)), heads=8
    ),
    Case("one-long", lengths=(1, 5, 7000, *range(60, 70), 0, 0, 300), queries=(*(1,) * 2, 30, *(2,) * 13), csr=True),
)


# ---- Results ----


@pytest.mark.parametrize(("case", "library"), with_libraries(RAGGED_CASES, CUPY_CASES))
def test_decode_matches_float64(case: Case, library: Library) -> None:
    assert_matches_float64(case, library)


@pytest.mark.parametrize("library", [TORCH_CUDA, CUPY], ids=str)
def test_outputs_are_made_in_the_callers_library(library: Library) -> None:
    inputs, exact_out, exact_lse = prepared(MIXED_BOTH)
    call = inputs.on(library.array)
    out, lse = mla_decode(**call, return_lse=True)
    assert type(out) is type(lse) is type(call["q"])
    assert_close(MIXED_BOTH, host(out), host(lse), exact_out, exact_lse)
    assert np.array_equal(host(mla_decode(**call)).view(np.int16), host(out).view(np.int16))


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
@pytest.mark.parametrize("queries", [(), QUERIES], ids=["batch", "ragged"])
def test_page_lists_give_the_bits_of_a_table(queries: tuple[int, ...], page_size: int) -> None:
    case = Case("", queries=queries, page_size=page_size)
    call = on_gpu(case)
    expected = mla_decode(**call, return_lse=True)
    counts = [-(-length // page_size) for length in case.lengths]
    indices = torch.cat([row[:count] for row, count in zip(call["block_table"], counts)])
    indptr = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device="cuda")
    assert_same_bits(mla_decode(**{**call, "block_table": (indices, indptr)}, return_lse=True), expected)


@pytest.mark.parametrize("case", DIVISIONS, ids=str)
def test_runs_are_equal_bit_for_bit(case: Case) -> None:
    call = on_gpu(case)
    expected = run(call)
    for i in range(20):
        assert_same_bits(run(call), expected, f"run {i}")


def test_strided_outputs_are_written_and_their_gaps_left_alone() -> None:
    call = on_gpu(MIXED_BOTH)
    expected, expected_lse = run(call)
    tokens, heads = call["q"].shape[:2]
    base = torch.full((heads + 1, tokens + 2, 520), 7, dtype=torch.bfloat16, device="cuda")
    lse_base = torch.full((tokens, heads + 3), 7, dtype=torch.float32, device="cuda")
    out, lse = base[:heads, :tokens, :512].swapaxes(0, 1), lse_base[:, :heads].T

    mla_decode(**call, out=out, lse=lse)

    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert (base[heads] == 7).all() and (base[:, tokens:] == 7).all() and (base[..., 512:] == 7).all()
    assert (lse_base[:, heads:] == 7).all()


def test_queries_that_no_request_has_are_left_alone() -> None:
    inputs, exact_out, exact_lse = prepared(MIXED_BOTH)
    call = inputs.on(TORCH_CUDA.array)
    tokens = call["q"].shape[0]
    call["q"] = torch.cat([torch.full_like(call["q"][:3], torch.nan), call["q"], call["q"]])
    call["cu_seqlens_q"] += 3
    out, lse = run(call)
    own = slice(3, 3 + tokens)
    assert_close(MIXED_BOTH, host(out[own]), host(lse[:, own]), exact_out, exact_lse)
    assert out[:3].isnan().all() and out[own.stop :].isnan().all()
    assert lse[:, :3].isnan().all() and lse[:, own.stop :].isnan().all()


def test_no_queries_and_no_requests_give_empty_outputs() -> None:
    call = on_gpu(MIXED_BOTH)
    call["cu_seqlens_q"].zero_()
    out, lse = mla_decode(**{**call, "q": call["q"][:0]}, return_lse=True)
    assert out.shape == (0, 16, 512) and lse.shape == (16, 0)
    for name in ("cu_seqlens_q", "cache_seqlens"):
        call[name] = call[name][: int(name == "cu_seqlens_q")]
    call["block_table"] = (call["block_table"][0], call["block_table"][1][:1])
    assert mla_decode(**{**call, "q": call["q"][:0]}).shape == (0, 16, 512)


def test_a_plan_gives_the_bits_of_a_call() -> None:
    call = on_gpu(MIXED_BOTH)
    plan = plan_decode(**call, return_lse=True)
    for _ in range(2):
        call["q"] = torch.randn_like(call["q"])
        plan.out.fill_(torch.nan)
        plan.lse.fill_(torch.nan)
        assert plan.run(call["q"]) is plan.out
        assert_same_bits((plan.out, plan.lse), run(call))


def test_a_call_does_not_wait_for_the_gpu() -> None:
    call = on_gpu(MIXED_BOTH)
    mla_decode(**call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        mla_decode(**call, return_lse=True)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call returned while the stream was still held up"
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Offsets that make no sense ----


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cu_seqlens_q", [-7, 2, 1, 10**9, 4]),
        ("cu_seqlens_q", [2**31 - 1, -(2**31), 2**31 - 1, 0, -1]),
        ("cu_seqlens_q", [6, 5, 4, 3, 0]),
        ("indptr", [-1, 2**31 - 1, -(2**31), 5, 10**9]),
        ("indptr", [9, 3, 2, 1, 0]),
        ("cache_seqlens", [-1, 2**31 - 1, -(2**31), 10**9]),
    ],
)
def test_nonsense_never_leaves_the_arrays(name: str, values: list[int]) -> None:
    """Page entries are all good, so that nothing but the offsets is wrong. Results are arbitrary, memory is not."""
    call = on_gpu(Case("", lengths=(64, 100, 1, 700), queries=(1, 3, 0, 2), csr=True))
    indices, indptr = call["block_table"]
    indices[indices == UNUSED_ENTRY] = 0
    call["kv_cache"].nan_to_num_()
    {**call, "indptr": indptr}[name].copy_(torch.tensor(values, dtype=torch.int32))
    base = torch.full((18, 16, 512), 7, dtype=torch.bfloat16, device="cuda")
    lse_base = torch.full((16, 18), 7, dtype=torch.float32, device="cuda")
    for _ in range(3):
        mla_decode(**call, out=base[6:12], lse=lse_base[:, 6:12])
    torch.cuda.synchronize()
    assert (base[:6] == 7).all() and (base[12:] == 7).all()
    assert (lse_base[:, :6] == 7).all() and (lse_base[:, 12:] == 7).all()
    with pytest.raises(ArgumentError):
        check_inputs(**call)


def test_check_inputs_names_the_first_bad_offset() -> None:
    call = on_gpu(MIXED_BOTH)
    check_inputs(**call)
    call["cu_seqlens_q"][-1] -= 1
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_q\[10\]: got 19, accepted is 20 \(query tokens\)"):
        check_inputs(**call)
    call["block_table"][1][3] = 10**6
    with pytest.raises(ArgumentError, match=r"^block_table\[1\]\[3\]: got 1000000, accepted is "):
        check_inputs(**call)


# ---- Graphs ----

MOST_PAGES = 160  # of all requests
MOST_QUERIES = 24
# (queries, tokens) of six requests; both change between replays, and with them offsets and page lists.
PATTERNS = (
    ((1, 2, 4, 1, 2, 4), (1, 64, 65, 1000, 4, 2501)),
    ((1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)),
    ((0, 0, 24, 0, 0, 0), (64, 0, 9000, 0, 0, 1)),
    ((4, 4, 4, 4, 4, 4), (1600, 1601, 1602, 1603, 1604, 1605)),
    ((3, 0, 0, 7, 1, 0), (2, 10, 20, 5000, 5, 6)),
    ((0, 0, 0, 0, 0, 0), (1, 2, 3, 4, 5, 6)),
    ((2, 1, 2, 1, 2, 1), (2, 1, 10_000, 1, 2, 1)),
)


class GraphInputs:
    """Buffers of six requests that stay where they are while their contents change."""

    def __init__(self, heads: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages = MOST_PAGES * 64 // page_size + 6
        self.random = torch.Generator("cuda").manual_seed(0)
        ints = {"dtype": torch.int32, "device": "cuda"}
        self.call = {
            "q": torch.empty(MOST_QUERIES, heads, 576, dtype=torch.bfloat16, device="cuda"),
            "kv_cache": torch.empty(self.pages, page_size, 576, dtype=torch.bfloat16, device="cuda"),
            "block_table": (torch.empty(self.pages, **ints), torch.empty(7, **ints)),
            "cache_seqlens": torch.empty(6, **ints),
            "cu_seqlens_q": torch.empty(7, **ints),
            "softmax_scale": DEEPSEEK_SCALE,
        }
        self.fill(*PATTERNS[0])

    def fill(self, queries: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """New queries, pages, lists and offsets; what is not in use is poisoned."""
        call = self.call
        call["q"].normal_(generator=self.random)
        call["kv_cache"].fill_(torch.nan)
        order = torch.randperm(self.pages, device="cuda", generator=self.random).int()
        counts = [-(-length // self.page_size) for length in lengths]
        indices, indptr = call["block_table"]
        ends = np.cumsum([0, *counts]).tolist()
        indices.fill_(UNUSED_ENTRY)
        indices[: ends[-1]] = order[: ends[-1]]
        indptr.copy_(torch.tensor(ends, dtype=torch.int32))
        call["cu_seqlens_q"].copy_(torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32))
        call["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        for first, count, length in zip(ends, counts, lengths):
            tokens = torch.full((count * self.page_size, 576), torch.nan, device="cuda")
            tokens[:length].normal_(generator=self.random)
            own = order[first : first + count].long()
            call["kv_cache"][own] = tokens.view(count, self.page_size, 576).bfloat16()


@pytest.mark.parametrize(("heads", "page_size"), [(16, 64), (8, 16), (128, 128), (16, 1)])
def test_a_graph_follows_offsets_lists_lengths_queries_and_pages(heads: int, page_size: int) -> None:
    inputs = GraphInputs(heads, page_size)
    call = inputs.call
    out, lse = run(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_decode(**call, out=out, lse=lse)
    for queries, lengths in (*PATTERNS, *reversed(PATTERNS)):
        inputs.fill(queries, lengths)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        about = f"queries {queries}, lengths {lengths}"
        assert_same_bits((out, lse), run(call), about)
        used = sum(queries)
        assert torch.isfinite(out[:used]).all() and not torch.isnan(lse[:, :used]).any(), about
        assert out[used:].isnan().all() and lse[:, used:].isnan().all(), about
