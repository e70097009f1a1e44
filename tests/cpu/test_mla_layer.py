"""tools/mla_layer.py: the worked example, with a small hidden state."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tool_modules import import_tool

torch: Any = pytest.importorskip("torch")
mla_layer: Any = import_tool("mla_layer")

HIDDEN = 128
PROMPTS = (70, 1, 64, 0)


@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decoding_is_the_layer_that_is_not_absorbed(heads: int, page_size: int) -> None:
    errors = mla_layer.compare(heads, 5, "cpu", HIDDEN, PROMPTS, page_size=page_size)
    assert [error.tokens for error in errors] == [sum(PROMPTS) + len(PROMPTS) * step for step in range(1, 6)]
    for error in errors:
        assert error.to_expanded <= mla_layer.ACCEPTED_ERROR
        assert error.to_float32 <= 1.5 * error.expanded_to_float32, "no further from the truth than the other way"


def test_in_float16_the_error_is_smaller() -> None:
    errors = mla_layer.compare(8, 3, "cpu", HIDDEN, PROMPTS, dtype=torch.float16)
    assert max(error.to_expanded for error in errors) <= mla_layer.ACCEPTED_ERROR / 4


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def score(i: int, j: int) -> Any:
        return mla_layer.rotate(x, torch.tensor(i)) @ mla_layer.rotate(y, torch.tensor(j))

    torch.testing.assert_close(mla_layer.rotate(x, torch.tensor(0)), x)
    torch.testing.assert_close(mla_layer.rotate(x, torch.tensor(1000)).norm(), x.norm())
    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_the_command_line_prints_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    status = mla_layer.main(["--device", "cpu", "--heads", "8", "--steps", "2", "--hidden", str(HIDDEN)])
    text = capsys.readouterr().out
    assert status == 0
    assert "8 heads, bfloat16" in text and "All steps agree" in text
    assert [line.split()[:2] for line in text.splitlines()[4:6]] == [["1", "969"], ["2", "973"]]


def test_a_step_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mla_layer, "SOFTMAX_SCALE", 0.05)
    decode = mla_layer.mla_decode
    monkeypatch.setattr(mla_layer, "mla_decode", lambda *q, softmax_scale: decode(*q, softmax_scale=0.06))
    assert mla_layer.main(["--device", "cpu", "--steps", "1", "--hidden", str(HIDDEN)]) == 1
    assert "NOT all steps agree" in capsys.readouterr().out
