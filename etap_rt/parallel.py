"""Decode with the context spread over the ranks of a torch.distributed process group.

Every rank has a part of each request's tokens in a cache of its own, and all queries. It attends to what it has; the
ranks then gather the lse of all and add up their outputs, each weighted by its share. Needs torch; any backend of
torch.distributed that works on the tensors' device will do (NCCL on GPUs, gloo on the CPU).

Which tokens a rank has makes no difference where nothing is masked: for one query token a request, and with
causal=False, any split is legal, a rank without tokens (cache_seqlens 0) included. With `causal` and more query
tokens than one, the mask counts from the end of a request. Therefore one rank, `newest_rank`, has to have the tokens
of all queries of a request, as the last ones of its part; the other ranks have older tokens only, in any split.

A call only puts work on the current stream, collectives included: nothing waits for the GPU. All ranks make the same
calls in the same order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from etap_rt import arguments, decode
from etap_rt.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from etap_rt.interop import Array, describe, to_host
from etap_rt.scalars import check_flag, integer
from etap_rt.states import merge_states

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    newest_rank: int | torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    scatter_heads: bool = False,
    return_lse: bool = False,
) -> Any:
    """`etap_rt.mla_decode` over the tokens that all ranks of a group have together.

    Takes torch tensors. Arguments that are not named here are those of `etap_rt.mla_decode`.

    Args:
        q, softmax_scale, causal, cu_seqlens_q: the same on all ranks.
        kv_cache, block_table: of this rank alone; page sizes and tables may differ from rank to rank.
        cache_seqlens: (b,) int32; tokens of each request that this rank has.
        newest_rank: rank, in the group, of each request's newest tokens: an int if it is the same for all, or (b,)
            int32 or int64 on the device of cache_seqlens, which costs a second pass. Needed where `causal` may mask
            anything: with s_q above 1 or ragged queries. The same on all ranks.
        group: the process group; None is the default group.
        scatter_heads: return a part of the heads on each rank instead of all on every rank: rank i of n gets heads
            i * h / n to (i + 1) * h / n. Moves half of the bytes.
        return_lse: return (out, lse) instead of out.

    Returns:
        out (b, s_q, h, latent) in q's dtype, or (out, lse) with lse (b, h, s_q) float32, over all tokens; the ragged
        forms for ragged queries. Every rank's own result is rounded to q's dtype, their sum is formed in float32.

    Raises what `etap_rt.mla_decode` raises. What only the ranks together can see is checked by `check_inputs`.
    """
    ranks, rank = _place(group)
    check_flag(return_lse, "return_lse")
    newest = _check_spread(q, cache_seqlens, causal, newest_rank, cu_seqlens_q, scatter_heads, ranks)

    def attend(lengths: Any, masked: bool) -> Any:
        return decode.mla_decode(
            q,
            kv_cache,
            block_table,
            lengths,
            softmax_scale=softmax_scale,
            causal=masked,
            cu_seqlens_q=cu_seqlens_q,
            return_lse=True,
        )

    if newest is None or isinstance(newest, int):
        out, lse = attend(cache_seqlens, newest == rank)
    else:
        # A pass for the requests whose newest tokens are here, a pass for the others.
        import torch

        here = newest == rank
        out, lse = attend(torch.where(here, cache_seqlens, 0), True)
        merge_states(out, lse, *attend(torch.where(here, 0, cache_seqlens), False), out=out, lse=lse)
    out, lse = combine_states(out, lse, group=group, scatter_heads=scatter_heads)
    return (out, lse) if return_lse else out


def combine_states(
    out: torch.Tensor, lse: torch.Tensor, *, group: ProcessGroup | None = None, scatter_heads: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine the attention of the same queries over the ranks' parts of a context: merge_states across a group.

    Args:
        out: this rank's attention, (b, s_q, h, d) or (total_q, h, d); bfloat16, float16 or float32. Finite where
            lse is -inf, as mla_decode leaves it.
        lse: (b, h, s_q) or (h, total_q) float32, natural logarithm; -inf where this rank has no key.
        group, scatter_heads: as in `mla_decode`.

    Returns (out, lse) over all parts, in the shapes and dtypes of the arguments, but for the heads if those are
    scattered. Sums are formed in float32 and rounded once.

    Raises ArgumentError or ArgumentTypeError for shapes and dtypes of this rank; what other ranks gave is not seen.
    """
    ranks, rank = _place(group)
    check_flag(scatter_heads, "scatter_heads")
    _check_state(_describe_tensor(out, "out"), _describe_tensor(lse, "lse"))
    if scatter_heads:
        _check_heads(out.shape, ranks)
    if ranks == 1:
        return out, lse
    if out.numel() == 0:
        return (_split_heads(out, ranks)[rank], _split_heads(lse, ranks)[rank]) if scatter_heads else (out, lse)

    import torch

    out, lse = out.detach(), lse.detach()
    every = lse.new_empty((ranks * lse.shape[0], *lse.shape[1:]))
    _collective("all_gather_single", "all_gather_into_tensor")(every, lse.contiguous(), group=group)
    total = every.view(ranks, *lse.shape).logsumexp(0)
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total)).transpose(-1, -2).unsqueeze(-1)
    if not scatter_heads:
        weighted = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        torch.mul(out, share, out=weighted)
        torch.distributed.all_reduce(weighted, group=group)
        return weighted.to(out.dtype), total
    parts, shares = _split_heads(out, ranks), _split_heads(share, ranks)
    weighted = torch.empty(parts.shape, dtype=torch.float32, device=out.device)
    torch.mul(parts, shares, out=weighted)
    mine = torch.empty_like(weighted[0])
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(mine, weighted.flatten(0, 1), group=group)
    return mine.to(out.dtype), _split_heads(total, ranks)[rank]


