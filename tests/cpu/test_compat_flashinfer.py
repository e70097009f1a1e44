"""FlashInfer's MLA wrapper, called as its documentation says, on CPU tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import etap_rt
from etap_rt import ArgumentError, ArgumentTypeError, EtapError, UnsupportedError
from etap_rt.compat import flashinfer

torch: Any = pytest.importorskip("torch")

SCALE = 1.0 / ((128 + 64) ** 0.5)


class Problem:
    """Arguments of plan and run: pages in a random order, NaN past the end of each request."""

    def __init__(
        self,
        queries: tuple[int, ...] = (1, 2, 4, 0, 1),
        lengths: tuple[int, ...] = (0, 100, 64, 5, 300),
        heads: int = 16,
        ckv: int = 512,
        kpe: int = 64,
        page_size: int = 16,
        dtype: Any = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // page_size) for length in lengths]
        num_pages = sum(counts) + 3
        total_q = sum(queries)
        self.lengths, self.heads, self.dtype = lengths, heads, dtype
        self.ckv_dim, self.kpe_dim, self.page_size = ckv, kpe, page_size
        self.qo_indptr = torch.tensor([0, *queries]).cumsum(0).int()
        self.kv_indptr = torch.tensor([0, *counts]).cumsum(0).int()
        self.kv_indices = torch.randperm(num_pages, generator=generator)[: sum(counts)].int()
        self.kv_lens = torch.tensor(lengths, dtype=torch.int32)
        self.q_nope = torch.randn(total_q, heads, ckv, generator=generator).to(dtype)
        self.q_pe = torch.randn(total_q, heads, kpe, generator=generator).to(dtype)
        self.ckv = torch.full((num_pages, page_size, ckv), torch.nan, dtype=dtype)
        self.kpe = torch.full((num_pages, page_size, kpe), torch.nan, dtype=dtype)
        for r, length in enumerate(lengths):
            for i, page in enumerate(self.pages(r)):
                used = min(page_size, length - i * page_size)
                self.ckv[page, :used] = torch.randn(used, ckv, generator=generator).to(dtype)
                self.kpe[page, :used] = torch.randn(used, kpe, generator=generator).to(dtype)

    def pages(self, request: int) -> list[int]:
        return self.kv_indices[self.kv_indptr[request] : self.kv_indptr[request + 1]].tolist()

    def plan_arguments(self, causal: bool = False) -> tuple[Any, ...]:
        """As FlashInfer's example passes them, all by position."""
        indices = (self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_lens)
        dims = (self.heads, self.ckv_dim, self.kpe_dim, self.page_size)
        return (*indices, *dims, causal, SCALE, self.dtype, self.dtype)

    def run_arguments(self) -> tuple[Any, ...]:
        return self.q_nope, self.q_pe, self.ckv, self.kpe

    def expected(self, causal: bool = False) -> tuple[Any, Any]:
        """Attention in float64 with FlashInfer's conventions: lse (tokens, heads) to base 2."""
        tokens = self.q_nope.shape[0]
        out = torch.zeros(tokens, self.heads, self.ckv_dim, dtype=torch.float64)
        lse = torch.full((tokens, self.heads), -math.inf, dtype=torch.float64)
        for r, length in enumerate(self.lengths):
            values = self.ckv[self.pages(r)].flatten(0, 1)[:length].double()
            keys = torch.cat([values, self.kpe[self.pages(r)].flatten(0, 1)[:length].double()], dim=-1)
            first, last = self.qo_indptr[r : r + 2].tolist()
            for token in range(first, last):
                seen = max(0, length - last + token + 1) if causal else length
                if seen:
                    q = torch.cat([self.q_nope[token], self.q_pe[token]], dim=-1).double()
                    scores = SCALE * (q @ keys[:seen].T)
                    lse[token] = scores.logsumexp(-1) / math.log(2)
                    out[token] = scores.softmax(-1) @ values[:seen]
        return out, lse


def assert_close(got: tuple[Any, Any], exact: tuple[Any, Any]) -> None:
    assert got[0].shape == exact[0].shape and got[1].shape == exact[1].shape
    assert got[1].dtype == torch.float32
    assert (got[0].double() - exact[0]).norm() <= 5e-3 * exact[0].norm()
    torch.testing.assert_close(got[1].double(), exact[1], atol=7e-5, rtol=1e-6)


def new_wrapper(**options: Any) -> Any:
    return flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(128, dtype=torch.int8), **options)


