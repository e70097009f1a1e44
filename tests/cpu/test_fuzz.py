"""tools/fuzz.py in its short form, and that it sees what it is there to see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.tool_modules import import_tool

torch: Any = pytest.importorskip("torch")

CASES = 100

fuzz = import_tool("fuzz")


def test_random_problems_on_the_cpu(record_property: Callable[[str, object], None]) -> None:
    summary = fuzz.fuzz("cpu", seed=0, cases=CASES)
    assert summary.cases == CASES and summary.runs == 2 * CASES
    for feature in ("ragged", "csr", "split_q", "uneven", "planned", "shared_prefix", "float16", "page 1", "8 rows"):
        assert summary.seen[feature] >= 5, feature
    record_property("cases", summary.cases)
    record_property("worst_error_over_accepted", summary.worst)


def wrong(change: Callable[[dict[str, Any], Any, Any], None]) -> Callable[..., Any]:
    """mla_decode with something done to its arguments or results."""
    original = fuzz.mla_decode

    def call(**arguments: Any) -> Any:
        out, lse = original(**arguments)
        change(arguments, out, lse)
        return out, lse

    return call


def write_beside(x: Any, elements: int) -> None:
    """Write `elements` elements away from the first element of an array."""
    x.as_strided((1,), (1,), x.storage_offset() + elements).fill_(1)


calls = iter(range(10**9))
MISTAKES: dict[str, tuple[Callable[[dict[str, Any], Any, Any], None], str]] = {
    "out a little off": (lambda arguments, out, lse: out.mul_(1.02), "out is .* times the accepted error"),
    "lse a little off": (lambda arguments, out, lse: lse.add_(1e-3), "lse is .* times the accepted error"),
    "out NaN": (lambda arguments, out, lse: out.fill_(torch.nan), "out is inf times|queries without keys is inf"),
    "before out": (lambda arguments, out, lse: write_beside(out, -3), "something outside of out was written"),
    "before lse": (lambda arguments, out, lse: write_beside(lse, -1), "something outside of lse was written"),
    "queries": (
        lambda arguments, out, lse: write_beside(arguments["cache_seqlens"], 0),
        "cache_seqlens or what lies around it was written",
    ),
    "other bits": (
        lambda arguments, out, lse: lse.mul_(1 + 1e-7 * (next(calls) % 2)),
        "the second run gave other bits",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_fuzzer_sees_a_mistake_and_says_how_to_repeat_it(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = MISTAKES[mistake]
    monkeypatch.setattr(fuzz, "mla_decode", wrong(change))
    original = fuzz.draw_case

    def with_outputs_and_no_plan(seed: int, device: str) -> Any:
        case = original(seed, device)
        case.outputs, case.planned = "both", False
        return case

    monkeypatch.setattr(fuzz, "draw_case", with_outputs_and_no_plan)
    with pytest.raises(fuzz.Failure, match=message) as caught:
        fuzz.fuzz("cpu", seed=11, cases=20)
    assert "python tools/fuzz.py --device cpu --seed " in str(caught.value)


def test_what_happens_to_the_workspace_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fuzz.GuardedMemory("cpu")
    counters, partials = memory.allocate_zeroed(0, 64), memory.allocate_zeroed(0, 4096)
    monkeypatch.setattr(fuzz.workspace, "_counters", {(0, 0, 0): counters})
    blocks = [memory.blocks[counters], memory.blocks[partials]]
    for block, size in zip(blocks, (64, 4096)):
        assert not block[fuzz.GUARD_BYTES : fuzz.GUARD_BYTES + size].any()
    memory.poison()
    memory.check()
    assert not blocks[0][fuzz.GUARD_BYTES : -fuzz.GUARD_BYTES].any() and (blocks[1] == fuzz.POISON_BYTE).all()
    blocks[1][fuzz.GUARD_BYTES + 5] = 0  # within
    memory.check()
    for block, at, message in (
        (blocks[0], fuzz.GUARD_BYTES + 8, "a counter of the workspace is not zero"),
        (blocks[0], fuzz.GUARD_BYTES + 64, "beside the workspace"),
        (blocks[1], fuzz.GUARD_BYTES - 1, "beside the workspace"),
    ):
        before = block.clone()
        block[at] = 1
        with pytest.raises(fuzz.Failure, match=message):
            memory.check()
        block.copy_(before)


def test_the_same_seed_is_the_same_case() -> None:
    for seed in range(20):
        assert fuzz.draw_case(seed, "cpu") == fuzz.draw_case(seed, "cpu")
    makers = [fuzz.Maker(fuzz.draw_case(7, "cpu"), "cpu") for _ in range(2)]
    for maker in makers:
        fuzz.make_queries(fuzz.draw_case(7, "cpu"), maker)
    for a, b in zip(makers[0].buffers, makers[1].buffers):
        assert torch.equal(a.base.view(torch.int16), b.base.view(torch.int16)) and a.index == b.index


def test_a_failure_ends_with_status_1_and_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--device", "cpu", "--seed", "3", "--cases", "5"])
    assert fuzz.main() == 0
    assert "5 cases, 10 runs" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "mla_decode", wrong(lambda arguments, out, lse: out.zero_()))
    assert fuzz.main() == 1
    assert "repeat: python tools/fuzz.py --device cpu --seed" in capsys.readouterr().err
