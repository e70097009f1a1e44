"""tools/accuracy.py on the CPU backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etap_rt.reference import decode_float64
from tests.tool_modules import import_tool

accuracy = import_tool("accuracy")


def judge(case: Any) -> dict[str, Any]:
    entry: dict[str, Any] = accuracy.judge(accuracy.OnCpu(), case, [], seed=0)
    return entry


@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_rounding_the_exact_result_is_the_least_error(dtype: str, kind: str) -> None:
    entry = judge(accuracy.Case(dtype, kind, 2, 512))
    ours = entry["errors"]["etap_rt"]
    assert ours["rmse"] >= entry["rounding"]["rmse"] > 0
    assert ours["rmse_over_rounding"] < 1.5
    assert ours["max"] >= ours["rmse"]


def test_outliers_are_one_in_a_thousand() -> None:
    place = accuracy.OnCpu()
    place.make(accuracy.Case("float16", "outliers", 1, 4096), seed=0)
    share = float((np.abs(place.cache.astype(np.float32)) > 5).mean())
    assert 0.5e-3 < share < 0.8e-3  # 62 % of the outliers are that large


@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_the_exact_result_of_the_gpu_is_that_of_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's CPU tensors, in several chunks."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(accuracy, "CHUNK_TOKENS", 128)
    place = accuracy.OnGpu.__new__(accuracy.OnGpu)
    place.device, place.name, place.sms = "cpu", "torch on the CPU", 132
    case = accuracy.Case("float16", kind, 3, 320)
    place.make(case, seed=0)
    arrays = [tensor.numpy() for tensor in (place.q, place.cache, place.table, place.lengths)]
    expected, _ = decode_float64(*arrays, accuracy.SOFTMAX_SCALE, True)
    assert torch.allclose(place.exact([0, 1, 2]), torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    assert (place.q.abs().max() > 10) == (kind == "outliers")
    entry = accuracy.judge(place, case, [import_tool("peers.plain_torch")], seed=0)
    assert 1 <= entry["errors"]["etap_rt"]["rmse_over_rounding"] < 1.5
    assert entry["errors"]["torch"]["rmse_over_rounding"] > 1


def test_splits_follow_from_batch_and_length() -> None:
    assert accuracy.Case("float16", "normal", 1, 64).splits(132) == 1
    assert accuracy.Case("float16", "normal", 1, 131072).splits(132) == 132
    assert accuracy.Case("float16", "normal", 16, 4096).splits(132) == 8
    assert accuracy.Case("float16", "normal", 132, 4096).splits(132) == 1


def test_of_large_batches_some_requests_are_compared() -> None:
    assert accuracy.compared_requests(1) == [0]
    assert accuracy.compared_requests(16) == list(range(16))
    some = accuracy.compared_requests(132)
    assert len(some) == 16
    assert (some[0], some[-1]) == (0, 131)


def test_errors_are_what_they_are_called() -> None:
    exact = np.array([3.0, 4.0])
    errors = accuracy.OnCpu().compare(exact + np.array([0.3, -0.4]), exact)
    assert errors.rmse == pytest.approx((0.25 / 2) ** 0.5)
    assert errors.largest == pytest.approx(0.4)
    assert errors.relative == pytest.approx(0.1)


def test_a_table_a_file_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "accuracy.json", tmp_path / "accuracy.png"
    arguments = ["--device", "cpu", "--tokens", "512", "--tokens", "4096", "--batch", "1", "--dtype", "float16"]
    assert accuracy.main([*arguments, "--json", str(output), "--picture", str(picture)]) == 0
    assert "float16, normal, b=1, 4K" in capsys.readouterr().out
    cases = json.loads(output.read_text())["cases"]
    assert cases["float16, normal, b=1, 4K"]["goal"] == 1.10
    assert "goal" not in cases["float16, normal, b=1, 512"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert accuracy.main(["--from", str(output)]) == 0


def test_markdown_has_a_line_for_the_lengths_that_the_readme_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "accuracy.json"
    arguments = ["--device", "cpu", "--tokens", "512", "--tokens", "1024", "--batch", "1", "--dtype", "float16"]
    assert accuracy.main([*arguments, "--json", str(output)]) == 0
    capsys.readouterr()
    assert accuracy.main(["--markdown", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CPU backend, ")
    assert lines[2] == "|  | parts | etap_rt |"
    assert [line.partition(" | ")[0] for line in lines[4:]] == ["| float16, b=1, 512"]


def test_lines_that_leave_the_scale_are_named() -> None:
    assert accuracy.note_off_scale({"etap_rt": {512: 1.1}}) == ""
    far = {"etap_rt": {512: 1.1}, "torch": {512: 4.26, 1024: 1.2}, "CuPy": {512: 3.0}}
    assert accuracy.note_off_scale(far) == "off the scale: torch up to 4.3, CuPy up to 3.0"


def test_the_better_peer_is_named() -> None:
    errors = {"etap_rt": {"rmse": 2.0}, "worse": {"rmse": 3.0}, "better": {"rmse": 1.0}}
    assert accuracy.worse_than_a_peer({"cases": {"one": {"errors": errors}}}) == ["one: better"]


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--tokens", "100"], ["--device", "cpu", "--peers"]])
def test_what_cannot_be_judged_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(arguments)