def planned(problem: Problem, causal: bool = False, **options: Any) -> Any:
    wrapper = new_wrapper(**options)
    wrapper.plan(*problem.plan_arguments(causal))
    return wrapper


def test_the_example_of_the_documentation() -> None:
    num_local_heads, batch_size, head_dim_ckv, head_dim_kpe, page_size = 128, 4, 512, 64, 1
    mla_wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(128, dtype=torch.int8), backend="fa2")
    q_indptr = torch.arange(0, batch_size + 1).int()
    kv_lens = torch.full((batch_size,), 99, dtype=torch.int32)
    kv_indptr = torch.arange(0, batch_size + 1).int() * 99
    kv_indices = torch.arange(0, batch_size * 99).int()
    q_nope = torch.randn(batch_size * 1, num_local_heads, head_dim_ckv, dtype=torch.bfloat16)
    q_pe = torch.zeros(batch_size * 1, num_local_heads, head_dim_kpe, dtype=torch.bfloat16)
    ckv = torch.randn(batch_size * 99, 1, head_dim_ckv, dtype=torch.bfloat16)
    kpe = torch.zeros(batch_size * 99, 1, head_dim_kpe, dtype=torch.bfloat16)
    mla_wrapper.plan(
        q_indptr,
        kv_indptr,
        kv_indices,
        kv_lens,
        num_local_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        False,
        SCALE,
        q_nope.dtype,
        ckv.dtype,
    )
    o = mla_wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=False)
    assert o.shape == torch.Size([batch_size, num_local_heads, 512]) and o.dtype == torch.bfloat16
    keys = ckv.view(batch_size, 99, 512).float()
    exact = (SCALE * q_nope.float() @ keys.mT).softmax(-1) @ keys
    torch.testing.assert_close(o.float(), exact, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_requests_of_different_query_length(page_size: int, causal: bool) -> None:
    problem = Problem(page_size=page_size)
    wrapper = planned(problem, causal)
    assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected(causal))


@pytest.mark.parametrize("backend", ["auto", "fa2", "fa3"])
@pytest.mark.parametrize(("ckv", "dtype"), [(512, torch.float16), (256, torch.bfloat16)])
def test_backends_dims_and_dtypes(ckv: int, dtype: Any, backend: str) -> None:
    problem = Problem(ckv=ckv, dtype=dtype, heads=3)
    wrapper = planned(problem, backend=backend)
    assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected())


@pytest.mark.parametrize("causal", [False, True])
def test_models_without_rope(causal: bool) -> None:
    problem = Problem(kpe=0, dtype=torch.float16)
    assert problem.q_pe.shape[-1] == problem.kpe.shape[-1] == 0
    wrapper = planned(problem, causal)
    for _ in range(2):
        assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected(causal))
    fewer = Problem(kpe=0, dtype=torch.float16, queries=(1, 1), lengths=(10, 100))
    wrapper.plan(*fewer.plan_arguments(causal))
    assert_close(wrapper.run(*fewer.run_arguments(), return_lse=True), fewer.expected(causal))


def test_no_keys_at_all() -> None:
    problem = Problem(lengths=(0,) * 5)
    out, lse = planned(problem).run(*problem.run_arguments(), return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()


def test_outputs_are_written_in_place_and_returned() -> None:
    problem = Problem()
    wrapper = planned(problem)
    out = torch.full_like(problem.q_nope, torch.nan)
    lse = torch.full(problem.q_nope.shape[:2], torch.nan)
    assert wrapper.run(*problem.run_arguments(), out=out, lse=lse) is out
    assert_close((out, lse), problem.expected())
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    returned = wrapper.run(*problem.run_arguments(), out, lse, True)
    assert returned[0] is out and returned[1] is lse
    assert_close((out, lse), problem.expected())


def test_lse_can_be_a_natural_logarithm() -> None:
    problem = Problem()
    wrapper = planned(problem)
    _, lse = wrapper.run(*problem.run_arguments(), return_lse=True, return_lse_base_on_e=True)
    exact = problem.expected()[1] * math.log(2)
    torch.testing.assert_close(lse.double(), exact, atol=5e-5, rtol=1e-6)


def test_the_result_is_mla_decodes() -> None:
    problem = Problem()
    out = planned(problem, True).run(*problem.run_arguments())
    native = etap_rt.mla_decode(
        (problem.q_nope, problem.q_pe),
        (problem.ckv, problem.kpe),
        (problem.kv_indices, problem.kv_indptr),
        problem.kv_lens,
        softmax_scale=SCALE,
        cu_seqlens_q=problem.qo_indptr,
    )
    assert torch.equal(out, native)


def test_a_wrapper_may_be_planned_again() -> None:
    wrapper = new_wrapper()
    for seed, queries in enumerate([(1, 1, 1), (4, 0, 2), (1,)]):
        problem = Problem(queries, (10, 200, 64)[: len(queries)], seed=seed)
        wrapper.plan(*problem.plan_arguments())
        assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected())


