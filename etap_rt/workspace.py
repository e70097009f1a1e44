"""Scratch memory of the decode kernel: partial results of divided units, and the counters where lanes meet.

Calls on one stream follow each other and share one workspace; every stream has its own. A captured graph may be
replayed on any stream beside other work, so each capture gets its own as well. Counters are zero between
launches: the kernel leaves them as it found them.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from etap_rt import driver, interop
from etap_rt.arguments import Problem
from etap_rt.interop import Array
from etap_rt.schedule import ROW_TILES, Grid

FLOAT_BYTES = 4
COUNTER_BYTES = 3 * 4  # of a CTA: arrivals, departures, gave up
SEGMENTS = 2  # a lane leaves at most two partial results: of the unit it starts in, of the unit it does not finish
LATENT_DIM = 512  # the larger of the two that are supported
SMALL_ROWS = 16  # streams that only ever see small row tiles need a quarter of the memory
ALIGNMENT = 256


class Workspace(NamedTuple):
    """Addresses on the device."""

    counters: int
    partial_stats: int
    partials: int


_lock = threading.Lock()
_workspaces: dict[tuple[int, int, int, int], Workspace] = {}


def workspace_for(problem: Problem, grid: Grid, stream: int, like: Array) -> Workspace:
    """The workspace of a launch on `stream`; `like` is an array of the caller's library on the device.

    At most 35 MB a stream on a GPU of 132 SMs, whatever the batch and the lengths.
    """
    capture = driver.capturing(stream)
    rows = SMALL_ROWS if grid.rows <= SMALL_ROWS else ROW_TILES[-1]
    key = (problem.device, stream, rows, capture)
    workspace = _workspaces.get(key)
    if workspace is None:
        with _lock:
            workspace = _workspaces.get(key)
            if workspace is None:
                workspace = _workspaces[key] = _make(problem.device, rows)
    return workspace


def _make(device: int, rows: int) -> Workspace:
    ctas = driver.sm_count(device)
    counters = _aligned(ctas * COUNTER_BYTES)
    stats = _aligned(ctas * SEGMENTS * rows * 2 * FLOAT_BYTES)
    partials = ctas * SEGMENTS * rows * LATENT_DIM * FLOAT_BYTES
    base = driver.allocate_zeroed(device, counters + stats + partials)
    return Workspace(base, base + counters, base + counters + stats)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
