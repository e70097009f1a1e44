"""Traces: what is read out of a record, and what is refused. The record itself needs a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import etap_rt
from etap_rt import tracing
from etap_rt.compiler import build_report, compile_spec
from etap_rt.kernels import decode_spec


def test_what_did_not_happen_is_none() -> None:
    record = np.array([[3, 100, 120, 150, 160, 200], [0, 100, 0, 130, 0, 140]])
    assert tracing._ctas(record) == [
        {"cta": 0, "sm": 3, "start": 100, "first_tile": 120, "last_tile": 150, "merge": 160, "end": 200},
        {"cta": 1, "sm": 0, "start": 100, "first_tile": None, "last_tile": None, "merge": None, "end": 140},
    ]


def test_arrays_on_the_cpu_are_refused() -> None:
    q, cache = np.zeros((1, 1, 16, 576), np.float16), np.zeros((1, 64, 576), np.float16)
    table, lengths = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    with pytest.raises(etap_rt.UnsupportedError, match="tracing on the CPU"):
        etap_rt.trace_decode(q, cache, table, lengths, softmax_scale=0.1)


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        (0, etap_rt.ArgumentError, "runs: got 0, accepted is 1 or more"),
        ("2", etap_rt.ArgumentTypeError, "runs: got '2', accepted is an integer"),
        (True, etap_rt.ArgumentTypeError, "runs: got True, accepted is an integer"),
    ],
)
def test_runs_that_cannot_be_counted_are_refused(runs: Any, error: type[Exception], message: str) -> None:
    q, cache = np.zeros((1, 1, 16, 576), np.float16), np.zeros((1, 64, 576), np.float16)
    table, lengths = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    with pytest.raises(error) as caught:
        etap_rt.trace_decode(q, cache, table, lengths, softmax_scale=0.1, runs=runs)
    assert str(caught.value) == message


@pytest.mark.parametrize("ragged", [False, True])
def test_without_queries_there_is_nothing_to_trace(ragged: bool) -> None:
    q = np.zeros((0, 16, 576) if ragged else (0, 1, 16, 576), np.float16)
    starts = np.zeros(2, np.int32) if ragged else None
    table, lengths = np.zeros((int(ragged), 1), np.int32), np.ones(int(ragged), np.int32)
    cache = np.zeros((1, 64, 576), np.float16)
    with pytest.raises(etap_rt.ArgumentError, match="^q: got no queries"):
        etap_rt.trace_decode(q, cache, table, lengths, softmax_scale=0.1, cu_seqlens_q=starts, runs=np.int64(2))


def test_the_kernel_that_traces_is_another_one_and_spills_nothing() -> None:
    assert decode_spec("bfloat16", 512, 64, 16, trace=True) != decode_spec("bfloat16", 512, 64, 16)
    report = build_report(compile_spec(decode_spec("bfloat16", 512, 64, 16, trace=True)))
    assert (report.spill_stores, report.spill_loads, report.stack, report.serialized_wgmma) == (0, 0, 0, False)