# ---- CUDA graphs ----


def buffers(batch: int, pages: int) -> dict[str, Any]:
    return {
        "qo_indptr": torch.full((batch + 1,), -1, dtype=torch.int32),
        "kv_indptr": torch.full((batch + 1,), -1, dtype=torch.int32),
        "kv_indices": torch.full((pages,), -1, dtype=torch.int32),
        "kv_len_arr": torch.full((batch,), -1, dtype=torch.int32),
    }


def test_plans_for_graphs_copy_into_the_buffers() -> None:
    """A captured run reads the buffers and nothing else: what a later plan left there is what it computes."""
    own = buffers(5, 64)
    wrapper = new_wrapper(use_cuda_graph=True, **own)
    first = Problem()
    wrapper.plan(*first.plan_arguments())
    for name, index in zip(own, first.plan_arguments()):
        assert torch.equal(own[name][: len(index)], index) and own[name].data_ptr() != index.data_ptr()
    assert_close(wrapper.run(*first.run_arguments(), return_lse=True), first.expected())

    second = Problem(queries=(2, 0, 3, 1, 2), lengths=(1, 0, 200, 7, 48), seed=1)
    wrapper.plan(*second.plan_arguments())
    for name, index in zip(own, second.plan_arguments()):
        assert torch.equal(own[name][: len(index)], index)
    assert_close(wrapper.run(*second.run_arguments(), return_lse=True), second.expected())


def test_rows_of_a_padded_batch_are_left_alone() -> None:
    """Buffers of a graph are captured at their full size; a plan may have fewer queries."""
    problem = Problem()
    wrapper = planned(problem, use_cuda_graph=True, **buffers(5, 64))
    padding = torch.full((4, problem.heads, 512), torch.nan, dtype=problem.dtype)
    q_nope, q_pe = torch.cat([problem.q_nope, padding]), torch.cat([problem.q_pe, padding[..., :64]])
    out, lse = torch.full_like(q_nope, 7), torch.full(q_nope.shape[:2], 7.0)
    wrapper.run(q_nope, q_pe, problem.ckv, problem.kpe, out=out, lse=lse)
    assert_close((out[:-4], lse[:-4]), problem.expected())
    assert (out[-4:] == 7).all() and (lse[-4:] == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_indices": None}, "kv_indices: got NoneType"),
        ({"qo_indptr": torch.zeros(6)}, "qo_indptr: got dtype torch.float32"),
        ({"kv_indptr": torch.zeros(5, dtype=torch.int32)}, "kv_indptr: got 5 elements, accepted is 6"),
        ({"kv_len_arr": torch.zeros(6, dtype=torch.int32)}, "kv_len_arr: got 6 elements, accepted is 5"),
        (
            {"kv_len_arr": torch.zeros(5, dtype=torch.int32, device="meta")},
            "kv_len_arr: got device meta, accepted is cpu",
        ),
    ],
)
def test_wrong_buffers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        new_wrapper(use_cuda_graph=True, **buffers(5, 64) | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("batch", "pages", "message"),
    [(6, 64, "qo_indptr: got 6 elements, accepted is 7"), (5, 20, "kv_indices: got 31 elements, accepted is 20")],
)
def test_a_plan_that_does_not_fit_the_buffers_is_refused_before_any_is_written(
    batch: int, pages: int, message: str
) -> None:
    own = buffers(batch, pages)
    wrapper = new_wrapper(use_cuda_graph=True, **own)
    with pytest.raises(ArgumentError) as caught:
        wrapper.plan(*Problem().plan_arguments())
    assert str(caught.value).startswith(message)
    assert all((buffer == -1).all() for buffer in own.values())


