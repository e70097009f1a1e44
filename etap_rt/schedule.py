"""Launch grids: how query rows are tiled, and how the pages of a batch are divided over CTAs.

The lengths of the requests live on the GPU and change between replays of a CUDA graph, so the kernel
divides the work itself. `divide` is the same division in Python: the CPU backend follows it, and the
tests hold the kernel's formula to its promise through it.

Vocabulary
----------
tile      64 consecutive keys of one request.
row tile  `rows` consecutive query rows of one request (row = query_token * heads + head).
pass      the row tiles that are computed at the same time, one in each CTA of a lane.
unit      one pass over one request; it owns all key tiles of the request (at least one, so that a
          request without keys still has somebody to write its zeros).
lane      `row_groups` CTAs that walk over the same key tiles at the same time, so that the second one
          finds in L2 what the first one brought.
segment   the part of a unit that one lane computes. A unit cut into several segments is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TILE_KEYS = 64
ROW_TILES = (8, 16, 24, 32, 64)
MAX_ROW_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """What the host decides for a launch; everything that depends on lengths is left to the device."""

    rows: int  # query rows of a tile, one of ROW_TILES
    row_groups: int  # CTAs of a lane
    passes: int  # passes over a request; passes * row_groups row tiles cover all rows
    lanes: int

    @property
    def ctas(self) -> int:
        return self.lanes * self.row_groups


@dataclass(frozen=True, slots=True)
class Segment:
    """Key tiles [tile_begin, tile_end) of one unit, computed by one lane."""

    request: int
    pass_index: int
    tile_begin: int
    tile_end: int
    first_lane: int  # the lanes first_lane ... last_lane share the unit
    last_lane: int


def plan_grid(rows: int, sm_count: int) -> Grid:
    """Choose row tile and grid for `rows` = s_q * heads query rows a request on a GPU with `sm_count` SMs.

    Up to 32 rows the smallest tile that holds them all wins: a wgmma costs max(16 + N/4, N/2) cycles, so
    padding is nearly free, but a second tile would stream the whole cache again. Above 32 rows, 64 reaches
    the full tensor rate. Each SM holds one CTA (shared memory is full), so there are at most `sm_count`.
    """
    if rows < 1 or sm_count < 1:
        raise ValueError(f"rows and sm_count must be positive, got {rows} and {sm_count}")
    tile = next((t for t in ROW_TILES if t >= rows), ROW_TILES[-1])
    row_tiles = -(-rows // tile)
    limit = min(MAX_ROW_GROUPS, sm_count)
    passes = -(-row_tiles // limit)
    row_groups = -(-row_tiles // passes)
    return Grid(tile, row_groups, passes, max(1, sm_count // row_groups))


def unit_tiles(seqlen: int) -> int:
    """Key tiles that the division charges for a request of `seqlen` tokens."""
    return max(1, -(-seqlen // TILE_KEYS))


def divide(seqlens: Sequence[int], grid: Grid) -> list[list[Segment]]:
    """Divide the key tiles of all units over the lanes of `grid`; the mirror of the kernel's division.

    The T tiles are laid out in the order (request, pass, tile). Of L lanes each takes the next T // L of them,
    the first T % L lanes one more. With fewer tiles than lanes only the first T lanes work. Returns one list of
    segments a lane.
    """
    units = [(r, p, unit_tiles(n)) for r, n in enumerate(seqlens) for p in range(grid.passes)]
    total = sum(n for _, _, n in units)
    lanes = min(grid.lanes, total)
    work: list[list[Segment]] = [[] for _ in range(grid.lanes)]
    start = 0
    for request, pass_index, tiles in units:
        first = lane_of(start, total, lanes)
        last = lane_of(start + tiles - 1, total, lanes)
        for lane in range(first, last + 1):
            begin = max(start, lane_begin(lane, total, lanes)) - start
            end = min(start + tiles, lane_begin(lane + 1, total, lanes)) - start
            work[lane].append(Segment(request, pass_index, begin, end, first, last))
        start += tiles
    return work


def lane_begin(lane: int, total: int, lanes: int) -> int:
    """The first tile of a lane."""
    return lane * (total // lanes) + min(lane, total % lanes)


def lane_of(tile: int, total: int, lanes: int) -> int:
    """The lane that owns tile `tile` of `total`."""
    base, extra = divmod(total, lanes)
    wide = extra * (base + 1)  # tiles of the lanes that have one more
    return tile // (base + 1) if tile < wide else extra + (tile - wide) // base
