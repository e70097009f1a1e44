"""tools/bench.py, as far as it goes without a GPU: what is measured, and what is done with result files."""

from __future__ import annotations

import copy
import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etap_rt import UnsupportedError
from tests.tool_modules import import_tool

bench = import_tool("bench")


def results_of(us: float = 20.0, noise_us: float = 0.1, floor_us: float = 10.0) -> dict[str, Any]:
    """A result file in which every cell took as long in both rounds, but for the noise."""
    entries = {}
    for cell in bench.all_cells():
        floor = [] if cell.group in bench.HOST_GROUPS else [floor_us]
        entries[cell.name] = bench.entry_of(
            cell, [bench.Samples([us + d], floor) for d in (-noise_us / 2, noise_us / 2)]
        )
    return {
        "date": "2026-11-23T12:00:00+00:00",
        "sources_sha256": "0123456789abcdef",
        "gpu": "NVIDIA H200",
        "sms": 132,
        "driver": "580.95",
        "versions": {"nvrtc": "13.0"},
        "samples": 1,
        "rounds": 2,
        "cells": entries,
        "seconds": 1.0,
    }


def write(path: Path, results: dict[str, Any]) -> str:
    path.write_text(json.dumps(results))
    return str(path)


def compare(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> int:
    status: int = bench.main(["--compare", write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)])
    return status


def cells(group: str) -> list[Any]:
    return [cell for cell in bench.all_cells() if cell.group == group]


def test_every_length_is_measured_at_every_batch() -> None:
    tokens = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    measured = [cell.lengths for cell in cells("lengths")]
    assert measured == [(n,) * batch for batch in (1, 16, 32) for n in tokens]
    assert [cell.lengths for cell in cells("fp16")] == [(n,) * 16 for n in tokens]
    for cell in cells("lengths") + cells("fp16"):
        assert (cell.heads, cell.s_q) == (16, 1)
        assert cell.dtype == ("float16" if cell.group == "fp16" else "bfloat16")


def test_heads_queries_and_mixed_lengths_are_measured() -> None:
    assert [(cell.lengths, cell.heads) for cell in cells("heads")] == [((4096,) * 128, h) for h in (8, 16, 32, 64)]
    assert [(cell.lengths, cell.s_q) for cell in cells("queries")] == [((8192,) * 32, s_q) for s_q in (1, 2, 4)]
    (compute,) = cells("compute")
    assert (compute.lengths, compute.heads) == ((8192,) * 128, 128)
    mixed = [cell.lengths for cell in cells("mixed")]
    assert len(set(mixed)) == 3
    for lengths in mixed:
        assert len(lengths) == 32
        assert 128 <= min(lengths) < 1024 and 8192 < max(lengths) <= 32768
    assert [cell.calls_in_graph for cell in cells("graph")] == [1, 20]
    assert [cell.planned for cell in cells("host")] == [False, True]
    assert [cell.page_size for cell in cells("pages")] == [1, 16, 32]
    assert len(cells("compile")) == 1
    (scarce,) = cells("sms")
    assert (scarce.lengths, scarce.sms, str(scarce.target)) == ((16384,) * 16, 32, "1.30x")


def test_ragged_queries_are_held_against_as_many_in_equal_parts() -> None:
    (ragged,) = cells("ragged")
    assert set(ragged.queries) == {1, 2, 4}
    assert len(ragged.queries) == len(ragged.lengths)
    assert sum(ragged.queries) == ragged.s_q * len(ragged.lengths)
    assert ragged.baseline == "2 queries each"


def test_every_cell_names_its_baseline() -> None:
    named = {cell.group: cell.baseline for cell in bench.all_cells()}
    assert named == {
        **dict.fromkeys(("lengths", "fp16", "heads", "queries", "compute", "mixed", "sms", "graph"), "stream floor"),
        "ragged": "2 queries each",
        "pages": "page 64",
        "write": "copy of as many bytes",
        "host": "",
        "compile": "",
    }


def test_on_a_part_of_the_sms_there_are_no_targets_of_the_whole() -> None:
    part = bench.cells_on(48, bench.all_cells())
    assert {cell.sms for cell in part} == {48}
    assert {cell.target for cell in part} == {None}
    assert not {"host", "compile", "sms"} & {cell.group for cell in part}


