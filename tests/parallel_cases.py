"""Decode problems whose tokens are spread over ranks, and the processes that solve them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
import torch.multiprocessing

from etap_rt import PagedKVCache, mla_decode, parallel
from etap_rt.errors import ArgumentError
from tests.cases import DEEPSEEK_SCALE

HEADS = 8
LENGTHS = (0, 1, 3, 130, 300)  # tokens of each request, on all ranks together
PAGE_SIZES = (64, 16, 32, 1)  # of the ranks in turn


@dataclass(frozen=True)
class ParallelCase:
    """How a problem is spread. A tuple of `queries` makes them ragged, one number of query tokens for each request."""

    name: str
    split: Literal["in turn", "one after the other", "anyhow", "on one"]  # rank of each token but the newest
    queries: int | tuple[int, ...] = 1  # of a request
    newest: Literal["anywhere", "on the last", "on different ones"] = "anywhere"  # rank of all tokens of the queries
    causal: bool = True
    scatter_heads: bool = False
    dims: tuple[int, int] = (512, 64)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return self.name

    @property
    def query_counts(self) -> tuple[int, ...]:
        return (self.queries,) * len(LENGTHS) if isinstance(self.queries, int) else self.queries


PARALLEL_CASES = (
    ParallelCase("one-query", "in turn"),
    ParallelCase("one-query-fp16-320", "one after the other", dims=(256, 64), dtype="float16"),
    ParallelCase("one-rank-has-all", "on one"),
    ParallelCase("no-mask", "anyhow", queries=3, causal=False),
    ParallelCase("newest-on-the-last-rank", "anyhow", queries=3, newest="on the last"),
    ParallelCase("newest-on-different-ranks", "anyhow", queries=3, newest="on different ones"),
    ParallelCase("scattered-heads", "one after the other", queries=2, newest="on different ones", scatter_heads=True),
    ParallelCase("ragged", "anyhow", queries=(1, 0, 2, 4, 1), newest="on different ones"),
    ParallelCase("ragged-scattered", "anyhow", queries=(2, 3, 0, 1, 5), newest="on the last", scatter_heads=True),
)


@dataclass(frozen=True)
class Problem:
    """A case on the CPU, whole."""

    q: torch.Tensor  # (b, s_q, h, dim) or (total_q, h, dim)
    tokens: list[torch.Tensor]  # of each request, (n, dim)
    ranks: list[torch.Tensor]  # of each token
    newest: list[int]  # rank of each request's newest tokens


def make_problem(case: ParallelCase, ranks: int) -> Problem:
    generator = torch.Generator().manual_seed(1)
    dtype, dim = getattr(torch, case.dtype), sum(case.dims)
    counts = case.query_counts
    shape = (len(LENGTHS), case.queries) if isinstance(case.queries, int) else (sum(counts),)
    q = torch.randn(*shape, HEADS, dim, generator=generator).to(dtype)
    tokens = [torch.randn(length, dim, generator=generator).to(dtype) for length in LENGTHS]
    newest = [ranks - 1 if case.newest == "on the last" else request % ranks for request in range(len(LENGTHS))]
    places = []
    for length, count, last in zip(LENGTHS, counts, newest):
        place = {
            "in turn": torch.arange(length) % ranks,
            "one after the other": torch.arange(length) * ranks // max(1, length),
            "anyhow": torch.randint(ranks, (length,), generator=generator),
            "on one": torch.full((length,), 1 % ranks),
        }[case.split]
        if case.newest != "anywhere":
            place[max(0, length - count) :] = last
        places.append(place)
    return Problem(q, tokens, places, newest)


def arguments(
    case: ParallelCase, problem: Problem, device: str, tokens: list[torch.Tensor], page_size: int
) -> dict[str, Any]:
    """Arguments of etap_rt.mla_decode for the problem's queries and some of its tokens."""
    pages = sum(-(-len(rows) // page_size) for rows in tokens)
    dtype = getattr(torch, case.dtype)
    latent, rope = case.dims
    cache = PagedKVCache(max(1, pages), page_size, 1, latent, rope, dtype=dtype, device=device)
    sequences = [cache.new_sequence() for _ in tokens]
    slots = cache.reserve(sequences, [len(rows) for rows in tokens])
    rows = torch.cat(tokens).to(device)
    cache.write(0, slots, rows[:, :latent], rows[:, latent:])
    table, lengths = cache.batch(sequences)
    call = {
        "q": problem.q.to(device),
        "kv_cache": cache.pages(0),
        "block_table": table,
        "cache_seqlens": lengths,
        "softmax_scale": DEEPSEEK_SCALE,
        "causal": case.causal,
    }
    if not isinstance(case.queries, int):
        bounds = torch.tensor([0, *case.query_counts]).cumsum(0)
        call["cu_seqlens_q"] = bounds.to(device, torch.int32)
    return call


def decode_whole(case: ParallelCase, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a case in one process."""
    problem = make_problem(case, 1)
    out, lse = mla_decode(**arguments(case, problem, device, problem.tokens, 64), return_lse=True)
    return out.cpu(), lse.cpu()


def parallel_arguments(case: ParallelCase, ranks: int, rank: int, device: str) -> dict[str, Any]:
    """Arguments of parallel.mla_decode on one rank."""
    problem = make_problem(case, ranks)
    mine = [rows[place == rank] for rows, place in zip(problem.tokens, problem.ranks)]
    call = arguments(case, problem, device, mine, PAGE_SIZES[rank % len(PAGE_SIZES)])
    call["scatter_heads"] = case.scatter_heads
    if case.newest == "on the last":
        call["newest_rank"] = ranks - 1
    elif case.newest == "on different ones":
        call["newest_rank"] = torch.tensor(problem.newest, device=device)
    return call


# ---- Mistakes that only the ranks together can see: what changes on some rank, and what all ranks are told ----

MASKED = next(case for case in PARALLEL_CASES if case.name == "newest-on-the-last-rank")


def other_scale(call: dict[str, Any], rank: int) -> None:
    if rank == 1:
        call["softmax_scale"] = 0.5


def other_queries(call: dict[str, Any], rank: int) -> None:
    if rank == 3:
        call["q"] = call["q"] + 1


def other_newest_rank(call: dict[str, Any], rank: int) -> None:
    call["newest_rank"] = rank


def newest_tokens_elsewhere(call: dict[str, Any], rank: int) -> None:
    call["newest_rank"] = torch.zeros(len(LENGTHS), dtype=torch.int32)


def newest_rank_out_of_range(call: dict[str, Any], rank: int) -> None:
    call["newest_rank"] = torch.tensor([3, 3, 3, 3, 4])


def impossible_length(call: dict[str, Any], rank: int) -> None:
    if rank == 2:
        call["cache_seqlens"] = call["cache_seqlens"] + (1 << 20)


MISTAKES: dict[Callable[[dict[str, Any], int], None], str] = {
    other_scale: "softmax_scale on rank 1: got 0.5, accepted is 0.07216878364870322, as on rank 0",
    other_queries: "q on rank 3: got shape",
    other_newest_rank: "newest_rank on rank 1: got [1, 1, 1, 1, 1], accepted is [0, 0, 0, 0, 0], as on rank 0",
    newest_tokens_elsewhere: "cache_seqlens[1] on rank 0: got 0, accepted is at least 1",
    newest_rank_out_of_range: "newest_rank[4]: got 4, accepted is 0 ... 3",
    impossible_length: "cache_seqlens[0] on rank 2: got 1048576",
}


# ---- Processes ----


def solve_together(directory: Path, ranks: int, device_type: str) -> None:
    """Solve all cases with one process a rank; what each returns and says of mistakes is left in the directory."""
    torch.multiprocessing.spawn(_solve, (str(directory), ranks, device_type), nprocs=ranks)


def _solve(rank: int, directory: str, ranks: int, device_type: str) -> None:
    device = "cpu"
    if device_type == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    found: dict[str, Any] = {}
    for case in PARALLEL_CASES:
        call = parallel_arguments(case, ranks, rank, device)
        parallel.check_inputs(**call)
        out, lse = parallel.mla_decode(**call, return_lse=True)
        found[case.name] = out.cpu(), lse.cpu()
    if ranks == 4:
        for mistake in MISTAKES:
            call = parallel_arguments(MASKED, ranks, rank, device)
            mistake(call, rank)
            try:
                parallel.check_inputs(**call)
                found[mistake.__name__] = "nothing was found"
            except ArgumentError as error:
                found[mistake.__name__] = str(error)
    torch.save(found, f"{directory}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def results(directory: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def whole(case: ParallelCase, found: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out and lse with all heads, as many times as there are: from each rank, or from all ranks together."""
    states = [rank[case.name] for rank in found]
    if not case.scatter_heads:
        return states
    return [(torch.cat([out for out, _ in states], dim=-2), torch.cat([lse for _, lse in states], dim=-2))]


def assert_solved(case: ParallelCase, found: list[dict[str, Any]], relative_error: float) -> None:
    """Hold what the ranks have found against the result of one process."""
    expected, expected_lse = decode_whole(case)
    for out, lse in whole(case, found):
        assert out.dtype == expected.dtype and out.shape == expected.shape and lse.shape == expected_lse.shape
        assert (out.float() - expected.float()).norm() <= relative_error * expected.float().norm()
        torch.testing.assert_close(lse, expected_lse, atol=5e-5, rtol=1e-6)
        empty = expected_lse.isneginf().transpose(-1, -2)
        assert empty.any() and not out[empty].any()
