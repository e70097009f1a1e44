"""tools/roofline.py: the model is the one of its description, and what it prints is labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tool_modules import import_tool

roofline = import_tool("roofline")
pictures = import_tool("pictures")
bench = import_tool("bench")

H20, H100, H200 = (roofline.DATA_SHEETS[name] for name in ("H20", "H100", "H200"))
RESULTS = json.loads(roofline.RESULTS.read_text())


def cell(batch: int, tokens: int, heads: int = 16) -> Any:
    return roofline.expected_cell(batch, tokens, heads, 1)


@pytest.mark.parametrize(("rows", "cycles"), [(8, 18), (16, 20), (24, 22), (32, 24), (64, 32)])
def test_a_tile_on_an_sm_of_full_rate_costs_what_was_measured(rows: int, cycles: int) -> None:
    assert H200.tensor_us(rows) == pytest.approx(68 * cycles / H200.mhz, rel=1e-3)


def test_a_tile_on_an_h20_costs_its_flop() -> None:
    assert H20.tensor_us(16) == pytest.approx(2 * 64 * 16 * 1088 * H20.sms / H20.tflop_per_s / 1e6)
    assert H20.padded_tensor_us(16) == pytest.approx(4 * H20.tensor_us(16))
    assert H20.memory_us == pytest.approx(73728 * 78 / 4.0e6)


def test_work_counts_pages_and_the_busiest_sm() -> None:
    work = roofline.work_of(cell(16, 4096), 132)
    assert work.bytes == 16 * 4096 * 1152
    assert work.flop == 2 * 16 * 4096 * 16 * 1088
    assert work.rows == 16
    assert 16 * 64 / 132 <= work.busiest_tiles <= 10


def test_the_bound_is_the_longer_of_loading_and_computing() -> None:
    long = roofline.work_of(cell(16, 65536), H200.sms)
    bound = roofline.estimate(H200, long)
    assert bound.bound_by == "memory"
    assert bound.us == pytest.approx(long.bytes / 4.8e6)
    assert bound.low_us == pytest.approx(bound.us + long.busiest_tiles * H200.tensor_us(16))
    assert roofline.estimate(H200, roofline.work_of(cell(128, 8192, 128), H200.sms)).bound_by == "tensor"


def test_a_fit_finds_what_made_the_numbers() -> None:
    truth = roofline.Fit(12.0, 0.8)
    works = [roofline.work_of(cell(batch, tokens), H200.sms) for batch in (1, 16) for tokens in bench.TOKENS]
    assert roofline.fit_to(H200, [(work, roofline.estimate(H200, work, truth).us) for work in works]) == truth


def test_the_model_is_near_our_measurements_where_it_was_fitted() -> None:
    _, comparisons = roofline.check_model(H200, roofline.measured_cells(RESULTS))
    groups = roofline.errors_by_group(comparisons)
    assert set(groups) <= {*roofline.FITTED_GROUPS, *roofline.CHECKED_GROUPS}
    median, largest = groups["lengths"]
    assert median < 0.05
    assert abs(largest) < 0.15


def test_what_is_projected_for_an_h100_is_near_what_was_measured_there() -> None:
    fit, _ = roofline.check_model(H200, roofline.measured_cells(RESULTS))
    ((h100, measured),) = roofline.other_results(H200).items()
    assert h100 == H100 and roofline.data_sheet_of(measured) == H100
    comparisons = roofline.compare(H100, fit, roofline.measured_cells(measured))
    median, largest = roofline.errors_by_group(comparisons)["lengths"]
    assert median < 0.05
    assert abs(largest) < 0.15


def test_a_fit_is_made_with_the_data_sheet_of_the_gpu_that_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "roofline.json"
    assert roofline.main(["--results", str(roofline.RESULTS.with_name("h100.json")), "--json", str(output)]) == 0
    contents = json.loads(output.read_text())
    assert {name: gpu["projection"] for name, gpu in contents["gpus"].items()}["H100"] is False
    assert 0.8 < contents["fit"]["memory_share"] < 1
    assert set(contents["errors_of_projections"]) == {"H200"}


@pytest.mark.parametrize(
    "gpu", [{"gpu": "NVIDIA GH200 480GB"}, {"gpu": "NVIDIA H100 PCIe", "sms": 114, "sms_used": 114}]
)
def test_a_gpu_without_a_data_sheet_is_refused(tmp_path: Path, gpu: dict[str, Any]) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(RESULTS | gpu))
    with pytest.raises(SystemExit):
        roofline.main(["--results", str(other)])


def test_the_paper_lies_between_full_overlap_and_none_on_an_h20() -> None:
    fit, _ = roofline.check_model(H200, roofline.measured_cells(RESULTS))
    for entry in roofline.compare_with_paper(H20, fit):
        assert entry["FlashMLA"] < entry["padded_bound_tflop_per_s"]
        assert entry["FlashMLA-ETAP"] < entry["bound_tflop_per_s"]
        assert entry["low_tflop_per_s"] <= entry["expected_tflop_per_s"] < entry["bound_tflop_per_s"]


def test_projections_are_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture, output = tmp_path / "roofline.png", tmp_path / "roofline.json"
    assert roofline.main(["--batch", "16", "--json", str(output), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    for name in ("H20", "H800"):
        assert f"{name} (PROJECTION, nothing was measured)" in text
    assert "H100 (PROJECTION, held against measurements above)" in text
    assert "PROJECTIONS beside what the paper measured" in text
    assert "Its error, of the measured time" in text
    contents = json.loads(output.read_text())
    assert {name: gpu["projection"] for name, gpu in contents["gpus"].items()} == {
        "H20": True,
        "H100": True,
        "H200": False,
        "H800": True,
    }
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measurements_on_a_part_of_the_sms_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    part.write_text(json.dumps(RESULTS | {"sms_used": 32}))
    with pytest.raises(SystemExit):
        roofline.main(["--results", str(part)])


def test_a_call_on_few_sms_is_expected_to_take_their_tensor_time() -> None:
    fitted, few = (next(c for c in bench.all_cells() if c.group == group) for group in ("lengths", "sms"))
    _, (_, comparison) = roofline.check_model(H200, [(fitted, 15.0), (few, 100.0)])
    tiles = 16 * 16384 / 64 / few.sms
    assert comparison.expected_us >= tiles * H200.tensor_us(16)


def test_a_gpu_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--gpu", "GH200", "--sms", "132", "--tflops", "989.4", "--tb-per-s", "4.0"]) == 0
    assert "GH200 (PROJECTION" in capsys.readouterr().out
    for arguments in (["--gpu", "B100"], ["--sms", "10"], ["--gpu", "X", "--sms", "10", "--tflops", "1"]):
        with pytest.raises(SystemExit):
            roofline.main(arguments)