def test_zeros_in_place_of_rope_stay_where_they_are() -> None:
    """A captured graph reads them, whatever was planned since."""
    wrapper = planned(Problem(kpe=0))
    before = wrapper._plan.no_rope
    wrapper.plan(*Problem(kpe=0, page_size=64, seed=1).plan_arguments())
    wrapper.plan(*Problem(kpe=0, seed=2).plan_arguments())
    assert wrapper._plan.no_rope is before


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("float_workspace_buffer", None, "float_workspace_buffer: got NoneType, accepted is a torch tensor"),
        ("float_workspace_buffer", "cuda", "float_workspace_buffer: got str, accepted is a torch tensor"),
        ("float_workspace_buffer", np.zeros(128), "float_workspace_buffer: got ndarray, accepted is a torch tensor"),
        (
            "float_workspace_buffer",
            torch.empty(128, device="meta"),
            "float_workspace_buffer: got device meta, accepted is cuda or cpu",
        ),
        ("use_cuda_graph", 1, "use_cuda_graph: got 1, accepted is True or False"),
        ("use_cuda_graph", torch.zeros(3), "use_cuda_graph: got tensor([0., 0., 0.]), accepted is True or False"),
        ("backend", None, "backend: got None, accepted is auto or fa2 or fa3"),
        ("backend", torch.zeros(9, 9), "backend: got Tensor, accepted is auto or fa2 or fa3"),
        ("backend", "trtllm", "backend: got 'trtllm', accepted is auto or fa2 or fa3"),
        ("qo_indptr", [0, 1], "qo_indptr: got list, accepted is a torch tensor"),
        ("kv_len_arr", np.zeros(5, np.int32), "kv_len_arr: got ndarray, accepted is a torch tensor"),
        ("kv_indices", torch.zeros(2, 2, dtype=torch.int32), "kv_indices: got shape (2, 2), accepted is one dim"),
    ],
)
def test_mistakes_in_making_a_wrapper_are_named(name: str, value: Any, message: str) -> None:
    call = {"float_workspace_buffer": torch.empty(128, dtype=torch.int8), "use_cuda_graph": True, **buffers(5, 64)}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        flashinfer.mla.BatchMLAPagedAttentionWrapper(**call | {name: value})
    assert str(caught.value) == message


PLAN_NAMES = (
    "qo_indptr",
    "kv_indptr",
    "kv_indices",
    "kv_len_arr",
    "num_heads",
    "head_dim_ckv",
    "head_dim_kpe",
    "page_size",
    "causal",
    "sm_scale",
    "q_data_type",
    "kv_data_type",
)


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("qo_indptr", [0, 1], "list"),
        ("qo_indptr", torch.zeros(6, dtype=torch.int64), "dtype torch.int64"),
        ("qo_indptr", torch.zeros(0, dtype=torch.int32), "0 elements"),
        ("kv_indptr", torch.zeros(5, dtype=torch.int32), "5 elements"),
        ("kv_indices", torch.zeros(2, 3, dtype=torch.int32), "shape (2, 3)"),
        ("kv_len_arr", torch.zeros(6, dtype=torch.int32), "6 elements"),
        ("kv_len_arr", np.zeros(5, np.int32), "ndarray, accepted is a torch tensor"),
        ("kv_indices", None, "NoneType, accepted is a torch tensor"),
        ("kv_indices", torch.zeros(3, dtype=torch.int32, device="meta"), "device meta, accepted is cuda or cpu"),
        ("kv_indices", torch.ones(3).to_sparse(), "torch.Tensor ("),
        ("num_heads", 129, "129, accepted is 1 ... 128"),
        ("num_heads", 0, "0, accepted is 1 ... 128"),
        ("num_heads", None, "None, accepted is an integer"),
        ("num_heads", 16.0, "16.0, accepted is an integer"),
        ("num_heads", True, "True, accepted is an integer"),
        ("num_heads", "16", "'16', accepted is an integer"),
        ("head_dim_ckv", 128, "128, accepted is 512 or 256"),
        ("head_dim_ckv", [512], "[512], accepted is an integer"),
        ("head_dim_ckv", 512.0, "512.0, accepted is an integer"),
        ("head_dim_kpe", 32, "32, accepted is 64 or 0"),
        ("head_dim_kpe", False, "False, accepted is an integer"),
        ("head_dim_kpe", torch.zeros(2), "tensor([0., 0.]), accepted is an integer"),
        ("page_size", 24, "24, accepted is a divisor or a multiple of 64, below 2**31"),
        ("page_size", -64, "-64, accepted is a divisor or a multiple of 64, below 2**31"),
        ("page_size", 1 << 31, "2147483648, accepted is a divisor or a multiple of 64, below 2**31"),
        ("page_size", None, "None, accepted is an integer"),
        ("page_size", float("nan"), "nan, accepted is an integer"),
        ("causal", None, "None"),
        ("causal", 0, "0, accepted is True or False"),
        ("use_profiler", 1, "1, accepted is True or False"),
        ("use_profiler", torch.zeros(2), "tensor([0., 0.]), accepted is True or False"),
        ("sm_scale", float("nan"), "nan, accepted is a number above 0, at most 2e+38"),
        ("sm_scale", 0.0, "0.0"),
        ("sm_scale", None, "None"),
        ("q_data_type", torch.float32, "float32"),
        ("q_data_type", None, "None, accepted is bfloat16 or float16"),
        ("q_data_type", 16, "16, accepted is bfloat16 or float16"),
        ("kv_data_type", torch.float16, "float16"),
    ],
)
def test_mistakes_in_plan_are_named(name: str, value: Any, given: str) -> None:
    call = dict(zip(PLAN_NAMES, Problem().plan_arguments())) | {name: value}
    wrapper = new_wrapper()
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        wrapper.plan(**call)
    assert str(caught.value).startswith(f"{name}: got {given}")
    with pytest.raises(EtapError, match="before its first plan"):
        wrapper.run(*Problem().run_arguments())


