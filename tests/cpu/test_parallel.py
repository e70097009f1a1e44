"""Decode over several processes, with gloo, against the same problem in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

from etap_rt import parallel  # noqa: E402
from etap_rt.errors import ArgumentError, ArgumentTypeError, UnsupportedError  # noqa: E402
from tests.cases import BFLOAT16_ERROR  # noqa: E402
from tests.parallel_cases import (  # noqa: E402
    MASKED,
    MISTAKES,
    PARALLEL_CASES,
    ParallelCase,
    assert_solved,
    decode_whole,
    parallel_arguments,
    results,
    solve_together,
)

RANKS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the ranks has found."""
    directory = tmp_path_factory.mktemp("ranks")
    solve_together(directory, RANKS, "cpu")
    return results(directory, RANKS)


@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_ranks_together_find_what_one_process_finds(case: ParallelCase, found: list[dict[str, Any]]) -> None:
    assert_solved(case, found, 2 * BFLOAT16_ERROR)


@pytest.mark.parametrize("case", [case for case in PARALLEL_CASES if not case.scatter_heads], ids=str)
def test_all_ranks_have_the_same_bits(case: ParallelCase, found: list[dict[str, Any]]) -> None:
    first, *others = [rank[case.name] for rank in found]
    for other in others:
        assert torch.equal(other[0], first[0]) and torch.equal(other[1], first[1])


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_all_ranks_are_told_of_a_mistake(mistake: Any, found: list[dict[str, Any]]) -> None:
    for rank, errors in enumerate(found):
        expected = MISTAKES[mistake].replace(f" on rank {rank}", "") if mistake.__name__ == "impossible_length" else ""
        assert errors[mistake.__name__].startswith(expected or MISTAKES[mistake])


# ---- A group of one, in this process ----


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_one_rank_alone_is_a_group(case: ParallelCase, alone: None) -> None:
    call = parallel_arguments(case, 1, 0, "cpu")
    out, lse = parallel.mla_decode(**call, return_lse=True)
    assert torch.equal(parallel.mla_decode(**call), out)
    expected, expected_lse = decode_whole(case)
    assert torch.equal(out, expected)
    torch.testing.assert_close(lse, expected_lse, atol=0, rtol=0)


@pytest.mark.parametrize("case", [MASKED, PARALLEL_CASES[-1]], ids=str)
def test_what_is_masked_needs_its_rank(case: ParallelCase, alone: None) -> None:
    call = parallel_arguments(case, 1, 0, "cpu")
    del call["newest_rank"]
    with pytest.raises(ArgumentError, match="^newest_rank: got None, accepted is the rank"):
        parallel.mla_decode(**call)
    parallel.mla_decode(**{**call, "causal": False})


@pytest.mark.parametrize(
    ("newest_rank", "error", "text"),
    [
        (1, ArgumentError, r"got 1, accepted is 0 \.\.\. 0"),
        (-1, ArgumentError, r"got -1"),
        (True, ArgumentTypeError, "got True, accepted is an integer, or a torch tensor with one for each request"),
        ("0", ArgumentTypeError, "got '0', accepted is an integer, or a torch tensor"),
        (0.0, ArgumentTypeError, "got 0.0, accepted is an integer, or a torch tensor"),
        ([0] * 5, ArgumentTypeError, r"got \[0, 0, 0, 0, 0\], accepted is an integer, or a torch tensor"),
        (np.zeros(5, np.int32), ArgumentTypeError, "accepted is an integer, or a torch tensor"),
        (torch.zeros(5), ArgumentError, "float32, accepted is int32 or int64"),
        (torch.zeros(4, dtype=torch.int32), ArgumentError, r"shape \(4,\), accepted is \(5,\)"),
        (torch.zeros(5, dtype=torch.int32, device="meta"), ArgumentError, "meta"),
    ],
    ids=str,
)
def test_a_rank_that_cannot_be_is_refused(newest_rank: Any, error: Any, text: str, alone: None) -> None:
    for case in (MASKED, PARALLEL_CASES[0]):  # needed and not needed
        call = {**parallel_arguments(case, 1, 0, "cpu"), "newest_rank": newest_rank}
        with pytest.raises(error, match=f"^newest_rank: .*{text}"):
            parallel.mla_decode(**call)


def test_a_rank_may_be_numpys(alone: None) -> None:
    call = parallel_arguments(MASKED, 1, 0, "cpu")
    expected = parallel.mla_decode(**call)
    assert torch.equal(parallel.mla_decode(**{**call, "newest_rank": np.int64(0)}), expected)


