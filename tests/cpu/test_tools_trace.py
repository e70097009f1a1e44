"""tools/trace.py on records that are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from etap_rt import UnsupportedError
from tests.tool_modules import ROOT, import_tool


def import_trace() -> ModuleType:
    """By its file: the name belongs to a module of Python's."""
    import_tool("pictures")
    spec = importlib.util.spec_from_file_location("etap_rt_tools_trace", ROOT / "tools" / "trace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


trace = import_trace()


def record(sms: int = 132) -> dict[str, Any]:
    """A CTA an SM; every fourth merges, the last has no tiles."""
    ctas = []
    for cta in range(sms):
        start = 1_000_000 + 7 * cta
        times = {"start": start, "first_tile": start + 900, "last_tile": start + 9000 + 10 * (cta % 5)}
        merge = times["last_tile"] + 400 if cta % 4 == 0 else None
        ctas.append({"cta": cta, "sm": (cta * 5) % sms, **times, "merge": merge, "end": start + 10_500})
    ctas[-1] |= {"first_tile": None, "last_tile": None, "merge": None}
    return {"gpu": "NVIDIA H200", "clock": "globaltimer ns", "call": "b=16, 4K", "ctas": ctas}


def test_times_are_relative_to_the_first_cta() -> None:
    timeline = trace.read_record(record())
    assert min(span.begin for span in timeline.spans) == 0
    assert timeline.end == 10_500 + 7 * 131
    assert timeline.title == "NVIDIA H200, b=16, 4K"
    assert timeline.sms == list(range(132))


def test_a_phase_lasts_until_the_next_mark_that_is_there() -> None:
    spans = [span for span in trace.read_record(record()).spans if span.cta in (0, 1, 131)]
    assert [(s.phase, s.end - s.begin) for s in spans if s.cta == 0] == [
        ("fill the pipeline", 900),
        ("tiles", 8100),
        ("hand over", 400),
        ("merge", 1100),
    ]
    assert [s.phase for s in spans if s.cta == 1] == ["fill the pipeline", "tiles", "hand over"]
    assert [(s.phase, s.end - s.begin) for s in spans if s.cta == 131] == [("fill the pipeline", 10_500)]


def test_the_chrome_trace_has_a_thread_for_every_sm() -> None:
    timeline = trace.read_record(record(sms=8))
    events = json.loads(json.dumps(trace.chrome_trace(timeline)))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {sm: f"SM {sm}" for sm in range(8)}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline.spans)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    first = next(event for event in spans if event["args"]["cta"] == 0 and event["name"] == "tiles")
    assert (first["ts"], first["dur"]) == (0.9, 8.1)


def test_pictures_and_traces_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "record.json").write_text(json.dumps(record()))
    picture, chrome = tmp_path / "timeline.png", tmp_path / "chrome.json"
    arguments = [str(tmp_path / "record.json"), "--picture", str(picture), "--chrome", str(chrome)]
    assert trace.main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(chrome.read_text())["traceEvents"]
    text = capsys.readouterr().out
    assert "132 CTAs on 132 SMs" in text
    assert "merge: median 1.08 us" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctas": []}, "no list `ctas`"),
        ({"ctas": [{"cta": 0, "sm": 1, "start": 5}]}, r"ctas\[0\] needs whole numbers"),
        ({"ctas": [{"cta": 0, "sm": 1, "start": 5, "end": 4}]}, r"ctas\[0\]: `end` \(4\) is before `start` \(5\)"),
    ],
)
def test_a_broken_record_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(trace.RecordError, match=message):
        trace.read_record(record() | change)


def test_a_call_is_recorded_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(trace, "take", lambda batch, tokens: asked.append((batch, tokens)) or record(sms=8))
    output = tmp_path / "record.json"
    assert trace.main(["--batch", "16", "--tokens", "4096", "--json", str(output)]) == 0
    assert asked == [(16, 4096)]
    assert json.loads(output.read_text()) == record(sms=8)
    assert trace.main([str(output)]) == 0
    assert "8 CTAs on 8 SMs" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_recorded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise UnsupportedError("no GPU is visible", "a GPU")

    monkeypatch.setattr(import_tool("gpu_check"), "describe_machine", no_gpu)
    assert trace.main(["--batch", "1", "--tokens", "64"]) == 2
    assert "cannot measure here: no GPU is visible" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--batch", "1"],
        ["a.json", "--batch", "1", "--tokens", "1"],
        ["a.json", "--json", "b.json"],
        ["a.json", "--batch", "1"],
    ],
)
def test_either_a_record_or_a_call(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        trace.main(arguments)


def test_a_file_that_is_no_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.json").write_text("{")
    assert trace.main([str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err