def check_inputs(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    newest_rank: int | torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    scatter_heads: bool = False,
    return_lse: bool = False,
) -> None:
    """Check the arguments of `mla_decode`, values on the device and other ranks' arguments included; for debugging.

    Takes what `mla_decode` takes, on all ranks; computes nothing and returns None. Copies queries, lengths and tables
    to the host, and waits for the other ranks.

    Raises ArgumentError or ArgumentTypeError on all ranks when something is wrong on one of them; the name of an
    argument of another rank ends with "on rank 3", say.
    """
    ranks, _ = _place(group)
    found: _Facts | ArgumentError | ArgumentTypeError
    try:
        newest = _check_spread(q, cache_seqlens, causal, newest_rank, cu_seqlens_q, scatter_heads, ranks)
        arguments.check_inputs(
            q,
            kv_cache,
            block_table,
            cache_seqlens,
            softmax_scale=softmax_scale,
            causal=causal,
            cu_seqlens_q=cu_seqlens_q,
            return_lse=return_lse,
        )
        found = _gather_facts(q, cache_seqlens, cu_seqlens_q, newest, softmax_scale, causal, scatter_heads)
    except (ArgumentError, ArgumentTypeError) as error:
        found = error

    import torch

    everywhere: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everywhere, found, group=group)
    if isinstance(found, Exception):
        raise found
    for other, seen in enumerate(everywhere):
        if isinstance(seen, Exception):
            raise type(seen)(f"{seen.argument} on rank {other}", seen.given, seen.accepted)  # type: ignore[attr-defined]
    _check_together(everywhere)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a rank tells the others of its arguments."""

    same: dict[str, str]  # what has to be the same on all ranks, by the argument's name
    lengths: list[int]  # tokens of each request
    queries: list[int]  # query tokens of each request
    newest: list[int] | None  # rank of each request's newest tokens, where it matters


def _gather_facts(
    q: Any, cache_seqlens: Any, cu_seqlens_q: Any, newest: Any, softmax_scale: float, causal: bool, scatter_heads: bool
) -> _Facts:
    parts = [describe(part, "q") for part in (q if isinstance(q, (tuple, list)) else (q,))]
    shape = parts[0].layout.shape
    lengths = to_host(describe(cache_seqlens, "cache_seqlens")).tolist()
    if cu_seqlens_q is None:
        queries = [shape[1]] * len(lengths)
    else:
        bounds = to_host(describe(cu_seqlens_q, "cu_seqlens_q")).tolist()
        queries = [end - begin for begin, end in pairwise(bounds)]
    if newest is not None and not isinstance(newest, int):
        newest = to_host(describe(newest, "newest_rank")).tolist()
    elif newest is not None:
        newest = [newest] * len(lengths)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(to_host(part).tobytes())
    shapes = ", ".join(str(part.layout.shape) for part in parts)
    same = {
        "q": f"shape {shapes}, {parts[0].layout.dtype}, sha256 {digest.hexdigest()[:16]}",
        "softmax_scale": repr(float(softmax_scale)),
        "causal": repr(causal),
        "cu_seqlens_q": f"{queries} query tokens",
        "newest_rank": repr(newest),
        "scatter_heads": repr(scatter_heads),
    }
    return _Facts(same, lengths, queries, newest)


def _check_together(everywhere: list[_Facts]) -> None:
    first = everywhere[0]
    for rank, facts in enumerate(everywhere):
        for name, value in facts.same.items():
            if value != first.same[name]:
                raise ArgumentError(f"{name} on rank {rank}", value, f"{first.same[name]}, as on rank 0")
    if first.newest is None:
        return
    for request, (newest, queries) in enumerate(zip(first.newest, first.queries)):
        if not 0 <= newest < len(everywhere):
            raise ArgumentError(f"newest_rank[{request}]", str(newest), f"0 ... {len(everywhere) - 1}")
        needed = min(queries, sum(facts.lengths[request] for facts in everywhere))
        has = everywhere[newest].lengths[request]
        if has < needed:
            accepted = f"at least {needed}, the tokens of its queries: it is the request's newest_rank"
            raise ArgumentError(f"cache_seqlens[{request}] on rank {newest}", str(has), accepted)


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    """Ranks of the group, and this process's among them."""
    import torch

    if not torch.distributed.is_available():
        raise UnsupportedError("torch.distributed is not in this torch", "one that is built with it")
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER  # what new_group returns where a process is not in it
    if group is None:
        if not torch.distributed.is_initialized():
            accepted = "a process group, or a call of torch.distributed.init_process_group before"
            raise ArgumentError("group", "None where there is no default group", accepted)
    elif group is not outside and not isinstance(group, torch.distributed.ProcessGroup):
        raise ArgumentTypeError("group", type(group).__name__, "a torch.distributed.ProcessGroup or None")
    rank = torch.distributed.get_rank(group)
    if rank < 0:
        raise ArgumentError("group", "a group that this process is not in", "one that it is in")
    return torch.distributed.get_world_size(group), rank


