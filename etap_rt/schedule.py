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
# Tokens of a page up to which threads fetch the rows of a tile: the copy engine takes one order a page and chunk.
GATHERED_PAGE = 4
ROW_TILES = (8, 16, 24, 32, 64)
OWN_TILES_ROWS = 32  # up to so many a warpgroup has registers for all dims of the accumulator
SCARCE_SMS = 80  # up to so many products are scarcer than memory: see mla_decode.cu
CHUNKS_AHEAD = 2  # where a call waits for memory: likewise
CHUNKS_AHEAD_64_ROWS = (1, 3)  # where memory is what it waits for, and where products are
MAX_ROW_GROUPS = 8
SWITCH_TILES = 4  # what a lane loses by starting on another unit, measured in tiles of an H200
EVEN_SLACK_LOG2 = 3  # what it costs to merge units that need not be, as a part of a lane's work: see mla_decode.cu
WHOLE_SLACK = 6  # at most so many tiles with one unit a lane
FEW_SPARE = 32  # one lane of so many may be idle in the even division without a loss worth a tile: likewise
MOST_TILES = (1 << 31) // TILE_KEYS  # of a request: lengths are int32


@dataclass(frozen=True, slots=True)
class Grid:
    """What the host decides for a launch; everything that depends on lengths is left to the device."""

    rows: int  # query rows of a tile, one of ROW_TILES
    row_groups: int  # CTAs of a lane
    passes: int  # passes over a request; passes * row_groups row tiles cover all rows
    lanes: int
    own_tiles: bool = False  # each warpgroup of a CTA has key tiles of its own, rather than dims of all
    chunks_ahead: int = CHUNKS_AHEAD  # of the next tile that are multiplied before this one ends, where they share

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
    the full tensor rate. Each SM holds one CTA (shared memory is full), so there are at most `sm_count`. On few SMs
    (an H20, or a part of the SMs of a larger GPU), and where several row tiles share what is loaded, the tensor cores,
    not the memory, are what a call waits for. Then it pays that the warpgroups wait less for each other: where there
    are registers for it they have key tiles of their own, otherwise they multiply more chunks ahead. That takes room
    from what is being loaded, of which the queries of 64 rows leave little. With fewer rows it is memory that a call
    waits for: no more is multiplied ahead than has arrived when the tile before is to go on.
    """
    if rows < 1 or sm_count < 1:
        raise ValueError(f"rows and sm_count must be positive, got {rows} and {sm_count}")
    tile = next((t for t in ROW_TILES if t >= rows), ROW_TILES[-1])
    row_tiles = -(-rows // tile)
    limit = min(MAX_ROW_GROUPS, sm_count)
    passes = -(-row_tiles // limit)
    row_groups = -(-row_tiles // passes)
    scarce = sm_count <= SCARCE_SMS
    own_tiles = scarce and tile <= OWN_TILES_ROWS
    chunks_ahead = CHUNKS_AHEAD if tile < ROW_TILES[-1] else CHUNKS_AHEAD_64_ROWS[row_groups > 1 or scarce]
    return Grid(tile, row_groups, passes, max(1, sm_count // row_groups), own_tiles, chunks_ahead)


def unit_tiles(seqlen: int) -> int:
    """Key tiles that the division charges for a request of `seqlen` tokens."""
    return max(1, -(-seqlen // TILE_KEYS))


def divide(seqlens: Sequence[int], grid: Grid, may_be_even: bool = True) -> list[list[Segment]]:
    """Divide the key tiles of all units over the lanes of `grid`; the mirror of the kernel's division.

    Evenly: every unit gets the same number of lanes, every lane at most one segment; with more units than lanes every
    lane gets the same number of units. That is best for requests of about the same length. Otherwise all units stand in
    a row in the order (request, pass), SWITCH_TILES empty cells before each to pay for the switch, and every lane gets
    the same number of cells. The even division is taken if it `may_be_even` and leaves no more to the busiest lane than
    the other, or a tile more if it uses nearly all lanes (`even_slack`); if it leaves every unit whole, so that nothing
    has to be merged, an eighth more, with one unit a lane at most WHOLE_SLACK tiles. Returns one list of segments a
    lane.
    """
    units = [(r, p, unit_tiles(n)) for r, n in enumerate(seqlens) for p in range(grid.passes)]
    if not units:
        return [[] for _ in range(grid.lanes)]
    total = sum(n for _, _, n in units)
    longest = max(n for _, _, n in units)
    gap = SWITCH_TILES if total > grid.lanes else 0
    cells = total + gap * len(units)
    share, stack = grid.lanes // len(units), -(-len(units) // grid.lanes)
    in_a_row = -(-cells // grid.lanes)
    evenly = -(-longest // share) if share else stack * (longest + gap)
    slack = min(in_a_row >> EVEN_SLACK_LOG2, WHOLE_SLACK if share else in_a_row)
    if share > 1:
        slack = even_slack(len(units), grid)
    if may_be_even and evenly <= in_a_row + slack:
        return _share_out(units, grid, share) if share else _stack(units, grid, stack)
    return _divide_in_a_row(units, grid, gap, cells)


def even_up_to(units: int, grid: Grid) -> int:
    """Tiles of a unit up to which `units` of one length are sure to be divided evenly; 0 if not even short ones are.

    Where `share` lanes have a unit of n tiles, that is n / share tiles a lane, and in a row it would be
    units * (n + SWITCH_TILES) / lanes, both rounded up. Where lanes have several units, both are multiples of
    n + SWITCH_TILES; half of the slack is left for what rounding does.
    """
    share, stack = grid.lanes // units, -(-units // grid.lanes)
    if share == 0:
        return MOST_TILES if stack * grid.lanes <= units + (units >> EVEN_SLACK_LOG2 + 1) else 0
    spare = grid.lanes - units * share
    allowed = SWITCH_TILES * units * share + even_slack(units, grid) * share * grid.lanes
    return min(MOST_TILES, allowed // spare) if spare else MOST_TILES


def even_lanes(units: int, grid: Grid) -> int:
    """How many lanes an even division of so many units uses, if they have no fewer tiles than lanes."""
    share, stack = grid.lanes // units, -(-units // grid.lanes)
    return units * share if share else -(-units // stack)


def even_slack(units: int, grid: Grid) -> int:
    """Tiles that the busiest of the lanes that share units may have more in the even division than in a row."""
    share = grid.lanes // units
    spare = grid.lanes - units * share
    return 1 if share > 1 and spare * FEW_SPARE <= grid.lanes else 0


def _share_out(units: list[tuple[int, int, int]], grid: Grid, share: int) -> list[list[Segment]]:
    work: list[list[Segment]] = [[] for _ in range(grid.lanes)]
    for index, (request, pass_index, tiles) in enumerate(units):
        first, members = index * share, min(share, tiles)
        for member in range(members):
            begin, end = lane_begin(member, tiles, members), lane_begin(member + 1, tiles, members)
            work[first + member] = [Segment(request, pass_index, begin, end, first, first + members - 1)]
    return work


def _stack(units: list[tuple[int, int, int]], grid: Grid, stack: int) -> list[list[Segment]]:
    work: list[list[Segment]] = [[] for _ in range(grid.lanes)]
    for index, (request, pass_index, tiles) in enumerate(units):
        lane = index // stack
        work[lane].append(Segment(request, pass_index, 0, tiles, lane, lane))
    return work


def _divide_in_a_row(units: list[tuple[int, int, int]], grid: Grid, gap: int, cells: int) -> list[list[Segment]]:
    lanes = min(grid.lanes, cells)
    work: list[list[Segment]] = [[] for _ in range(grid.lanes)]
    start = gap  # cell of the unit's first tile
    for request, pass_index, tiles in units:
        first = lane_of(start, cells, lanes)
        last = lane_of(start + tiles - 1, cells, lanes)
        for lane in range(first, last + 1):
            begin = max(start, lane_begin(lane, cells, lanes)) - start
            end = min(start + tiles, lane_begin(lane + 1, cells, lanes)) - start
            work[lane].append(Segment(request, pass_index, begin, end, first, last))
        start += tiles + gap
    return work


def lane_begin(lane: int, total: int, lanes: int) -> int:
    """The first of the `total` tiles or cells that belongs to a lane."""
    return lane * (total // lanes) + min(lane, total % lanes)


def lane_of(index: int, total: int, lanes: int) -> int:
    """The lane that owns tile or cell `index` of `total`."""
    base, extra = divmod(total, lanes)
    wide = extra * (base + 1)  # those of the lanes that have one more
    return index // (base + 1) if index < wide else extra + (index - wide) // base
