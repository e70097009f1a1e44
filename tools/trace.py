"""Draw when each CTA of a decode call did what: one lane an SM.

    python tools/trace.py RECORD [--picture FILE.png] [--chrome FILE.json]
    python tools/trace.py --batch N --tokens N [--json RECORD] [--picture FILE.png] [--chrome FILE.json]

The second form records a call of that many requests of that length on this machine's GPU (16 heads, one query token,
bfloat16, the L2 cache cleaned before it as in bench.py). The record is what `etap_rt.trace_decode` returns (JSON):

    {"gpu": "NVIDIA H200", "clock": "globaltimer ns", "call": "b=16, 4K", "machine": "driver 580.95, ...",
     "ctas": [{"cta": 0, "sm": 5, "start": 0, "first_tile": 900, "last_tile": 8000, "merge": 8300, "end": 9500}, ...]}

with times in ns of one clock: the CTA began; its first tile had arrived; its last tile was computed; it began to merge
what others had left, null if it merges nothing; it ended. `call` and `machine` are optional. A CTA without tiles has
null for both tiles. The Chrome trace opens in chrome://tracing and ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pictures
from bench import SOFTMAX_SCALE, Bench, Cell, Problem, describe_run, format_tokens, positive

from etap_rt import EtapError, trace_decode

NS_PER_US = 1000
LANE_INCHES, LEAST_INCHES = 0.045, 3.0
LANES_BETWEEN_TICKS = 16
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

    gpu: str
    call: str  # what was called; empty if unknown
    machine: str  # more about where and when; empty if unknown
    spans: tuple[Span, ...]

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.gpu, self.call)))

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
    gpu, call, machine = record.get("gpu", "unknown GPU"), record.get("call") or "", record.get("machine") or ""
    return Timeline(gpu, call, machine, tuple(sorted(spans, key=lambda span: (span.sm, span.begin, span.end))))


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
    title = f"What each SM does in a call: {timeline.call}" if timeline.call else "What each SM does in a call"
    with pictures.figure(path, title, timeline.machine or timeline.gpu, height=height, width=8.5) as (axes,):
        draw_lanes(axes, timeline.spans, lane_of)
        axes.set_ylim(len(lane_of) - 0.5, -0.5)
        axes.set_yticks(range(0, len(lane_of), LANES_BETWEEN_TICKS), timeline.sms[::LANES_BETWEEN_TICKS])
        axes.set_ylabel("SM")
        axes.set_xlabel("us since the first CTA began")
        axes.set_xlim(0, timeline.end / NS_PER_US)
        axes.grid(visible=False)


def draw_lanes(axes: Any, spans: Iterable[Span], lane_of: Mapping[int, int]) -> None:
    """Bars of all spans, each in its SM's lane, labelled by phase."""
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
                height=1,
                linewidth=0,
                color=COLORS[phase],
                label=phase,
            )


def summary(timeline: Timeline) -> list[str]:
    """Lines that say how long the phases took."""
    ctas = len({span.cta for span in timeline.spans})
    lines = [f"{timeline.title}: {ctas} CTAs on {len(timeline.sms)} SMs, {timeline.end / NS_PER_US:.2f} us"]
    for phase, times in timeline.phase_ns().items():
        low, middle, high = (value / NS_PER_US for value in (min(times), statistics.median(times), max(times)))
        lines.append(f"  {phase}: median {middle:.2f} us, {low:.2f} to {high:.2f}, {len(times)} CTAs")
    return lines


def take(batch: int, tokens: int) -> dict[str, Any]:
    """Record a call on this machine's GPU. Raises EtapError or ImportError where that cannot be done."""
    from gpu_check import describe_machine, hash_sources

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = describe_run({"date": now, "sources_sha256": hash_sources(), **describe_machine()})
    bench = Bench(samples=1)
    problem = Problem(Cell("trace", f"b={batch}", format_tokens(tokens), None, (tokens,) * batch), seed=0)
    arrays = (problem.q, problem.cache, problem.block_table, problem.cache_seqlens)
    trace_decode(*arrays, softmax_scale=SOFTMAX_SCALE)  # compiles and loads the kernel
    bench.clean_l2()
    record = trace_decode(*arrays, softmax_scale=SOFTMAX_SCALE, runs=1)
    return {**record, "call": f"b={batch}, {format_tokens(tokens)}", "machine": machine}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("record", type=Path, nargs="?", metavar="RECORD", help="JSON, see the top of this file")
    parser.add_argument("--batch", type=positive, metavar="N", help="record a call of N requests")
    parser.add_argument("--tokens", type=positive, metavar="N", help="of N tokens each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was recorded there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the timeline there")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write a Chrome trace there")
    options = parser.parse_args(arguments)
    call = (options.batch, options.tokens)
    recording = None not in call
    if (any(call) or options.json) and not recording or recording == bool(options.record):
        parser.error("give either a record, or --batch and --tokens (and --json)")
    try:
        record = take(options.batch, options.tokens) if recording else json.loads(options.record.read_text())
        timeline = read_record(record)
    except (EtapError, ImportError) as error:
        print(f"cannot measure here: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"{options.record}: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(record) + "\n")
        print(f"wrote {options.json}")
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
