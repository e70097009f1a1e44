"""The names of FlashMLA and FlashInfer on a GPU: results, CUDA graphs, memory, and what they cost over mla_decode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from etap_rt import mla_decode
from etap_rt.compat import flashinfer
from etap_rt.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from tests.cpu import test_compat_flash_mla as flash_mla_cases
from tests.cpu.test_compat_flashinfer import SCALE, Problem

torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

MOST_HOST_US = 5.0  # that the layers may add to a call of mla_decode
MOST_GPU_TIME = 1.02  # of mla_decode's
DV = flash_mla_cases.DV


def cuda(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tensor.cuda() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors)


def assert_close(got: tuple[Any, Any], exact: tuple[Any, Any]) -> None:
    flash_mla_cases.assert_close((got[0].cpu(), got[1].cpu()), exact)


def host_us(*functions: Callable[[], Any]) -> list[float]:
    """Host time of a call of each, which does not wait: the best of many, in turns: other work slows hosts down."""
    best = [math.inf] * len(functions)
    for _ in range(40):
        for i, function in enumerate(functions):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / 50 * 1e6)
    return best


def gpu_us(function: Callable[[], Any], calls: int = 20) -> float:
    """GPU time of a call in a graph, the best of many replays."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    best = math.inf
    for _ in range(40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / calls * 1e3)
    return best


def allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


# ---- FlashMLA ----


def flash_mla_problem(**sizes: Any) -> tuple[dict[str, Any], Callable[[float, bool], tuple[Any, Any]]]:
    """Arguments on the GPU, and their exact result for a scale and a mask."""
    call = flash_mla_cases.problem(**sizes)
    on_gpu = dict(zip(call, cuda(tuple(call.values()))))
    return on_gpu, lambda scale, causal: flash_mla_cases.expected(**call, dv=DV, scale=scale, causal=causal)


