"""Scratch memory of the decode kernel: partial results of divided units, and the counters where lanes meet.

Calls on one stream follow each other and share one workspace; every stream has its own. A captured graph may be
replayed on any stream beside other work, so each capture has its own as well: torch's captures take theirs from
the graph's memory pool, where it costs nothing beside other temporaries and goes when the graph goes. Counters
are zero between launches: the kernel leaves them as it found them.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

from etap_rt import driver, interop
from etap_rt.interop import Layout
from etap_rt.schedule import ROW_TILES

FLOAT_BYTES = 4
COUNTER_BYTES = 32 * 4  # of a CTA, see mla_decode.cu
SEGMENTS = 2  # a lane leaves at most two partial results: of the unit it starts in, of the unit it does not finish
LATENT_DIM = 512  # the larger of the two that are supported
WARPS = 8  # that compute, each with a scale for its part of a partial result
SMALL_ROWS = 16  # streams that only ever see small row tiles need a quarter of the memory
ALIGNMENT = 256


class Workspace(NamedTuple):
    """Addresses on the device, and what has to stay alive until the launch is made."""

    counters: int
    partial_stats: int
    partials: int
    owner: Any = None


_lock = threading.Lock()
_counters: dict[tuple[int, Hashable, int], int] = {}
_workspaces: dict[tuple[int, Hashable, int, int], Workspace] = {}


def workspace_for(like: Layout, owner: Any, rows: int, stream: Hashable, capture: int) -> Workspace:
    """The workspace of a launch with `rows` rows a tile on the stream of this identity, see `driver.stream_state`.

    `owner` is an array of the caller's library on the device, `like` its layout. `capture` is the id of the capture
    that the stream is part of; without one, 0, the workspace is the same every time.

    On a GPU of 132 SMs 9 MB a stream, and another 35 MB once it has seen more than 16 rows a tile, whatever the
    batch and the lengths.
    """
    device = like.device
    rows = SMALL_ROWS if rows <= SMALL_ROWS else ROW_TILES[-1]
    key = (device, stream, rows, capture)
    workspace = _workspaces.get(key)
    if workspace is not None:
        return workspace
    with _lock:
        counters = _counters.get((device, stream, capture))
        if counters is None:
            counters = driver.allocate_zeroed(device, driver.sm_count(device) * COUNTER_BYTES)
            _counters[device, stream, capture] = counters
        workspace = _workspaces.get(key)
        if workspace is None:
            stats, total = _sizes(device, rows)
            if capture and like.library == "torch":
                memory = interop.empty(like, owner, (total,), "uint8")
                base = interop.describe(memory, "workspace").pointer
                return Workspace(counters, base, base + stats, memory)
            base = driver.allocate_zeroed(device, total)
            workspace = _workspaces[key] = Workspace(counters, base, base + stats)
    return workspace


def _sizes(device: int, rows: int) -> tuple[int, int]:
    """Bytes of the statistics, which come first, and of all."""
    slots = driver.sm_count(device) * SEGMENTS
    stats = -(-slots * (rows * 2 + WARPS) * FLOAT_BYTES // ALIGNMENT) * ALIGNMENT
    return stats, stats + slots * rows * LATENT_DIM * FLOAT_BYTES