def test_a_plan_that_is_refused_leaves_the_last_one_as_it_was() -> None:
    problem, own = Problem(), buffers(5, 64)
    wrapper = planned(problem, use_cuda_graph=True, **own)
    before = {name: buffer.clone() for name, buffer in own.items()}
    other = dict(zip(PLAN_NAMES, Problem(lengths=(1, 2, 3, 4, 5), heads=3, seed=1).plan_arguments()))
    for change in ({"kv_data_type": None}, {"page_size": 0}, {"kv_len_arr": None}, {"use_profiler": 1}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            wrapper.plan(**other | change)
        assert all(torch.equal(own[name], before[name]) for name in own)
    assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected())


def test_numbers_of_a_plan_may_be_numpys_and_dtypes_names() -> None:
    problem = Problem(kpe=0)
    call = dict(zip(PLAN_NAMES, problem.plan_arguments()))
    call |= {name: np.int64(call[name]) for name in ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size")}
    wrapper = new_wrapper()
    wrapper.plan(**call | {"sm_scale": np.float64(SCALE), "q_data_type": "bfloat16", "kv_data_type": "bfloat16"})
    assert_close(wrapper.run(*problem.run_arguments(), return_lse=True), problem.expected())
    out = wrapper.run(problem.q_nope, None, problem.ckv, None)
    assert torch.equal(out, wrapper.run(*problem.run_arguments()))


@pytest.mark.parametrize("name", ["q_pe", "kpe_cache"])
@pytest.mark.parametrize(("value", "given"), [(torch.zeros(8, 16, 64), "shape (8, 16, 64)"), ([], "list")])
def test_rope_parts_that_were_not_planned_are_refused(name: str, value: Any, given: str) -> None:
    problem = Problem(kpe=0)
    call = dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), problem.run_arguments())) | {name: value}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        planned(problem).run(**call)
    assert str(caught.value).startswith(f"{name}: got {given}, accepted is a ")


def test_without_rope_parts_pages_of_another_size_are_refused_by_name() -> None:
    problem = Problem(kpe=0)
    pages = torch.zeros(34, 32, 512, dtype=problem.dtype)
    with pytest.raises(ArgumentError, match="^ckv_cache: got page size 32, accepted is 16, as planned"):
        planned(problem).run(problem.q_nope, None, pages, None)


