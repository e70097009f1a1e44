"""Draw when each CTA of a decode call did what: one lane an SM.

    python tools/trace.py RECORD [--picture FILE.png] [--chrome FILE.json]

The record is what a kernel built for tracing writes down (JSON):

    {"gpu": "NVIDIA H200", "clock": "globaltimer ns", "call": "b=16, 4K",
     "ctas": [{"cta": 0, "sm": 5, "start": 0, "first_tile": 900, "last_tile": 8000, "merge": 8300, "end": 9500}, ...]}

with times in ns of one clock: the CTA began; its first tile had arrived; its last tile was computed; it began to merge
what others had left, null if it merges nothing; it ended. `call` is optional. A CTA without tiles has null for both
tiles. The Chrome trace opens in chrome://tracing and ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pictures

NS_PER_US = 1000
LANE_INCHES, LEAST_INCHES = 0.06, 3.0
# What a CTA does from one mark to the next that is there, by the mark at the beginning.
PHASES = {"start": "fill the pipeline", "first_tile": "tiles", "last_tile": "hand over", "merge": "merge"}
MARKS = (*PHASES, "end")
REQUIRED_MARKS = ("start", "end")
COLORS = {"fill the pipeline": "#c7c7c7", "tiles": "#1f77b4", "hand over": "#ff9f43", "merge": "#d62728"}


class RecordError(ValueError):
    """A record is not what `read_record` expects; says where."""


@dataclass(frozen=True)
class Span:
    """What a CTA did from `begin` to `end`, in ns since the first CTA's start."""

    cta: int
    sm: int
    phase: str
    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """All spans of a call, by SM and time."""

    title: str
    spans: tuple[Span, ...]

    @property
    def sms(self) -> list[int]:
        return sorted({span.sm for span in self.spans})

    @property
    def end(self) -> int:
        return max(span.end for span in self.spans)

    def phase_ns(self) -> dict[str, list[int]]:
        """How long each phase took, by phase."""
        times: dict[str, list[int]] = {phase: [] for phase in PHASES.values()}
        for span in self.spans:
            times[span.phase].append(span.end - span.begin)
        return {phase: found for phase, found in times.items() if found}


def read_record(record: Mapping[str, Any]) -> Timeline:
    """The timeline of a record. Raises RecordError where something is missing or runs backwards."""
    ctas = record.get("ctas")
    if not isinstance(ctas, list) or not ctas:
        raise RecordError("the record has no list `ctas`, or an empty one")
    marks = [_marks_of(cta, index) for index, cta in enumerate(ctas)]
    origin = min(times["start"] for times in marks)
    spans = []
    for cta, times in zip(ctas, marks):
        for mark, following in pairwise(times):
            spans.append(Span(cta["cta"], cta["sm"], PHASES[mark], times[mark] - origin, times[following] - origin))
    title = ", ".join(filter(None, (record.get("gpu", "unknown GPU"), record.get("call"))))
    return Timeline(title, tuple(sorted(spans, key=lambda span: (span.sm, span.begin, span.end))))


def _marks_of(cta: Any, index: int) -> dict[str, int]:
    """The marks that a CTA has, in order."""
    where = f"ctas[{index}]"
    if not isinstance(cta, dict) or not all(isinstance(cta.get(name), int) for name in ("cta", "sm", *REQUIRED_MARKS)):
        raise RecordError(f"{where} needs whole numbers `cta`, `sm`, `start` and `end`")
    times = {mark: cta[mark] for mark in MARKS if cta.get(mark) is not None}
    for (mark, time), (following, later) in pairwise(times.items()):
        if later < time:
            raise RecordError(f"{where}: `{following}` ({later}) is before `{mark}` ({time})")
    return times


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline in Chrome's trace event format: a thread an SM, times in us."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": timeline.title}},
        *({"ph": "M", "name": "thread_name", "pid": 0, "tid": sm, "args": {"name": f"SM {sm}"}} for sm in timeline.sms),
    ]
    events += [
        {
            "ph": "X",
            "name": span.phase,
            "pid": 0,
            "tid": span.sm,
            "ts": span.begin / NS_PER_US,
            "dur": (span.end - span.begin) / NS_PER_US,
            "args": {"cta": span.cta},
        }
        for span in timeline.spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def draw(timeline: Timeline, path: Path) -> None:
    """The timeline as a picture: a lane an SM from top to bottom, CTAs of one SM over each other."""
    lane_of = {sm: lane for lane, sm in enumerate(timeline.sms)}
    height = max(LEAST_INCHES, LANE_INCHES * len(lane_of) + 1)
    with pictures.figure(path, timeline.title, height=height, width=8.5) as (axes,):
        draw_lanes(axes, timeline.spans, lane_of)
        axes.set_ylim(len(lane_of) - 0.5, -0.5)
        axes.set_yticks(range(0, len(lane_of), max(1, len(lane_of) // 12)))
        axes.set_yticklabels([str(sm) for sm in timeline.sms][:: max(1, len(lane_of) // 12)])
        axes.set_ylabel("SM")
        axes.set_xlabel("us since the first CTA began")
        axes.set_xlim(0, timeline.end / NS_PER_US)
        axes.grid(visible=False)


def draw_lanes(axes: Any, spans: Iterable[Span], lane_of: Mapping[int, int]) -> None:
    """Bars of all spans, each in its SM's lane, and a legend of the phases."""
    by_phase: dict[str, list[Span]] = {}
    for span in spans:
        by_phase.setdefault(span.phase, []).append(span)
    for phase in PHASES.values():
        found = by_phase.get(phase)
        if found:
            axes.barh(
                [lane_of[span.sm] for span in found],
                [(span.end - span.begin) / NS_PER_US for span in found],
                left=[span.begin / NS_PER_US for span in found],
                height=0.9,
                color=COLORS[phase],
                label=phase,
            )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(by_phase))


def summary(timeline: Timeline) -> list[str]:
    """Lines that say how long the phases took."""
    ctas = len({span.cta for span in timeline.spans})
    lines = [f"{timeline.title}: {ctas} CTAs on {len(timeline.sms)} SMs, {timeline.end / NS_PER_US:.2f} us"]
    for phase, times in timeline.phase_ns().items():
        low, middle, high = (value / NS_PER_US for value in (min(times), statistics.median(times), max(times)))
        lines.append(f"  {phase}: median {middle:.2f} us, {low:.2f} to {high:.2f}, {len(times)} CTAs")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("record", type=Path, metavar="RECORD", help="JSON, see the top of this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the timeline there")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write a Chrome trace there")
    options = parser.parse_args(arguments)
    try:
        timeline = read_record(json.loads(options.record.read_text()))
    except (OSError, ValueError) as error:
        print(f"{options.record}: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary(timeline)))
    if options.picture:
        draw(timeline, options.picture)
        print(f"wrote {options.picture}")
    if options.chrome:
        options.chrome.write_text(json.dumps(chrome_trace(timeline)) + "\n")
        print(f"wrote {options.chrome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