def test_a_mask_is_asked_for_or_not(alone: None) -> None:
    call = {**parallel_arguments(MASKED, 1, 0, "cpu"), "causal": "no"}
    with pytest.raises(ArgumentTypeError, match="^causal: got 'no', accepted is True or False"):
        parallel.mla_decode(**call)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", None, ArgumentTypeError, "q: got NoneType, accepted is an array of torch"),
        ("q", (), ArgumentTypeError, "q: got tuple, accepted is an array of torch"),
        ("q", torch.zeros(5, 8, 576, dtype=torch.bfloat16), ArgumentError, "q: got shape (5, 8, 576), accepted is "),
        ("kv_cache", None, ArgumentTypeError, "kv_cache: got NoneType"),
        ("cache_seqlens", [1], ArgumentTypeError, "cache_seqlens: got list"),
        ("cu_seqlens_q", [0, 1], ArgumentTypeError, "cu_seqlens_q: got list"),
        ("softmax_scale", None, ArgumentTypeError, "softmax_scale: got None, accepted is a number of the host"),
        ("scatter_heads", 1, ArgumentTypeError, "scatter_heads: got 1, accepted is True or False"),
        ("scatter_heads", torch.zeros(2), ArgumentTypeError, "scatter_heads: got tensor([0., 0.]), accepted is True"),
        ("return_lse", None, ArgumentTypeError, "return_lse: got None, accepted is True or False"),
        ("group", 0, ArgumentTypeError, "group: got int, accepted is a torch.distributed.ProcessGroup or None"),
        ("group", [], ArgumentTypeError, "group: got list, accepted is a torch.distributed.ProcessGroup or None"),
        ("group", torch.zeros(2), ArgumentTypeError, "group: got Tensor, accepted is a torch.distributed.ProcessGroup"),
    ],
)
def test_mistakes_are_named(name: str, value: Any, error: type[Exception], message: str, alone: None) -> None:
    call = {**parallel_arguments(PARALLEL_CASES[0], 1, 0, "cpu"), name: value}
    for function in (parallel.mla_decode, parallel.check_inputs):
        with pytest.raises(error) as caught:
            function(**call)
        assert str(caught.value).startswith(message)


def test_lengths_that_are_no_tensor_do_not_meet_a_tensor_of_ranks(alone: None) -> None:
    call = parallel_arguments(PARALLEL_CASES[5], 1, 0, "cpu")
    with pytest.raises(ArgumentTypeError, match="^cache_seqlens: got an array of numpy, accepted is a torch tensor"):
        parallel.mla_decode(**{**call, "cache_seqlens": call["cache_seqlens"].numpy()})


def test_without_a_group_one_is_told_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ArgumentError) as caught:
        parallel.combine_states(*STATE)
    assert str(caught.value) == (
        "group: got None where there is no default group, accepted is a process group, or a call of "
        "torch.distributed.init_process_group before"
    )
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"torch\.distributed is not in this torch"):
        parallel.combine_states(*STATE)


def test_arrays_of_other_libraries_are_refused(alone: None) -> None:
    call = parallel_arguments(PARALLEL_CASES[0], 1, 0, "cpu")
    with pytest.raises(ArgumentTypeError, match="^q: got an array of numpy, accepted is a torch tensor"):
        parallel.mla_decode(**{**call, "q": call["q"].float().numpy()})


STATE = torch.zeros(2, 1, 3, 16), torch.zeros(2, 3, 1)


@pytest.mark.parametrize(
    ("out", "lse", "text"),
    [
        (STATE[0][0, 0], STATE[1], r"out: got shape \(3, 16\)"),
        (STATE[0].double(), STATE[1], "out: got dtype float64"),
        (STATE[0], STATE[1].double(), "lse: got dtype float64"),
        (STATE[0], STATE[1].transpose(1, 2), r"lse: got shape \(2, 1, 3\), accepted is \(2, 3, 1\)"),
        (STATE[0], STATE[1].to("meta"), "lse: got device meta:0, accepted is cpu:0, where out is"),
        (None, STATE[1], "out: got NoneType"),
        (STATE[0], [1.0], "lse: got list"),
        (STATE[0].numpy(), STATE[1], "out: got an array of numpy, accepted is a torch tensor"),
    ],
    ids=["out-dims", "out-dtype", "lse-dtype", "lse-shape", "lse-device", "no-out", "lse-list", "out-numpy"],
)
def test_states_that_do_not_fit_are_refused(out: Any, lse: Any, text: str, alone: None) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{text}"):
        parallel.combine_states(out, lse)


def test_states_with_gradients_are_combined_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that have the same: what the collectives would do."""
    monkeypatch.setattr(parallel, "_place", lambda group: (2, 0))
    monkeypatch.setattr(
        parallel, "_collective", lambda *names: lambda every, mine, group: every.copy_(torch.cat([mine, mine]))
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda weighted, group: weighted.mul_(2))
    out, lse = torch.ones(2, 1, 3, 16, requires_grad=True), torch.zeros(2, 3, 1, requires_grad=True)
    combined, combined_lse = parallel.combine_states(out, lse)
    assert not combined.requires_grad and not combined_lse.requires_grad
    torch.testing.assert_close(combined, out.detach())
    torch.testing.assert_close(combined_lse, torch.full((2, 3, 1), 2.0).log())


def test_heads_are_scattered_evenly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_place", lambda group: (2, 0))
    with pytest.raises(ArgumentError, match="^scatter_heads: got 3 heads over 2 ranks"):
        parallel.combine_states(*STATE, scatter_heads=True)
    empty = torch.zeros(0, 1, 4, 16), torch.zeros(0, 4, 1)
    assert [x.shape for x in parallel.combine_states(*empty, scatter_heads=True)] == [(0, 1, 2, 16), (0, 2, 1)]


def test_a_process_outside_of_the_group_is_told(alone: None) -> None:
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER  # of new_group, where a process is not among the ranks
    with pytest.raises(ArgumentError, match="^group: got a group that this process is not in"):
        parallel.combine_states(*STATE, group=outside)
