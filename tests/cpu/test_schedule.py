"""The division of work: every tile once, no lane with more than its share, and every lane knows who shares its unit."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from etap_rt.decode import CHUNK_DIMS
from etap_rt.kernels import DIMS
from etap_rt.schedule import (
    MAX_ROW_GROUPS,
    MOST_TILES,
    ROW_TILES,
    SWITCH_TILES,
    TILE_KEYS,
    WHOLE_SLACK,
    Grid,
    Segment,
    divide,
    even_lanes,
    even_slack,
    even_up_to,
    lane_begin,
    lane_of,
    plan_grid,
    unit_tiles,
)
from tests.cases import CASES, RAGGED_CASES, Case

lengths_of_a_batch = st.lists(st.one_of(st.integers(0, 200), st.integers(0, 20_000)), max_size=40)
grids = st.builds(Grid, st.sampled_from(ROW_TILES), st.integers(1, 8), st.integers(1, 4), st.integers(1, 140))
H200 = Grid(rows=16, row_groups=1, passes=1, lanes=132)


def tiles_of(segments: list[Segment]) -> int:
    return sum(segment.tile_end - segment.tile_begin for segment in segments)


def cells_of_a_lane(lengths: list[int], grid: Grid) -> int:
    """What the busiest lane gets when the units stand in a row: tiles, and SWITCH_TILES for each further unit."""
    tiles = sum(map(unit_tiles, lengths)) * grid.passes
    gaps = SWITCH_TILES * len(lengths) * grid.passes if tiles > grid.lanes else 0
    return -(-(tiles + gaps) // grid.lanes)


def cells_of_a_lane_evenly(lengths: list[int], grid: Grid) -> int:
    """What the busiest lane gets when each unit has equally many lanes, or each lane equally many units."""
    units, longest = len(lengths) * grid.passes, max(map(unit_tiles, lengths))
    if units <= grid.lanes:
        return -(-longest // (grid.lanes // units))
    return -(-units // grid.lanes) * (longest + SWITCH_TILES)


def tiles_more_evenly(in_a_row: int, units: int, grid: Grid) -> int:
    """How much more the even division may leave to the busiest lane, which has `in_a_row` otherwise."""
    lanes_of_a_unit = grid.lanes // units
    if lanes_of_a_unit > 1:
        return even_slack(units, grid)
    return min(in_a_row // 8, WHOLE_SLACK) if lanes_of_a_unit else in_a_row // 8


@given(lengths_of_a_batch, grids)
@example([], H200)
@example([0], H200)
@example([64 * 132], H200)
@example([64 * 132 + 1], H200)
@example([0] * 500, H200)
@example([0] * 132, H200)
@example([4096] * 16, H200)
@example([64_000] * 16, H200)
@example([64_000] * 15 + [0], H200)
def test_every_tile_of_every_unit_is_computed_exactly_once(lengths: list[int], grid: Grid) -> None:
    tiles = defaultdict(list)
    for lane in divide(lengths, grid):
        for segment in lane:
            assert segment.tile_begin < segment.tile_end
            tiles[segment.request, segment.pass_index] += range(segment.tile_begin, segment.tile_end)
    assert tiles == {
        (request, pass_index): list(range(unit_tiles(length)))
        for request, length in enumerate(lengths)
        for pass_index in range(grid.passes)
    }


@given(lengths_of_a_batch.filter(bool), grids)
@example([4096] * 16, H200)
@example([64_000] * 16, H200)
@example([64_000] * 15 + [0], H200)
def test_no_lane_has_more_than_an_eighth_or_a_tile_more_than_its_part(lengths: list[int], grid: Grid) -> None:
    work = divide(lengths, grid)
    assert len(work) == grid.lanes
    in_a_row = cells_of_a_lane(lengths, grid)
    accepted = in_a_row + max(1, in_a_row // 8)
    gap = SWITCH_TILES if sum(map(tiles_of, work)) > grid.lanes else 0
    for segments in work:
        assert tiles_of(segments) + gap * max(0, len(segments) - 1) <= accepted


@given(lengths_of_a_batch.filter(bool), grids)
@example([4096] * 16, H200)
@example([64_000] * 16, H200)
@example([8192] * 128, Grid(rows=64, row_groups=2, passes=1, lanes=66))
@example([8192] * 40, H200)
@example([8192] * 120, H200)
@example([2048] * 120, H200)
def test_no_unit_is_divided_at_any_place_where_the_even_division_costs_little(lengths: list[int], grid: Grid) -> None:
    in_a_row = cells_of_a_lane(lengths, grid)
    accepted = in_a_row + tiles_more_evenly(in_a_row, len(lengths) * grid.passes, grid)
    if cells_of_a_lane_evenly(lengths, grid) > accepted:
        return
    for segments in divide(lengths, grid):
        assert len(segments) <= 1 or all(segment.first_lane == segment.last_lane for segment in segments)


@given(st.integers(1, 400), st.integers(1, 3000), grids)
@example(16, 128, H200)
@example(130, 1, H200)
@example(128, 1, Grid(rows=64, row_groups=2, passes=1, lanes=66))
def test_units_of_one_length_are_divided_evenly_as_far_as_is_said(requests: int, tiles: int, grid: Grid) -> None:
    """What the kernel's head start counts on."""
    lengths = [min(tiles, even_up_to(requests * grid.passes, grid)) * TILE_KEYS] * requests
    if not lengths[0]:
        return
    in_a_row = cells_of_a_lane(lengths, grid)
    accepted = in_a_row + tiles_more_evenly(in_a_row, requests * grid.passes, grid)
    assert cells_of_a_lane_evenly(lengths, grid) <= accepted


