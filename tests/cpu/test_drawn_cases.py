"""Problems that hypothesis draws, on the CPU; and that a mistake comes back as a small problem."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

pytest.importorskip("torch")

from tests.drawn_cases import PATIENT, cases, fuzz


@settings(PATIENT, max_examples=40)
@given(cases("cpu"))
def test_problems_that_hypothesis_draws(case: Any) -> None:
    fuzz.run_case(case, "cpu", None)


def test_a_mistake_is_shrunk_to_a_small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths above 63 are wrong, say: what is left is one request of 64 tokens."""
    tried: list[Any] = []

    def wrong_from_64_tokens_on(case: Any, device: str, memory: Any) -> None:
        if any(length >= 64 for length in case.lengths):
            tried.append(case)
            raise fuzz.Failure("wrong")

    monkeypatch.setattr(fuzz, "run_case", wrong_from_64_tokens_on)

    @settings(PATIENT, max_examples=200, database=None, derandomize=True, print_blob=False)
    @given(cases("cpu"))
    def find(case: Any) -> None:
        fuzz.run_case(case, "cpu", None)

    with pytest.raises(fuzz.Failure):
        find()
    smallest = tried[-1]
    assert len(smallest.lengths) == 1 and smallest.lengths[0] <= 65
    assert (smallest.heads, smallest.ragged, smallest.csr, smallest.seed) == (1, False, False, 0)