class FakeTorch(SimpleNamespace):
    """torch.cuda as far as streams go; notes what happened."""

    def __init__(self) -> None:
        super().__init__(cuda=self, events=[], stream_now=0)

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def ExternalStream(self, handle: int) -> int:
        return handle

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=self.stream_now)

    @contextmanager
    def stream(self, handle: int) -> Iterator[None]:
        before, self.stream_now = self.stream_now, handle
        yield
        self.stream_now = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench without a GPU, whose streams on a part of the SMs have handles of 1000 + SMs; 30 SMs cannot be had."""

    def stream_on(sms: int, device: int) -> int:
        if sms == 30:
            raise UnsupportedError("no 30 SMs", "a multiple of 8")
        return 1000 + sms

    monkeypatch.setattr(bench.green_context, "stream_on", stream_on)
    monkeypatch.setattr(bench.driver, "sm_count", lambda device: 132)
    monkeypatch.setattr(bench.driver, "encode_tensor_map", lambda *arguments: bytes(128))
    fake = bench.Bench.__new__(bench.Bench)
    fake.torch, fake.device, fake.sms, fake.part_streams = FakeTorch(), 0, 132, {}
    fake.launches = []
    fake.floor_kernel = SimpleNamespace(launch=lambda *arguments: fake.launches.append((arguments[0], arguments[3])))
    return fake


def test_the_floor_runs_on_the_same_sms_as_the_call(gpu: Any) -> None:
    array = SimpleNamespace(data_ptr=lambda: 64, shape=(5, 64, 576))
    pages = type("Pages", (), {"data_ptr": lambda self: 64, "__len__": lambda self: 5})()
    problem = SimpleNamespace(page_order=pages, cache=array)
    with gpu.on_sms(32):
        gpu.floor_call(problem)()
    gpu.floor_call(problem)()
    with gpu.on_sms(0):
        gpu.floor_call(problem)()
    assert gpu.launches == [(32, 1032), (132, 0), (132, 0)]
    assert gpu.torch.events == ["synchronize"] * 2  # on the way in and out of the part


def test_an_error_on_a_part_of_the_sms_leaves_the_bench_as_it_was(gpu: Any) -> None:
    with pytest.raises(ZeroDivisionError), gpu.on_sms(32):
        _ = 1 / 0
    assert gpu.sms == 132


def test_cells_that_cannot_be_measured_are_named(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole, good, bad = (bench.Cell("sms", "b=1", str(sms), None, sms=sms) for sms in (0, 32, 30))
    assert gpu.possible([whole, good, bad]) == [whole, good]
    assert "b=1, 30 is skipped: no 30 SMs; needed: a multiple of 8" in capsys.readouterr().err


def test_cells_have_names_of_their_own_and_targets() -> None:
    everything = bench.all_cells()
    assert len({cell.name for cell in everything}) == len(everything)
    targets = {cell.name: str(cell.target) for cell in everything if cell.target}
    assert len(targets) == len(everything) - 1  # a graph of one call is there to be looked at
    assert targets["b=1, 8K"] == "1.90x"
    assert targets["b=16, 4K"] == targets["b=16 float16, 4K"] == "1.20x"
    assert targets["b=32, 64K"] == "1.03x"
    assert targets["b=128 8K, 128 heads"] == "480.0"
    assert targets["one kernel, cold compile"] == "3.00 s"


def test_work_is_counted_as_the_definition_has_it() -> None:
    (cell,) = cells("compute")
    assert cell.flop == 2 * 128 * 8192 * 128 * (576 + 512)
    two_queries = bench.Cell("", "", "", None, lengths=(65, 1), heads=3, s_q=2)
    assert two_queries.flop == 2 * (65 + 64 + 1 + 0) * 3 * (576 + 512)
    assert two_queries.pages == 3


def test_a_figure_is_the_median_and_its_noise_what_the_rounds_differ_by() -> None:
    rounds = [bench.Samples([5.0, 1.0, 2.0], [1.0]), bench.Samples([4.0, 3.0, 9.0], [1.0])]
    cell = bench.Cell("", "", "", bench.Target("ratio", 3.5), lengths=(64,))
    entry = bench.entry_of(cell, rounds)
    assert (entry["us"], entry["noise_us"], entry["ratio"], entry["met"]) == (3.5, 2.0, 3.5, True)
    assert entry["tb_per_s"] == pytest.approx(73728 / 3.5e6, abs=1e-3)
    missed = bench.Cell("", "", "", bench.Target("us", 3.4), lengths=(64,))
    assert bench.entry_of(missed, rounds)["met"] is False


def test_the_same_results_compare_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, results_of(), results_of()) == 0
    assert f"0 slower, 0 faster, {len(bench.all_cells())} within the noise" in capsys.readouterr().out


@pytest.mark.parametrize(("us", "status", "word"), [(21.0, 1, "slower"), (19.0, 0, "faster")])
def test_a_cell_that_moved_is_named(
    us: float, status: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = results_of(), results_of()
    new["cells"]["b=16, 4K"]["us"] = us
    assert compare(tmp_path, old, new) == status
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("b=16, 4K ")]
    assert re.search(rf"20\.0 +{us} +0\.2 +[+-]5\.0% +\+0\.0% +{word}$", line)


def test_a_move_within_the_noise_is_none(tmp_path: Path) -> None:
    noisy = results_of(noise_us=1.0)
    later = copy.deepcopy(noisy)
    later["cells"]["b=1, 512"]["us"] += 1.9
    assert compare(tmp_path, noisy, later) == 0
    later["cells"]["b=1, 512"]["us"] += 0.2
    assert compare(tmp_path, noisy, later) == 1


def test_rounds_that_agree_by_chance_do_not_make_a_regression(tmp_path: Path) -> None:
    old, new = results_of(noise_us=0), results_of(noise_us=0)
    new["cells"]["b=32, 8K"]["us"] *= 1.009
    new["cells"]["one kernel, cold compile"]["us"] *= 1.04
    assert compare(tmp_path, old, new) == 0


def test_other_machines_and_missing_cells_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = results_of(), results_of()
    new["gpu"] = "NVIDIA H100"
    del new["cells"]["b=1, 512"]
    assert compare(tmp_path, old, new) == 0
    printed = capsys.readouterr().out
    assert "different machines" in printed
    assert "only in old: b=1, 512" in printed


def test_markdown_has_every_cell_and_says_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--markdown", write(tmp_path / "results.json", results_of())]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H200 (132 SMs), driver 580.95, NVRTC 13.0, 2026-11-23, sources 0123456789ab.\n")
    assert "|  | 512 | 1K | 2K | 4K | 8K | 16K | 32K | 64K |" in printed
    for row in ("b=1", "b=16", "b=32", "b=16 float16"):
        assert f"| {row} {'| 20.0 (2.00) ' * 8}|" in printed
    for cell in bench.all_cells():
        assert cell.group in bench.TABLE_GROUPS or f"| {cell.name} | 20.0 |" in printed
    tables = re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE)
    assert [len({line.count("|") for line in table.splitlines()}) for table in tables] == [1, 1]


def test_results_on_a_part_of_the_sms_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = results_of() | {"sms_used": 32}
    assert bench.describe_run(part).startswith("NVIDIA H200 (32 of 132 SMs), driver")
    assert compare(tmp_path, results_of(), part) == 0
    assert "different machines" in capsys.readouterr().out


def test_markdown_of_a_part_leaves_the_rest_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of()
    results["cells"] = {"b=1, 2K": results["cells"]["b=1, 2K"]}
    bench.main(["--markdown", write(tmp_path / "results.json", results)])
    assert f"| b=1 |  |  | 20.0 (2.00) {'|  ' * 5}|\n" in capsys.readouterr().out


def test_results_are_shown_with_what_was_missed(capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_results(results_of(us=14.0))
    printed = capsys.readouterr().out
    assert re.search(r"^b=1, 512 +14\.0 +0\.1 +10\.0 +1\.400 +2\.00x +yes +0\.04 +", printed, re.MULTILINE)
    assert re.search(r"^b=32, 64K +14\.0 +0\.1 +10\.0 +1\.400 +1\.03x +NO +", printed, re.MULTILINE)
    assert re.search(r"\d+ of \d+ targets met", printed)


@pytest.mark.parametrize("text", [None, "not json", "[]", '{"passed": 3}'])
def test_what_is_no_result_file_is_refused(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--markdown", str(path)])
    assert stop.value.code == 2
    assert "other.json" in capsys.readouterr().err


def test_the_stream_floor_compiles() -> None:
    pytest.importorskip("cupy")
    cubin = bench.compile_floor()
    assert cubin.startswith(b"\x7fELF")
    assert b"stream_floor" in cubin
    assert ctypes.sizeof(bench.FloorParams) == 192
    source = bench.FLOOR_SOURCE.read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", source)}
    assert constants["STAGES"] * constants["CHUNKS"] * constants["CHUNK_BYTES"] == bench.FLOOR_SHARED_BYTES