@pytest.mark.parametrize(
    ("units", "grid", "tiles"),
    [
        (1, H200, MOST_TILES),
        (16, H200, 392),
        (24, H200, 40),
        (32, H200, 260),
        (128, H200, 128),
        (132, H200, MOST_TILES),
        (133, H200, 0),
        (128, Grid(rows=64, row_groups=2, passes=1, lanes=66), MOST_TILES),
    ],
    ids=str,
)
def test_how_far_units_of_one_length_are_sure_to_be_divided_evenly(units: int, grid: Grid, tiles: int) -> None:
    """40 tiles of 24 units are 8 for each of 5 lanes, and 24 * (40 + 4) cells in a row are 8 for each of 132.

    392 tiles of 16 units are 49 for each of 8 lanes, and 16 * (392 + 4) cells in a row are 48, of which a tile more is
    accepted.
    """
    assert even_up_to(units, grid) == tiles


@pytest.mark.parametrize(("requests", "tiles"), [(16, 392), (16, 512), (32, 260)])
def test_a_tile_more_is_accepted_where_nearly_all_lanes_have_work(requests: int, tiles: int) -> None:
    lengths = [tiles * TILE_KEYS] * requests
    assert cells_of_a_lane_evenly(lengths, H200) == cells_of_a_lane(lengths, H200) + 1
    assert sum(map(bool, divide(lengths, H200))) == 128


@given(st.integers(1, 500), grids)
@example(16, H200)
@example(128, H200)
@example(1, H200)
@example(133, H200)
def test_the_lanes_of_an_even_division_are_the_first_ones(requests: int, grid: Grid) -> None:
    lengths = [grid.lanes * TILE_KEYS] * requests
    evenly = cells_of_a_lane_evenly(lengths, grid)
    in_a_row = cells_of_a_lane(lengths, grid)
    if evenly > in_a_row + tiles_more_evenly(in_a_row, requests * grid.passes, grid):
        return
    used = [lane for lane, segments in enumerate(divide(lengths, grid)) if segments]
    assert used == list(range(even_lanes(requests * grid.passes, grid)))