@pytest.mark.parametrize("form", [2025, 2026])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (2, 16), (1, 128), (3, 8)])
def test_flash_mla_as_of(form: int, s_q: int, h_q: int) -> None:
    call, exact = flash_mla_problem(lengths=(0, 1, 64, 1000), s_q=s_q, h_q=h_q)
    meta, splits = get_mla_metadata(call["cache_seqlens"], s_q * h_q, 1) if form == 2025 else get_mla_metadata()
    if form == 2025:
        assert meta.is_cuda and splits.is_cuda
    out, lse = flash_mla_with_kvcache(
        **call, head_dim_v=DV, tile_scheduler_metadata=meta, num_splits=splits, causal=True
    )
    assert_close((out, lse), exact(576**-0.5, True))
    given = torch.full_like(out, torch.nan)
    again, _ = flash_mla_with_kvcache(
        **call, head_dim_v=DV, tile_scheduler_metadata=meta, num_splits=splits, causal=True, out=given
    )
    assert again is given and torch.equal(given, out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_kv", "h_q"), [(2, 32), (3, 6), (8, 128), (2, 256)])
def test_flash_mla_with_several_kv_heads(h_kv: int, h_q: int, causal: bool) -> None:
    call, exact = flash_mla_problem(lengths=(0, 1, 300, 77), s_q=2, h_q=h_q, h_kv=h_kv)
    result = flash_mla_with_kvcache(
        **call, head_dim_v=DV, tile_scheduler_metadata=get_mla_metadata()[0], softmax_scale=0.05, causal=causal
    )
    assert_close(result, exact(0.05, causal))


def test_flash_mla_in_a_graph_follows_lengths() -> None:
    call, exact = flash_mla_problem(lengths=(64, 700, 5, 200), s_q=2)
    meta = get_mla_metadata()[0]
    flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=meta, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flash_mla_with_kvcache(**call, head_dim_v=DV, tile_scheduler_metadata=meta, causal=True)
    graph.replay()
    assert_close(result, exact(576**-0.5, True))
    shorter = torch.tensor([0, 699, 1, 63], dtype=torch.int32)
    call["cache_seqlens"].copy_(shorter)
    graph.replay()
    on_cpu = {name: tensor.cpu() for name, tensor in call.items()}
    assert_close(result, flash_mla_cases.expected(**on_cpu, dv=DV, scale=576**-0.5, causal=True))


# ---- FlashInfer ----


def new_wrapper(**options: Any) -> Any:
    workspace = torch.empty(1024, dtype=torch.int8, device="cuda")
    return flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_flashinfer_with_requests_of_different_query_length(page_size: int, causal: bool) -> None:
    problem = Problem(page_size=page_size)
    wrapper = new_wrapper()
    wrapper.plan(*cuda(problem.plan_arguments(causal)))
    assert_close(wrapper.run(*cuda(problem.run_arguments()), return_lse=True), problem.expected(causal))


@pytest.mark.parametrize(("ckv", "dtype", "heads"), [(512, torch.float16, 128), (256, torch.bfloat16, 3)])
def test_flashinfer_dims_dtypes_and_heads_with_a_plan_from_the_host(ckv: int, dtype: Any, heads: int) -> None:
    problem = Problem(ckv=ckv, dtype=dtype, heads=heads)
    wrapper = new_wrapper(backend="fa3")
    wrapper.plan(*problem.plan_arguments())
    assert_close(wrapper.run(*cuda(problem.run_arguments()), return_lse=True), problem.expected())


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_flashinfer_without_rope(page_size: int) -> None:
    problem = Problem(kpe=0, dtype=torch.float16, page_size=page_size)
    wrapper = new_wrapper()
    wrapper.plan(*cuda(problem.plan_arguments()))
    assert_close(wrapper.run(*cuda(problem.run_arguments()), return_lse=True), problem.expected())


def test_flashinfer_lse_to_either_base() -> None:
    problem = Problem()
    wrapper = new_wrapper()
    wrapper.plan(*cuda(problem.plan_arguments()))
    arguments = cuda(problem.run_arguments())
    _, base_2 = wrapper.run(*arguments, return_lse=True)
    _, base_e = wrapper.run(*arguments, return_lse=True, return_lse_base_on_e=True)
    exact = problem.expected()[1]
    torch.testing.assert_close(base_2.cpu().double(), exact, atol=7e-5, rtol=1e-6)
    torch.testing.assert_close(base_e.cpu().double(), exact * math.log(2), atol=5e-5, rtol=1e-6)


@pytest.mark.parametrize("kpe", [64, 0])
@pytest.mark.parametrize("from_host", [False, True], ids=["plan-from-gpu", "plan-from-host"])
def test_flashinfer_in_a_graph_follows_later_plans(from_host: bool, kpe: int) -> None:
    ints = {"dtype": torch.int32, "device": "cuda"}
    wrapper = new_wrapper(
        use_cuda_graph=True,
        qo_indptr=torch.empty(6, **ints),
        kv_indptr=torch.empty(6, **ints),
        kv_indices=torch.empty(64, **ints),
        kv_len_arr=torch.empty(5, **ints),
    )
    problems = (
        Problem(kpe=kpe),
        Problem(queries=(2, 0, 3, 1, 2), lengths=(1, 0, 200, 7, 48), kpe=kpe, seed=1),
        Problem(queries=(1, 1, 1, 1, 1), lengths=(0, 0, 0, 0, 0), kpe=kpe, seed=2),
        Problem(queries=(0, 8, 0, 0, 0), lengths=(16, 500, 1, 2, 3), kpe=kpe, seed=3),
    )
    queries = [torch.zeros(8, 16, dim, dtype=torch.bfloat16, device="cuda") for dim in (512, kpe)]
    cache = [torch.zeros(64, 16, dim, dtype=torch.bfloat16, device="cuda") for dim in (512, kpe)]
    out, lse = torch.empty_like(queries[0]), torch.empty(8, 16, device="cuda")

    def fill(problem: Problem) -> None:
        plan = problem.plan_arguments(True)
        wrapper.plan(*(plan if from_host else cuda(plan)))
        for buffers, values in ((queries, (problem.q_nope, problem.q_pe)), (cache, (problem.ckv, problem.kpe))):
            for buffer, value in zip(buffers, values):
                buffer.fill_(torch.nan)
                buffer[: len(value)] = value.cuda()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)

    fill(problems[0])
    wrapper.run(*queries, *cache, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(*queries, *cache, out=out, lse=lse)
    for problem in (*problems, problems[0]):
        fill(problem)
        graph.replay()
        tokens = len(problem.q_nope)
        assert_close((out[:tokens], lse[:tokens]), problem.expected(True))
        assert out[tokens:].isnan().all() and lse[tokens:].isnan().all()


def test_flashinfer_allocates_nothing_when_outputs_are_given_and_never_waits() -> None:
    for problem in (Problem(), Problem(kpe=0)):
        wrapper = new_wrapper()
        plan, arguments = cuda(problem.plan_arguments()), cuda(problem.run_arguments())
        out, lse = torch.empty_like(arguments[0]), torch.empty(arguments[0].shape[:2], device="cuda")
        wrapper.plan(*plan)
        wrapper.run(*arguments, out=out, lse=lse)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            wrapper.plan(*plan)
            before = allocations()
            for _ in range(3):
                wrapper.run(*arguments, out=out, lse=lse, return_lse=True)
            assert allocations() == before
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close((out, lse), problem.expected())


# ---- What the layers cost ----


def decode_problem() -> dict[str, Any]:
    """32 requests of 4096 tokens, 16 heads."""
    table = torch.randperm(32 * 64, device="cuda").int().view(32, 64)
    return {
        "q": torch.randn(32, 1, 16, 576, dtype=torch.bfloat16, device="cuda"),
        "kv_cache": torch.randn(32 * 64, 64, 1, 576, dtype=torch.bfloat16, device="cuda"),
        "block_table": table,
        "cache_seqlens": torch.full((32,), 4096, dtype=torch.int32, device="cuda"),
    }


def flash_mla_and_native() -> tuple[Callable[[], Any], Callable[[], Any]]:
    call = decode_problem()
    arrays = tuple(call.values())
    meta, out = get_mla_metadata()[0], torch.empty(32, 1, 16, DV, dtype=torch.bfloat16, device="cuda")
    return (
        lambda: flash_mla_with_kvcache(*arrays, DV, meta, softmax_scale=SCALE, causal=True, out=out),
        lambda: mla_decode(*arrays, softmax_scale=SCALE, causal=True, out=out, return_lse=True),
    )


def flashinfer_and_native() -> tuple[Callable[[], Any], Callable[[], Any]]:
    call = decode_problem()
    cache = tuple(part.contiguous() for part in call["kv_cache"][:, :, 0].split((512, 64), dim=-1))
    q = tuple(part.contiguous() for part in call["q"][:, 0].split((512, 64), dim=-1))
    starts = torch.arange(33, dtype=torch.int32, device="cuda")
    pages = (call["block_table"].flatten(), starts * 64)
    lengths = call["cache_seqlens"]
    wrapper = new_wrapper()
    wrapper.plan(starts, pages[1], pages[0], lengths, 16, 512, 64, 64, True, SCALE, torch.bfloat16, torch.bfloat16)
    out, lse, by_heads = torch.empty_like(q[0]), torch.empty(32, 16, device="cuda"), torch.empty(16, 32, device="cuda")
    return (
        lambda: wrapper.run(*q, *cache, out=out, lse=lse, return_lse=True),
        lambda: mla_decode(
            q, cache, pages, lengths, softmax_scale=SCALE, cu_seqlens_q=starts, out=out, lse=by_heads, return_lse=True
        ),
    )


@pytest.mark.parametrize("pair", [flash_mla_and_native, flashinfer_and_native], ids=["flash_mla", "flashinfer"])
def test_the_layers_cost_little(
    pair: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]], record_property: Callable[[str, object], None]
) -> None:
    layer, native = pair()
    host = dict(zip(("layer", "native"), host_us(layer, native)))
    gpu = {"layer": gpu_us(layer), "native": gpu_us(native)}
    record_property("host_us", {name: round(us, 2) for name, us in host.items()})
    record_property("gpu_us", {name: round(us, 2) for name, us in gpu.items()})
    assert host["layer"] <= host["native"] + MOST_HOST_US
    assert gpu["layer"] <= gpu["native"] * MOST_GPU_TIME
