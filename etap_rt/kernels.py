"""What a kernel is: a CUDA source, an entry point and its compile-time constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from etap_rt.schedule import OWN_TILES_ROWS, ROW_TILES

ElementType = Literal["bfloat16", "float16"]

StateType = Literal["bfloat16", "float16", "float32"]

ELEMENT_TYPES: tuple[ElementType, ...] = ("bfloat16", "float16")
STATE_TYPES: tuple[StateType, ...] = ("bfloat16", "float16", "float32")
DIMS = ((512, 64), (256, 64))  # (latent, rope) pairs that are supported


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel to compile. Equal specs are the same kernel; `defines` are -D constants, sorted by name."""

    source: str  # file in cuda_src
    entry: str  # extern "C" __global__ function in it
    defines: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"{self.entry}[{', '.join(f'{name}={value}' for name, value in self.defines)}]"


def decode_spec(
    dtype: ElementType,
    latent_dim: int,
    rope_dim: int,
    rows: int,
    *,
    own_tiles: bool = False,
    general: bool = False,
    trace: bool = False,
) -> KernelSpec:
    """The decode kernel for one element type, (latent, rope) dims and `rows` query rows a tile.

    With `own_tiles`, for up to 32 rows, each warpgroup has key tiles of its own.

    Unless it is `general` it knows nothing of ragged queries, page lists and pages smaller than a tile: to step over
    those took longer than anything else before the first load.
    With `trace` the kernel writes down when its CTAs did what.
    """
    if dtype not in ELEMENT_TYPES or (latent_dim, rope_dim) not in DIMS or rows not in ROW_TILES:
        raise ValueError(f"no decode kernel for {dtype}, dims {latent_dim} + {rope_dim}, {rows} rows a tile")
    if own_tiles and rows > OWN_TILES_ROWS:
        raise ValueError(f"with {rows} rows a tile the warpgroups share the key tiles")
    constants = {"IS_BF16": int(dtype == "bfloat16"), "LATENT_DIM": latent_dim, "ROPE_DIM": rope_dim, "ROWS": rows}
    constants["OWN_TILES"] = int(own_tiles)
    constants["GENERAL"] = int(general)
    if trace:
        constants["TRACE"] = 1
    return KernelSpec("mla_decode.cu", "mla_decode", tuple(sorted(constants.items())))


def kv_write_spec() -> KernelSpec:
    """The kernel that writes new tokens into a cache; one for all dtypes, dims and page sizes."""
    return KernelSpec("kv_write.cu", "kv_write", ())


def page_copy_spec() -> KernelSpec:
    """The kernel that copies pages of a cache, in all layers."""
    return KernelSpec("kv_write.cu", "page_copy", ())


def batch_update_spec() -> KernelSpec:
    """The kernel that brings what changed of a batch's block table and lengths to the device."""
    return KernelSpec("kv_write.cu", "batch_update", ())


def merge_states_spec(dtype: StateType) -> KernelSpec:
    """The kernel that merges two states whose outs are of `dtype`."""
    constants = {"ELEMENT_BYTES": 4 if dtype == "float32" else 2, "IS_BF16": int(dtype == "bfloat16")}
    return KernelSpec("merge_states.cu", "merge_states", tuple(sorted(constants.items())))


def all_specs() -> list[KernelSpec]:
    """Every kernel the package can ask for, in a fixed order."""
    decode = [
        decode_spec(dtype, *dims, rows, own_tiles=own_tiles, general=general)
        for own_tiles in (False, True)
        for general in (False, True)
        for dtype in ELEMENT_TYPES
        for dims in DIMS
        for rows in ROW_TILES
        if rows <= OWN_TILES_ROWS or not own_tiles
    ]
    states = [merge_states_spec(t) for t in STATE_TYPES]
    return [*decode, kv_write_spec(), page_copy_spec(), batch_update_spec(), *states]
