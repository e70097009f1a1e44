"""Record when each CTA of a decode call did what, with a kernel that is compiled for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from etap_rt import arguments, decode, driver, interop
from etap_rt.errors import ArgumentError, UnsupportedError
from etap_rt.scalars import positive

# Words of a CTA's record, as in mla_decode.cu, and what the kernel writes where nothing happened.
_WORDS = ("sm", "start", "first_tile", "last_tile", "merge", "end")
_NEVER = 0


def trace_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Any = None,
    runs: int = 2,
) -> dict[str, Any]:
    """Run `mla_decode` on a GPU and return when its CTAs did what; synchronizes.

    Args:
        q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, cu_seqlens_q: as in `mla_decode`, on a GPU.
        runs: how often it runs, 1 or more; the recorded times are those of the last run.

    Returns:
        What tools/trace.py draws and JSON can hold: {"gpu", "clock", "ctas"}. Each CTA has its number, its SM and times
        in ns of one clock: start, first_tile (scores of the first tile are there), last_tile (a segment's products are
        done, the last one's count), merge (it begins to merge what others left), end. What did not happen is None.

    Raises:
        ArgumentError, ArgumentTypeError, CompileError: as `mla_decode`.
        UnsupportedError: the arrays are on the CPU.
    """
    call = arguments.check(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, None, None, cu_seqlens_q)
    problem, like = call.problem, call.q[0]
    runs = positive(runs, "runs")
    if problem.total_q == 0:
        raise ArgumentError("q", "no queries", "at least one, so that there is something to trace")
    if problem.device_type != "cuda":
        raise UnsupportedError("tracing on the CPU", "arrays on a GPU")
    stream = interop.current_stream(like.layout)
    identity, capture, sms = driver.stream_state(problem.device, stream)
    launch = decode.Launch(problem, sms, trace=True)
    words = interop.empty(like.layout, like.owner, (launch.grid.ctas, len(_WORDS)), "int64")
    described = interop.describe(words, "trace")
    launch.params.trace = described.pointer
    out, _ = decode.make_outputs(call, None, None, False)
    for _ in range(runs):
        launch.run(call, interop.address(like.layout, out), 0, softmax_scale, causal, stream, identity, capture)
    record = interop.to_host(described)
    return {"gpu": driver.device_name(problem.device), "clock": "globaltimer ns", "ctas": _ctas(record)}


def _ctas(record: np.ndarray[Any, Any]) -> list[dict[str, int | None]]:
    ctas = []
    for number, row in enumerate(record.tolist()):
        cta: dict[str, int | None] = {"cta": number}
        cta |= {word: None if word != "sm" and value == _NEVER else value for word, value in zip(_WORDS, row)}
        # Without a tile it passed the same places all the same.
        if cta["first_tile"] is None:
            cta["last_tile"] = None
        ctas.append(cta)
    return ctas