@pytest.mark.parametrize("kpe", [64, 0])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q_nope", None, "q_nope: got NoneType, accepted is a torch tensor"),
        ("q_nope", [[1.0]], "q_nope: got list, accepted is a torch tensor"),
        ("q_nope", np.zeros((8, 16, 512), np.float16), "q_nope: got ndarray, accepted is a torch tensor"),
        ("q_nope", torch.zeros(()), "q_nope: got shape (), accepted is (total_q, num_heads, head_dim_ckv)"),
        ("q_nope", torch.zeros(8, 512), "q_nope: got shape (8, 512), accepted is (total_q, num_heads, head_dim_ckv)"),
        ("ckv_cache", None, "ckv_cache: got NoneType, accepted is "),
        (
            "ckv_cache",
            torch.zeros((), dtype=torch.bfloat16),
            "ckv_cache: got shape (), accepted is (num_pages, page_size",
        ),
        ("out", [1], "out: got list, accepted is an array"),
        ("lse", True, "lse: got bool, accepted is a torch tensor"),
        ("lse", np.zeros((8, 16), np.float32), "lse: got ndarray, accepted is a torch tensor"),
        ("lse", torch.zeros(8), "lse: got shape (8,), accepted is (8, 16)"),
        ("return_lse", None, "return_lse: got None, accepted is True or False"),
        ("return_lse", torch.zeros(2), "return_lse: got tensor([0., 0.]), accepted is True or False"),
        ("return_lse_base_on_e", 1, "return_lse_base_on_e: got 1, accepted is True or False"),
    ],
)
def test_what_is_no_argument_of_run_is_named(name: str, value: Any, message: str, kpe: int) -> None:
    problem = Problem(kpe=kpe)
    out, lse = torch.full((8, 16, 512), 7, dtype=torch.bfloat16), torch.full((8, 16), 7.0)
    call = dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), problem.run_arguments()))
    call |= {"out": out, "lse": lse, name: value}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        planned(problem).run(**call)
    assert str(caught.value).startswith(message)
    assert (out == 7).all() and (lse == 7).all()
    del call["lse"]
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        planned(problem).run(**{"return_lse": True} | call | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("q_nope", torch.zeros(8, 15, 512, dtype=torch.bfloat16), "heads 15"),
        ("q_nope", torch.zeros(8, 16, 512, dtype=torch.float16), "dtype float16"),
        ("q_nope", torch.zeros(1, 8, 16, 512, dtype=torch.bfloat16), "shape (1, 8, 16, 512)"),
        ("q_pe", torch.zeros(7, 16, 64, dtype=torch.bfloat16), "shape (7, 16, 64)"),
        ("ckv_cache", torch.zeros(34, 16, 256, dtype=torch.bfloat16), "shape (34, 16, 256)"),
        ("ckv_cache", torch.zeros(34, 32, 512, dtype=torch.bfloat16), "page size 32"),
        ("kpe_cache", torch.zeros(33, 16, 64, dtype=torch.bfloat16), "shape (33, 16, 64)"),
        ("out", torch.zeros(8, 16, 576, dtype=torch.bfloat16), "shape (8, 16, 576)"),
        ("lse", torch.zeros(16, 8), "shape (16, 8)"),
        ("lse", torch.zeros(8, 16, dtype=torch.float64), "dtype float64"),
    ],
)
def test_mistakes_in_run_are_named(name: str, value: Any, given: str) -> None:
    problem = Problem()
    call = dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), problem.run_arguments())) | {name: value}
    if name == "q_nope" and value.ndim == 3:
        call["q_pe"] = value[..., :64]
        if value.dtype != problem.dtype:
            call |= {part: call[part].to(value.dtype) for part in ("ckv_cache", "kpe_cache")}
    if given.startswith("page size"):
        call["kpe_cache"] = value[..., :64]
    wrapper = planned(problem)
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            wrapper.run(**call)
        assert str(caught.value).startswith(f"{name}: got {given}")
        assert "[" not in caught.value.accepted  # where mla_decode's names have numbers


def test_bad_lengths_are_named_as_flashinfer_names_them() -> None:
    problem = Problem()
    problem.kv_lens[1] = 113
    with pytest.raises(ArgumentError, match=r"^kv_len_arr\[1\]: got 113, accepted is 0 ... 112"):
        planned(problem).run(*problem.run_arguments())


def test_what_there_is_no_kernel_for_is_refused_by_name() -> None:
    arguments = Problem().plan_arguments()
    with pytest.raises(UnsupportedError, match="cutlass"):
        new_wrapper(backend="cutlass")
    with pytest.raises(ArgumentError, match="^backend: got 'trtllm'"):
        new_wrapper(backend="trtllm")
    with pytest.raises(UnsupportedError, match="use_profiler"):
        new_wrapper().plan(*arguments, use_profiler=True)
    with pytest.raises(UnsupportedError, match="kv_data_type float8_e4m3fn"):
        new_wrapper().plan(*arguments[:-1], torch.float8_e4m3fn)
