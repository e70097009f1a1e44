"""Streams that run on a part of the GPU's SMs, and what is different there: each warpgroup has key tiles of its own."""

from __future__ import annotations

from typing import Any

import pytest

import etap_rt
from etap_rt import driver
from tests.cache_model import TORCH_CUDA
from tests.cases import Case
from tests.gpu_cases import (
    DIVISIONS,
    assert_leaping_scores_match_float64,
    assert_matches_float64,
    assert_same_bits,
    on_gpu,
    run,
)
from tests.tool_modules import import_tool

torch: Any = pytest.importorskip("torch")
green_context = import_tool("green_context")
SCALE = 192**-0.5


@pytest.mark.parametrize("case", DIVISIONS, ids=str)
def test_decode_on_few_sms_matches_float64(case: Case, few_sms: Any) -> None:
    with torch.cuda.stream(few_sms):
        assert_matches_float64(case, TORCH_CUDA)
        few_sms.synchronize()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 64])
def test_scores_may_leap_on_few_sms(heads: int, dtype: str, few_sms: Any) -> None:
    with torch.cuda.stream(few_sms):
        assert_leaping_scores_match_float64(heads, dtype)


@pytest.mark.parametrize("case", DIVISIONS, ids=str)
def test_decode_on_few_sms_gives_the_same_bits_every_time(case: Case, few_sms: Any) -> None:
    with torch.cuda.stream(few_sms):
        call = on_gpu(case)
        expected = run(call, case.latent_dim)
        for _ in range(20):
            assert_same_bits(run(call, case.latent_dim), expected)


@pytest.mark.parametrize("sms", [8, 32])
def test_a_call_uses_the_sms_of_its_stream_and_gives_the_same_result(sms: int) -> None:
    torch.manual_seed(sms)
    q = torch.randn(5, 1, 16, 576, device="cuda").bfloat16()
    pages = torch.randn(160, 64, 576, device="cuda").bfloat16()
    table = torch.randperm(160, device="cuda").int().view(5, 32)
    lengths = torch.tensor([2048, 1, 700, 0, 1500], dtype=torch.int32, device="cuda")
    expected = etap_rt.mla_decode(q, pages, table, lengths, softmax_scale=SCALE)
    torch.cuda.synchronize()
    handle = green_context.stream_on(sms, torch.cuda.current_device())
    assert driver.stream_sm_count(torch.cuda.current_device(), handle) == sms
    assert driver.stream_sm_count(torch.cuda.current_device(), 0) == driver.sm_count(torch.cuda.current_device())
    with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
        outputs = [etap_rt.mla_decode(q, pages, table, lengths, softmax_scale=SCALE) for _ in range(2)]
        record = etap_rt.trace_decode(q, pages, table, lengths, softmax_scale=SCALE)
    torch.cuda.synchronize()
    assert torch.equal(*outputs)
    assert float((outputs[0].float() - expected.float()).norm() / expected.float().norm()) < 5e-3
    assert len(record["ctas"]) == sms
    assert len({cta["sm"] for cta in record["ctas"]}) == sms
