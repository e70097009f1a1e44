"""tools/peer_bench.py and tools/peers, as far as they go without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import etap_rt
from tests.tool_modules import import_tool

peers = import_tool("peers")
peer_bench = import_tool("peer_bench")
plain_torch = import_tool("peers.plain_torch")
bench = import_tool("bench")


def inputs_of(lengths: tuple[int, ...], s_q: int = 1, heads: int = 4) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // 64) for length in lengths]
    pages = torch.randperm(sum(counts), generator=generator).int()
    return peers.Inputs(
        torch.randn(len(lengths), s_q, heads, 576, generator=generator).bfloat16(),
        torch.randn(sum(counts), 64, 576, generator=generator).bfloat16(),
        torch.nn.utils.rnn.pad_sequence(pages.split(counts), batch_first=True),
        torch.tensor(lengths, dtype=torch.int32),
        lengths,
        192**-0.5,
        torch.empty(len(lengths), s_q, heads, 512, dtype=torch.bfloat16),
    )


def decode(inputs: Any) -> Any:
    return etap_rt.mla_decode(
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
    )


class StandIn:
    """A peer that gives back what it is told to."""

    name = "stand-in"

    def __init__(self, result: Callable[[Any], Any]) -> None:
        self.result = result

    def available(self) -> str:
        return ""

    def version(self) -> str:
        return "stand-in 1.0"

    def prepare(self, inputs: Any) -> Callable[[], Any]:
        out = self.result(inputs)
        return lambda: out


def results() -> dict[str, Any]:
    """A result file with a peer that takes twice our time and one that takes no float16."""
    cells = {}
    for cell in peer_bench.all_cells():
        measured = peer_bench.Measured()
        measured.rounds = [
            {"etap_rt": [20.0 + d], "stream floor": [10.0], "FlashMLA": [40.0], "CuPy": [60.0]} for d in (0.0, 1.0)
        ]
        if cell.dtype == "float16":
            for samples in measured.rounds:
                del samples["CuPy"]
            measured.skipped = {"CuPy": "not today"}
        cells[cell.name] = peer_bench.entry_of(cell, measured)
    return {
        "date": "2026-11-23T12:00:00+00:00",
        "sources_sha256": "0123456789abcdef",
        "gpu": "NVIDIA H200",
        "sms": 132,
        "driver": "580.95",
        "versions": {"nvrtc": "13.0"},
        "samples": 1,
        "rounds": 2,
        "peers": {"FlashMLA": "flash_mla 1.0", "CuPy": "cupy 14"},
        "skipped_peers": {"FlashInfer fa3": "flashinfer.mla cannot be imported (ModuleNotFoundError: no)"},
        "cells": cells,
        "seconds": 1.0,
    }


def test_every_adapter_says_why_it_is_skipped_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "libraries", {})
    everybody = peers.all_peers()
    assert len({peer.name for peer in everybody}) == len(everybody) == len(peers.MODULES)
    found, missing = peer_bench.find_peers()
    assert not found
    assert all(missing[peer.name] for peer in everybody)


def test_a_library_is_found_where_the_command_line_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "libraries", {"_flashmla_C": tmp_path / "some.so"})
    monkeypatch.setattr(peers, "why_no_gpu", lambda: "")
    assert peers.library_version("_flashmla_C", "x.so") == "library some.so"
    assert "some.so cannot be loaded" in peers.why_no_library("_flashmla_C", "x.so", "--flashmla-so")
    assert peers.why_no_library("_other_C", "x.so", "--other") == "vLLM is not installed, and --other was not given"


@pytest.mark.parametrize(("lengths", "s_q"), [((130,), 1), ((64, 64), 1), ((100, 7, 65), 1), ((90, 70), 3)])
def test_plain_torch_gives_our_result(lengths: tuple[int, ...], s_q: int) -> None:
    pytest.importorskip("torch")
    inputs = inputs_of(lengths, s_q)
    ours = decode(inputs)
    call = peer_bench.prepare(plain_torch, inputs, ours)
    assert callable(call), call


def test_a_peer_with_another_result_is_not_timed() -> None:
    pytest.importorskip("torch")
    inputs = inputs_of((70,))
    ours = decode(inputs)

    def unsuitable(inputs: Any) -> Any:
        raise peers.Unsuitable("pages of 64 tokens only")

    def broken(inputs: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    def prepare(result: Callable[[Any], Any]) -> Any:
        return peer_bench.prepare(StandIn(result), inputs, ours)

    assert callable(prepare(lambda inputs: ours))
    assert prepare(lambda inputs: 2 * ours).startswith("another result: 1.0e+00 away")
    assert prepare(lambda inputs: inputs.out).startswith("another result: inf")  # never written
    assert prepare(unsuitable) == "pages of 64 tokens only"
    assert prepare(broken) == "RuntimeError: first line"


def test_a_cell_names_the_best_peer_and_the_share_of_the_floor() -> None:
    entry = results()["cells"]["b=16, 1K"]
    assert entry["best_peer"] == "FlashMLA"
    assert entry["times"]["etap_rt"]["us"] == 20.5
    assert entry["times"]["etap_rt"]["noise_us"] == 1.0
    assert entry["times_as_fast_as_best_peer"] == round(40 / 20.5, 4)
    assert entry["share_of_floor"]["FlashMLA"] == 0.25
    assert entry["times"]["FlashMLA"]["tflop_per_s"] == round(16 * 1024 * 2 * 16 * 1088 / 40 / 1e6, 2)


def test_the_paper_grid_is_measured() -> None:
    lengths = {cell.lengths for cell in peer_bench.all_cells() if cell.group == "lengths"}
    assert {(tokens,) * batch for tokens in bench.TOKENS for batch in (1, 16, 32)} == lengths


def test_results_are_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(results()))
    pictures = tmp_path / "pictures"
    assert peer_bench.main(["--from", str(tmp_path / "results.json"), "--pictures", str(pictures)]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200 (132 SMs)" in text
    assert "FlashInfer fa3 was skipped: flashinfer.mla cannot be imported" in text
    assert "CuPy: not today (8 calls, b=16 float16, 512 the first)" in text
    assert sorted(path.name for path in pictures.iterdir()) == ["roofline.png", "share_of_floor.png", "throughput.png"]


def test_markdown_has_the_fastest_bold_and_leaves_out_what_the_readme_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results()))
    assert peer_bench.main(["--markdown", str(tmp_path / "results.json")]) == 0
    text = capsys.readouterr().out
    assert "|  | etap_rt | FlashMLA | others / ours |" in text
    assert "| b=16, 2K | **20.5** | 40.0 | 1.95 |" in text
    assert "| b=16 16K, 32 SMs | **20.5** | 40.0 | 1.95 |" in text
    assert "1K |" not in text and "float16" not in text and "CuPy" not in text


def test_the_readme_shows_something_of_every_call_that_it_knows() -> None:
    known = {(cell.group, cell.column) for cell in peer_bench.all_cells()}
    assert {group for group, _ in known} == set(peer_bench.README_COLUMNS)
    assert {(group, column) for group, columns in peer_bench.README_COLUMNS.items() for column in columns} <= known


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise etap_rt.UnsupportedError("no GPU is visible", "a GPU")

    monkeypatch.setattr(import_tool("gpu_check"), "describe_machine", no_gpu)
    assert peer_bench.main([]) == 2
    assert "cannot measure here: no GPU is visible" in capsys.readouterr().err
