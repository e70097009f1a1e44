"""Streams that run on a part of the GPU's SMs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import etap_rt  # noqa: E402
from etap_rt import driver  # noqa: E402
from tests.tool_modules import import_tool  # noqa: E402

green_context = import_tool("green_context")
SCALE = 192**-0.5


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
