"""Tiles that arrive after later ones: kernels in which some of a lane's first loads are issued late."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etap_rt.compiler import kernel_sources
from tests.gpu_cases import assert_same_bits, run

torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCALE = 192**-0.5
WAIT = "for (const i64 begin = clock64(); clock64() - begin < 100000;) {\n}\n"  # 50 us

# Chunks 2 to 8 of the lane's first tile, without those of a head start, leave when the second tile has left.
SECOND_TILE = """                                 last && tiles - tile <= LAST_TILES);
                    place = place.ahead(TILE_CHUNKS);
"""
LATE_FIRST_TILE = (
    (
        "        if (to_load(i))\n            tma_load_3d(",
        "        if (to_load(i) && j < 2)\n            tma_load_3d(",
    ),
    (
        SECOND_TILE,
        SECOND_TILE
        + """if (group == 0 && i == 1 && now->first) {
    const int first_page = __shfl_sync(~0u, pages.page, 0);
    if (threadIdx.x % 32 == 0) {
        """
        + WAIT
        + """const int late = !GENERAL && s.head_start && s.start.even ? HEAD_START : 2;
        for (int j = threadIdx.x / 32 - CONSUMER_WARPS; j < TILE_CHUNKS; j += PRODUCER_WARPS)
            if (j >= late)
                tma_load_3d(shared_address(s.ring[first_slot + j]), &p.latent_map,
                            shared_address(&s.chunk_full[first_slot + j]), (j - ROPE_CHUNKS) * CHUNK_DIMS,
                            first_token(p, now->walk.tile_begin), first_page);
    }
    __syncwarp();
}
""",
    ),
)

# What a head start loads for nothing leaves late.
LATE_HEAD_START = (
    (
        """        tma_load_3d(shared_address(s.ring[j]), j < ROPE_CHUNKS ? &p.rope_map : &p.latent_map, full,
                    (j < ROPE_CHUNKS ? j : j - ROPE_CHUNKS) * CHUNK_DIMS, first_token(p, tile), page);
""",
        "        if (page < 0) __trap();\n",
    ),
    (
        "    // What has been passed over goes back to the producers.\n",
        "    if (first_slot > 0 && l == 0) {\n"
        + WAIT
        + """for (int j = 0; j < first_slot; ++j)
    tma_load_3d(shared_address(s.ring[j]), &p.latent_map, shared_address(&s.chunk_full[j]), 0, 0, 0);
}
""",
    ),
)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[tuple[tuple[str, str], ...]], Path]:
    """A copy of the sources with replacements in mla_decode.cu."""

    def edit(replacements: tuple[tuple[str, str], ...]) -> Path:
        directory = tmp_path / "cuda_src"
        shutil.copytree(ROOT / "cuda_src", directory)
        source = directory / "mla_decode.cu"
        text = source.read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"the source has changed, there is no longer one {old!r}"
            text = text.replace(old, new)
        source.write_text(text)
        return directory

    return edit


def requests(lengths: list[int], heads: int, dtype: Any, latent_dim: int = 512) -> dict[str, Any]:
    torch.manual_seed(len(lengths))
    columns = -(-max(lengths) // 64)
    pages = torch.randperm(len(lengths) * columns, device="cuda").int()
    dim = latent_dim + 64
    return {
        "q": torch.randn(len(lengths), 1, heads, dim, device="cuda").to(dtype),
        "kv_cache": torch.randn(len(pages), 64, dim, device="cuda").to(dtype),
        "block_table": pages.view(len(lengths), columns),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "softmax_scale": SCALE,
    }


@pytest.mark.parametrize(
    ("heads", "latent_dim", "dtype"),
    [(16, 512, torch.bfloat16), (32, 512, torch.bfloat16), (24, 512, torch.float16), (16, 256, torch.float16)],
)
def test_a_tile_may_arrive_after_the_next_on_few_sms(
    heads: int, latent_dim: int, dtype: Any, few_sms: Any, edited: Any
) -> None:
    with torch.cuda.stream(few_sms):
        call = requests([64 * 20] * 40, heads, dtype, latent_dim)
        expected = run(call, latent_dim)
        with kernel_sources(edited(LATE_FIRST_TILE)):
            assert_same_bits(run(call, latent_dim), expected)


def test_a_tile_may_arrive_after_the_next(edited: Any) -> None:
    call = requests([64 * 20] * 40, 64, torch.bfloat16)
    expected = run(call)
    with kernel_sources(edited(LATE_FIRST_TILE)):
        assert_same_bits(run(call), expected)


@pytest.mark.parametrize(("heads", "few"), [(16, False), (64, False), (32, True)])
def test_a_head_start_that_was_for_nothing_may_arrive_late(heads: int, few: bool, few_sms: Any, edited: Any) -> None:
    with torch.cuda.stream(few_sms if few else torch.cuda.current_stream()):
        call = requests([64 * 10] * 40 + [9000] * 8, heads, torch.bfloat16)
        expected = run(call)
        with kernel_sources(edited(LATE_HEAD_START)):
            assert_same_bits(run(call), expected)