def test_requests_of_one_length_get_the_same_lanes_each() -> None:
    """16 requests of 64 tiles on 132 lanes: 8 lanes of 8 tiles for each, 4 lanes idle."""
    work = divide([4096] * 16, H200)
    assert [tiles_of(segments) for segments in work] == [8] * 128 + [0] * 4
    assert [segments[0].first_lane for segments in work[:128]] == [lane // 8 * 8 for lane in range(128)]


def test_lanes_that_would_be_left_over_are_worth_a_change_of_units() -> None:
    """28 requests of 1000 tiles on 132 lanes: 213 for each lane, where 4 lanes a request would have 250."""
    work = divide([64_000] * 28, H200)
    assert max(map(tiles_of, work)) == 213
    assert all(work)


def test_all_lanes_are_used_where_that_gives_each_less() -> None:
    """16 requests of 1000 tiles on 132 lanes: 122 at most on all of them, where 8 lanes a request would have 125."""
    work = divide([64_000] * 16, H200)
    assert max(map(tiles_of, work)) == 122
    assert all(work)


def test_lanes_are_left_over_rather_than_merge_units_that_one_lane_could_have() -> None:
    """120 requests of 32 tiles: one on each of 120 lanes, not 33 cells on all; of 128 tiles 120 cells, not 8 more."""
    assert [tiles_of(segments) for segments in divide([2048] * 120, H200)] == [32] * 120 + [0] * 12
    longer = divide([8192] * 120, H200)
    assert max(map(tiles_of, longer)) <= 120
    assert all(longer)


@pytest.mark.parametrize(
    "case", [case for case in (*CASES, *RAGGED_CASES) if "two-requests-a-lane" in case.name], ids=str
)
def test_cases_that_are_to_have_two_requests_a_lane_have_them(case: Case) -> None:
    queries = sum(case.queries) / len(case.queries) if case.queries else case.s_q
    loads = divide(case.lengths, plan_grid(round(queries * case.heads), H200.lanes))
    assert max(map(len, loads)) == 2
    assert all(segment.first_lane == segment.last_lane for segments in loads for segment in segments)


def test_with_more_units_than_lanes_a_lane_has_whole_units() -> None:
    """128 requests of 128 heads: two on each of 64 lanes."""
    work = divide([8192] * 128, Grid(rows=64, row_groups=2, passes=1, lanes=66))
    assert [[(s.request, s.tile_begin, s.tile_end) for s in segments] for segments in work] == [
        [(2 * lane, 0, 128), (2 * lane + 1, 0, 128)] for lane in range(64)
    ] + [[], []]


def test_a_long_request_gets_the_lanes_that_short_ones_do_not_need() -> None:
    work = divide([64_000, 0, 0, 0], H200)
    assert max(map(tiles_of, work)) == -(-(1003 + 4 * SWITCH_TILES) // 132)
    assert sum(segments[0].request == 0 for segments in work if segments) > 120


def test_with_fewer_tiles_than_lanes_every_tile_has_a_lane_of_its_own() -> None:
    work = divide([64 * 100, 0, 0], H200)
    assert sorted(map(tiles_of, work)) == [0] * 30 + [1] * 102


@given(lengths_of_a_batch, grids)
def test_segments_name_the_lanes_that_share_their_unit(lengths: list[int], grid: Grid) -> None:
    sharing = defaultdict(list)
    segments = []
    for lane, own in enumerate(divide(lengths, grid)):
        for segment in own:
            sharing[segment.request, segment.pass_index].append(lane)
            segments.append(segment)
    for segment in segments:
        lanes = sharing[segment.request, segment.pass_index]
        assert segment.tile_begin < segment.tile_end
        assert lanes == list(range(segment.first_lane, segment.last_lane + 1))


@given(lengths_of_a_batch, grids)
def test_a_lane_shares_only_its_first_and_its_last_segment(lengths: list[int], grid: Grid) -> None:
    """So two partial results are all that a lane may have to leave behind."""
    for lane, own in enumerate(divide(lengths, grid)):
        for segment in own[1:-1]:
            assert segment.first_lane == segment.last_lane == lane
        assert [(s.request, s.pass_index) for s in own] == sorted({(s.request, s.pass_index) for s in own})


@given(lengths_of_a_batch.filter(bool), grids)
@example([64_000] * 16, H200)
@example([8192] * 24, H200)
@example([0] * 200, H200)
def test_a_shared_unit_is_merged_by_those_of_its_lanes_that_end_with_it(lengths: list[int], grid: Grid) -> None:
    """What the kernel's shared_unit counts on, and its formula for whether the last of them goes on to another unit.

    So there is always somebody to merge, and nobody has more than one unit to merge.
    """
    work = divide(lengths, grid, may_be_even=False)
    total = sum(map(tiles_of, work))
    gap = SWITCH_TILES if total > grid.lanes else 0
    cells = total + gap * len(lengths) * grid.passes
    lanes = min(grid.lanes, cells)
    end = 0  # cell after the unit's last tile
    for request, length in enumerate(lengths):
        for pass_index in range(grid.passes):
            unit = request, pass_index
            end += gap + unit_tiles(length)
            members = [lane for lane, own in enumerate(work) if unit in {(s.request, s.pass_index) for s in own}]
            mergers = [lane for lane in members if (work[lane][-1].request, work[lane][-1].pass_index) == unit]
            goes_on = lane_begin(members[-1] + 1, cells, lanes) > end + gap
            assert mergers == (members[:-1] if goes_on else members)
            assert mergers or len(members) == 1


@given(st.data())
def test_lane_of_is_the_inverse_of_lane_begin(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 2**31 - 1))
    lanes = data.draw(st.integers(1, min(total, 200)))
    lane = data.draw(st.integers(0, lanes - 1))
    begin, end = lane_begin(lane, total, lanes), lane_begin(lane + 1, total, lanes)
    tile = data.draw(st.integers(begin, end - 1))
    assert lane_of(begin, total, lanes) == lane_of(tile, total, lanes) == lane_of(end - 1, total, lanes) == lane
    assert lane_begin(0, total, lanes) == 0 and lane_begin(lanes, total, lanes) == total


@given(st.integers(1, 128 * 16), st.integers(1, 300))
def test_a_grid_covers_all_rows_and_never_exceeds_the_sms(rows: int, sm_count: int) -> None:
    grid = plan_grid(rows, sm_count)
    assert grid.rows in ROW_TILES
    row_tiles = -(-rows // grid.rows)
    assert grid.row_groups * grid.passes >= row_tiles
    assert grid.row_groups * (grid.passes - 1) < row_tiles, "no pass is without rows"
    assert 1 <= grid.row_groups <= MAX_ROW_GROUPS
    assert 1 <= grid.lanes and grid.ctas <= sm_count


@pytest.mark.parametrize(
    ("rows", "tile"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 24), (25, 32), (32, 32), (33, 64), (640, 64)]
)
def test_the_smallest_row_tile_that_holds_all_rows_is_taken(rows: int, tile: int) -> None:
    assert plan_grid(rows, 132).rows == tile


def test_up_to_a_tile_of_rows_every_sm_is_a_lane_of_its_own() -> None:
    assert plan_grid(16, 132) == H200


@pytest.mark.parametrize(("rows", "sm_count"), [(8, 80), (16, 32), (32, 78), (17, 1)])
def test_on_few_sms_each_warpgroup_has_tiles_of_its_own(rows: int, sm_count: int) -> None:
    assert plan_grid(rows, sm_count).own_tiles
    assert not plan_grid(rows, 132).own_tiles
    assert not plan_grid(rows + 32, sm_count).own_tiles, "registers for 32 rows at most"


@pytest.mark.parametrize(("rows", "sm_count"), [(16, 132), (32, 132), (65, 132), (128, 132), (64, 80)])
def test_where_room_is_scarcer_than_products_fewer_chunks_are_multiplied_ahead(rows: int, sm_count: int) -> None:
    smallest_tile = min(map(sum, DIMS)) // CHUNK_DIMS
    assert smallest_tile > plan_grid(rows, sm_count).chunks_ahead > plan_grid(64, 132).chunks_ahead > 0


@pytest.mark.parametrize(("length", "tiles"), [(0, 1), (1, 1), (TILE_KEYS, 1), (TILE_KEYS + 1, 2)])
def test_a_request_without_keys_still_has_a_tile_of_work(length: int, tiles: int) -> None:
    assert unit_tiles(length) == tiles


@pytest.mark.parametrize(("rows", "sm_count"), [(0, 132), (16, 0)])
def test_nonsense_is_refused(rows: int, sm_count: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plan_grid(rows, sm_count)