def _describe_tensor(x: Any, name: str) -> Array:
    array = describe(x, name)
    if array.layout.library != "torch":
        raise ArgumentTypeError(name, f"an array of {array.layout.library}", "a torch tensor")
    return array


def _check_spread(
    q: Any, cache_seqlens: Any, causal: Any, newest_rank: Any, cu_seqlens_q: Any, scatter_heads: Any, ranks: int
) -> Any:
    """Check what etap_rt.mla_decode does not know of; newest_rank, or None where nothing can be masked."""
    check_flag(causal, "causal")
    check_flag(scatter_heads, "scatter_heads")
    queries = _describe_tensor(q[0], "q[0]") if isinstance(q, (tuple, list)) and q else _describe_tensor(q, "q")
    shape = queries.layout.shape
    if scatter_heads:
        _check_heads(shape, ranks)
    newest = None if newest_rank is None else _check_newest(newest_rank, cache_seqlens, ranks)
    if not causal or (cu_seqlens_q is None and (len(shape) != 4 or shape[1] == 1)):
        return None
    if newest is None:
        if cu_seqlens_q is not None:
            describe(cu_seqlens_q, "cu_seqlens_q")  # what is no array does not make queries ragged
        accepted = "the rank of each request's newest tokens, on which causal masks the keys of later queries"
        raise ArgumentError("newest_rank", "None", accepted)
    return newest


def _check_newest(newest_rank: Any, cache_seqlens: Any, ranks: int) -> Any:
    """A rank for all requests, or a tensor with one for each."""
    import torch

    if not isinstance(newest_rank, torch.Tensor):
        rank = integer(newest_rank, "newest_rank", "an integer, or a torch tensor with one for each request")
        if not 0 <= rank < ranks:
            raise ArgumentError("newest_rank", str(rank), f"0 ... {ranks - 1}")
        return rank
    given = _describe_tensor(newest_rank, "newest_rank").layout
    lengths = _describe_tensor(cache_seqlens, "cache_seqlens").layout
    if given.dtype not in ("int32", "int64"):
        raise ArgumentError("newest_rank", f"dtype {given.dtype}", "int32 or int64")
    if given.shape != lengths.shape:
        raise ArgumentError("newest_rank", f"shape {given.shape}", f"{lengths.shape}, as cache_seqlens")
    if (given.device_type, given.device) != (lengths.device_type, lengths.device):
        accepted = f"{lengths.device_type}:{lengths.device}, where cache_seqlens is"
        raise ArgumentError("newest_rank", f"device {given.device_type}:{given.device}", accepted)
    return newest_rank


def _check_heads(shape: tuple[int, ...], ranks: int) -> None:
    if len(shape) > 1 and shape[-2] % ranks:
        raise ArgumentError(
            "scatter_heads", f"{shape[-2]} heads over {ranks} ranks", "a number of heads they can share"
        )


def _check_state(out: Array, lse: Array) -> None:
    shape = out.layout.shape
    if len(shape) not in (3, 4):
        raise ArgumentError("out", f"shape {shape}", "(b, s_q, heads, dim) or (total_q, heads, dim)")
    if out.layout.dtype not in ("bfloat16", "float16", "float32"):
        raise ArgumentError("out", f"dtype {out.layout.dtype}", "bfloat16, float16 or float32")
    if lse.layout.dtype != "float32":
        raise ArgumentError("lse", f"dtype {lse.layout.dtype}", "float32")
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    if lse.layout.shape != lse_shape:
        raise ArgumentError("lse", f"shape {lse.layout.shape}", f"{lse_shape}, with out of shape {shape}")
    if (lse.layout.device_type, lse.layout.device) != (out.layout.device_type, out.layout.device):
        accepted = f"{out.layout.device_type}:{out.layout.device}, where out is"
        raise ArgumentError("lse", f"device {lse.layout.device_type}:{lse.layout.device}", accepted)


def _split_heads(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """A view of out or lse, whose heads are the last dim but one, with a dim of `ranks` parts before all others."""
    return x.unflatten(-2, (ranks, x.shape[-2] // ranks)).movedim(-3, 0)


def _collective(name: str, older_name: str) -> Any:
    """A function of torch.distributed that torch 2.13 has given another name."""
    import torch

    return getattr(torch.distributed, name, None) or getattr(torch.distributed, older_name)
