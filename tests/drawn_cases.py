"""Decode problems that hypothesis draws, for tools/fuzz.py to run: it shrinks what fails to the smallest that fails.

The fuzzer itself draws by seed, to try as many problems as fit into a minute. Hypothesis tries fewer, and takes more
care of what it finds.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.cases import DEEPSEEK_SCALE
from tests.tool_modules import import_tool

fuzz = import_tool("fuzz")

MOST_REQUESTS = {"cuda": 40, "cpu": 4}
MOST_TILES = {"cuda": 300, "cpu": 4}  # of 64 tokens, in a request
HEADS = (1, 2, 3, 8, 9, 16, 17, 24, 32, 33, 64, 100, 128)
SCALES = (DEEPSEEK_SCALE, 576**-0.5, 1e-3, 0.2)

# Cases take as long as they take.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def cases(draw: st.DrawFn, device: str) -> Any:
    """A `fuzz.Case` for "cuda" or "cpu"; simple ones first: no request, few tokens, nothing strided."""
    most_tiles = MOST_TILES[device]
    at_edges = st.builds(lambda tiles, more: max(0, 64 * tiles + more), st.integers(0, most_tiles), st.integers(-1, 1))
    length = st.one_of(st.integers(0, 12), at_edges, st.integers(0, 64 * most_tiles))
    lengths = draw(st.lists(length, max_size=MOST_REQUESTS[device]))
    heads = draw(st.sampled_from(HEADS))
    ragged = draw(st.booleans())
    if ragged:
        queries = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    else:
        queries = [draw(st.sampled_from((1, 2, 3, 5)))] * len(lengths)
    while sum(n * q for n, q in zip(lengths, queries)) * heads * 1100 > fuzz.MOST_WORK[device]:
        lengths = [n // 2 for n in lengths]
    return fuzz.Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=draw(st.sampled_from(("bfloat16", "float16"))),
        latent_dim=draw(st.sampled_from((512, 256))),
        heads=heads,
        page_size=draw(st.sampled_from((64, 1, 2, 4, 8, 16, 32, 128, 192, 1024))),
        lengths=lengths,
        queries=queries,
        ragged=ragged,
        csr=draw(st.booleans()),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
        uneven=draw(st.booleans()),
        magnitude=draw(st.sampled_from((1.0, 0.25))),
        split_q=draw(st.booleans()),
        split_cache=draw(st.sampled_from(("no", "views", "apart"))),
        cache_heads_dim=draw(st.booleans()),
        shared_prefix=draw(st.booleans()),
        spare_pages=draw(st.sampled_from((1, 3, 50))),
        spare_columns=draw(st.sampled_from((0, 1, 7, 300))),
        outputs=draw(st.sampled_from(("made", "out", "lse", "both"))),
        planned=draw(st.booleans()),
        few_sms=device == "cuda" and draw(st.booleans()),
    )
