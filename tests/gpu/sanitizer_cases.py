"""Small decodes for compute-sanitizer, with CuPy alone: python -m tests.gpu.sanitizer_cases

Run by test_sanitizer.py under the sanitizer's tools, which slow a kernel down a hundredfold: so little of everything
that differs in the way through a kernel (pages, loads of q, shared units, lists), and then every kernel once. Those for
few SMs run on all of them here. Entries of tables and page lists that nobody may read are never written, which is what
initcheck looks for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from etap_rt import PagedKVCache, compiler, decode, merge_states, mla_decode, schedule
from etap_rt.kernels import DIMS, ELEMENT_TYPES, STATE_TYPES, all_specs
from etap_rt.schedule import OWN_TILES_ROWS, ROW_TILES
from tests.cache_model import host, to_cupy
from tests.cases import NUMPY_DTYPES, UNUSED_ENTRY, Case, assert_close, prepared

SHARED_BY_ALL = Case("16 rows, one unit of all lanes", dtype="float16", lengths=(9000,))
TWO_A_LANE = Case("8 rows, 320, two requests for each lane", lengths=(65,) * 262, heads=1, latent_dim=256)
ALIKE_AT_FIRST = Case("16 rows, alike but for the last", lengths=(*(65,) * 32, 1500))
RAGGED = Case("ragged", queries=(1, 0, 3, 2), lengths=(64, 65, 1, 500))
UNEVEN = Case("32 rows, uneven scores", lengths=(700, 64), heads=32, uneven=True)
EVERY_KERNEL = tuple(
    Case(f"{dtype}, {dim}, {rows} rows, pages of {size}", dtype, dim, (65, 3), rows, page_size=size)
    for dtype in ELEMENT_TYPES
    for dim, _ in DIMS
    for rows in ROW_TILES
    for size in (16, 64)
)
CASES = (
    Case("8 rows, units of several lanes", lengths=(1000, 0, 65), heads=8),
    Case("8 rows, fp16, 320", dtype="float16", latent_dim=256, lengths=(1, 129), heads=3),
    SHARED_BY_ALL,
    Case("16 rows, 320, more units than lanes", lengths=tuple(29 * i % 131 for i in range(140)), latent_dim=256),
    TWO_A_LANE,
    ALIKE_AT_FIRST,
    Case("24 rows, masked", lengths=(0, 1, 200), heads=12, s_q=2, dtype="float16"),
    Case("24 rows, 320, not masked", lengths=(70, 300), heads=24, causal=False, latent_dim=256),
    UNEVEN,
    Case("32 rows, fp16, 320", lengths=(300, 64), heads=16, s_q=2, dtype="float16", latent_dim=256),
    Case("64 rows, two tiles of them, masked", lengths=(0, 3, 500), heads=40, s_q=2, split_q=True, split_cache=True),
    Case("64 rows, 320, one unit of all lanes", lengths=(3000,), heads=64, latent_dim=256, uneven=True),
    *(Case(f"pages of {size}", page_size=size, lengths=(0, 63, 65, 300)) for size in (1, 4, 8, 32, 256)),
    Case("strided", strided=True, s_q=2, heads=3, lengths=(0, 65, 300)),
    RAGGED,
    Case("ragged, page lists, 64 rows", queries=(2, 5, 0), csr=True, lengths=(3, 300, 9), heads=32, page_size=16),
    *EVERY_KERNEL,
)
CASES_ON_FEW = (
    SHARED_BY_ALL,
    TWO_A_LANE,
    ALIKE_AT_FIRST,
    UNEVEN,
    RAGGED,
    *(case for case in EVERY_KERNEL if case.heads <= OWN_TILES_ROWS),
)


def with_gaps(array: NDArray[Any]) -> Any:
    """The `convert` that leaves the unused entries of tables and page lists unwritten, in memory of their own."""
    if array.dtype != np.int32 or UNUSED_ENTRY not in array:
        return to_cupy(array)
    used = array.ravel() != UNUSED_ENTRY
    with cupy.cuda.using_allocator(None):
        copy = cupy.empty(array.shape, np.int32)
    changes = np.flatnonzero(np.diff(used, prepend=~used[0], append=~used[-1]))
    for begin, end in pairwise(changes.tolist()):
        if used[begin]:
            copy.ravel()[begin:end].set(array.ravel()[begin:end])
    return copy


def check(case: Case) -> None:
    inputs, exact_out, exact_lse = prepared(case)
    out, lse = mla_decode(**inputs.on(with_gaps), return_lse=True)
    assert_close(case, host(out), host(lse), exact_out, exact_lse)
    print(f"{case}: in tolerance, norm {np.linalg.norm(exact_out):.4g}")


def check_cache() -> None:
    """Writing, a fork's copy, the batch's buffers, merging states."""
    cache = PagedKVCache(8, page_size=4, dtype="float16", device="cuda")
    sequence = cache.new_sequence()
    rows = cupy.arange(6 * 576, dtype=cupy.float32).reshape(6, 576) / 4096
    cache.write(0, cache.reserve([sequence], [6]), rows[:, :512], rows[:, 512:])
    fork = cache.fork(sequence)
    cache.write(0, cache.reserve([fork], [1]), rows[:1, :512], rows[:1, 512:])
    batch = cache.batch([sequence, fork])
    q = cupy.ones((2, 1, 16, 576), dtype=cupy.float16)
    inputs = (q, cache.pages(0), batch.block_table, batch.cache_seqlens)
    out, lse = mla_decode(*inputs, softmax_scale=0.05, return_lse=True)
    for dtype in STATE_TYPES:
        state = to_cupy(host(out).astype(NUMPY_DTYPES.get(dtype, np.float32)))
        merged, _ = merge_states(state, lse, state, lse)
        np.testing.assert_allclose(host(merged).astype(np.float32), host(out).astype(np.float32), rtol=1e-2)
    print("cache and states: as expected")


def main() -> None:
    for case in CASES:
        check(case)
    # The three ways through a merge: everybody gives up waiting, some do, nobody does.
    for patience in (0, 100_000):
        decode.PATIENCE = patience
        check(SHARED_BY_ALL)
    check_cache()
    schedule.SCARCE_SMS = 1 << 30
    decode._launches.clear()
    for case in CASES_ON_FEW:
        check(case)
    missing = set(all_specs()) - {spec for spec, *_ in compiler._loaded}
    assert not missing, f"no case runs {', '.join(map(str, missing))}"


if __name__ == "__main__":
    main()
