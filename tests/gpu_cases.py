"""Cases of several modules of GPU tests, and what these do with one: arguments on the GPU, outputs, comparisons."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pytest

from etap_rt import mla_decode
from tests.cache_model import CUPY, TORCH_CUDA, Library, host
from tests.cases import DEEPSEEK_SCALE, NUMPY_DTYPES, Case, assert_close, make_inputs, prepared

torch: Any = pytest.importorskip("torch")

# Units that one lane has alone, that a few share and that all share; 8, 16 and 64 rows; one and more passes.
DIVISIONS = (
    Case("mixed"),
    Case("small-pages", page_size=16),
    Case("one-request", lengths=(9001,)),
    Case("one-request-8-rows", lengths=(9001,), heads=8, dtype="float16"),
    Case("one-request-128-heads", lengths=(4500,), heads=128),
    Case("many-short", lengths=tuple(7 * i % 211 for i in range(300)), heads=8),
    Case("two-requests-a-lane", lengths=(130,) * 260, heads=8, latent_dim=256),
    Case("5-queries-128-heads", s_q=5, heads=128, lengths=(3, 64, 65, 1500)),
    Case("one-long-many-short-320", latent_dim=256, heads=24, lengths=(1, 5, 7000, *range(60, 70), 0, 0, 300)),
)
# Powers of two by which the scores of successive tiles are raised, for odd heads lowered: in even and in odd tiles they
# leap by more than a float can hold as a power.
LEAPS = (-65, 65, -65, -64, 65)
SMALL_PAGES = tuple(Case(f"page-size-{size}", page_size=size) for size in (1, 2, 4, 8, 16, 32))


def on_gpu(case: Case) -> dict[str, Any]:
    """Arguments of a case as torch tensors on the GPU."""
    return make_inputs(case).on(TORCH_CUDA.array)


def query(call: dict[str, Any]) -> Any:
    """q, or the latent part of it."""
    return call["q"][0] if isinstance(call["q"], tuple) else call["q"]


def run(call: dict[str, Any], latent_dim: int = 512) -> tuple[Any, Any]:
    """out and lse of a call with torch tensors, in memory that was full of NaN."""
    q = query(call)
    *tokens, heads, _ = q.shape
    lse_shape = (heads, *tokens) if "cu_seqlens_q" in call else (tokens[0], heads, tokens[1])
    out = torch.full((*tokens, heads, latent_dim), torch.nan, dtype=q.dtype, device="cuda")
    lse = torch.full(lse_shape, torch.nan, device="cuda")
    mla_decode(**call, out=out, lse=lse)
    return out, lse


def assert_same_bits(got: tuple[Any, Any], expected: tuple[Any, Any], about: str = "") -> None:
    """Outputs of torch, bit by bit; compared on the GPU, on the current stream."""
    for x, y, bit_type in zip(got, expected, (torch.int16, torch.int32)):
        assert torch.equal(x.view(bit_type), y.view(bit_type)), about


def with_libraries(cases: Iterable[Case], with_cupy: Collection[str]) -> list[Any]:
    """Parameters (case, library): every case with torch, those that are named with CuPy too."""
    parameters = []
    for case in cases:
        parameters.append(pytest.param(case, TORCH_CUDA, id=f"{case}-torch"))
        if case.name in with_cupy:
            parameters.append(pytest.param(case, CUPY, id=f"{case}-cupy"))
    return parameters


def assert_matches_float64(case: Case, library: Library) -> None:
    """A case in outputs of the caller, which were full of NaN and are what is returned."""
    inputs, exact_out, exact_lse = prepared(case)
    call = inputs.on(library.array)
    out = library.array(np.full(exact_out.shape, np.nan, NUMPY_DTYPES[case.dtype]))
    lse = library.array(np.full(exact_lse.shape, np.nan, np.float32))

    returned = mla_decode(**call, out=out, lse=lse, return_lse=True)

    assert returned[0] is out and returned[1] is lse
    assert_close(case, host(out), host(lse), exact_out, exact_lse)


def assert_leaping_scores_match_float64(heads: int, dtype: str) -> None:
    """Random requests whose scores leap, see LEAPS."""
    case = Case("leaping", dtype=dtype, lengths=(1500,) * 40, heads=heads)
    batch, length = len(case.lengths), case.lengths[0]
    generator = torch.Generator("cuda").manual_seed(heads)
    q = torch.randn(batch, 1, heads, 576, device="cuda", generator=generator)
    q[..., -1] = torch.tensor([1.0, -1.0], device="cuda").repeat(heads)[:heads]
    pages = torch.randn(batch * 24, 64, 576, device="cuda", generator=generator)
    levels = torch.tensor(LEAPS, device="cuda").repeat(len(pages))[: len(pages)]
    pages[:, :, -1] = (levels * math.log(2) / DEEPSEEK_SCALE)[:, None]
    q, pages = q.to(getattr(torch, dtype)), pages.to(getattr(torch, dtype))
    table = torch.arange(len(pages), dtype=torch.int32, device="cuda").view(batch, 24)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    call = {"q": q, "kv_cache": pages, "block_table": table, "cache_seqlens": lengths, "softmax_scale": DEEPSEEK_SCALE}
    out, lse = run(call)

    keys = pages.double().view(batch, -1, 576)[:, :length]
    scores = q[:, 0].double() @ keys.transpose(1, 2) * DEEPSEEK_SCALE
    exact_out = (scores.softmax(-1) @ keys[..., :512])[:, None]
    exact_lse = scores.logsumexp(-1)[..., None]
    assert_close(case, host(out), host(lse), host(exact_out), host(exact_lse))
