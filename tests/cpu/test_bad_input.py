"""Mistakes in public calls, each with the whole sentence that it is answered with; and oddities that are none.

tests/cpu/test_arguments.py has every mistake in the arguments of a decode. Here is what users read: the same sentence
from every call that takes these arguments, and what happens to the objects that they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import etap_rt
from etap_rt import ArgumentError, ArgumentTypeError, OutOfPagesError, PagedKVCache, SequenceError
from tests.cases import to_torch

BF16 = ml_dtypes.bfloat16
ARRAY = "an array of torch, CuPy, NumPy or another DLPack producer"


def zeros(*shape: int, dtype: Any = BF16) -> Any:
    return np.zeros(shape, dtype)


def ints(*shape: int, dtype: Any = np.int32) -> Any:
    return np.zeros(shape, dtype)


def torch_zeros(*shape: int, dtype: str = "bfloat16", **options: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.zeros(shape, dtype=getattr(torch, dtype), **options)


def read_only(x: Any) -> Any:
    x.flags.writeable = False
    return x


def good_arguments() -> dict[str, Any]:
    """2 requests, 2 query tokens, 3 heads; a cache of 7 pages of 64 tokens; tables of 4 pages."""
    return {
        "q": zeros(2, 2, 3, 576),
        "kv_cache": zeros(7, 64, 576),
        "block_table": ints(2, 4),
        "cache_seqlens": ints(2),
        "softmax_scale": 0.1,
        "causal": True,
        "out": zeros(2, 2, 3, 512),
        "lse": zeros(2, 3, 2, dtype=np.float32),
        "return_lse": True,
    }


# ---- Decoding: one sentence for each kind of mistake ----

DECODE_MISTAKES: dict[str, tuple[type[Exception], Callable[[], dict[str, Any]], str]] = {
    "no array": (ArgumentTypeError, lambda: {"q": None}, f"q: got NoneType, accepted is {ARRAY}"),
    "nested lists": (
        ArgumentTypeError,
        lambda: {"cache_seqlens": [1, 2]},
        f"cache_seqlens: got list, accepted is {ARRAY}",
    ),
    "three parts": (
        ArgumentTypeError,
        lambda: {"q": (zeros(1),) * 3},
        "q: got tuple of 3, accepted is one array or the pair (latent, rope)",
    ),
    "dtype": (
        ArgumentError,
        lambda: {"q": zeros(2, 2, 3, 576, dtype=np.float32)},
        "q: got dtype float32, accepted is bfloat16 or float16",
    ),
    "objects": (
        ArgumentError,
        lambda: {"q": np.empty((2, 2, 3, 576), object)},
        "q: got dtype object, accepted is bfloat16 or float16",
    ),
    "another dtype than q": (
        ArgumentError,
        lambda: {"kv_cache": zeros(7, 64, 576, dtype=np.float16)},
        "kv_cache: got dtype float16, accepted is bfloat16, as q",
    ),
    "int64 table": (
        ArgumentError,
        lambda: {"block_table": ints(2, 4, dtype=np.int64)},
        "block_table: got dtype int64, accepted is int32",
    ),
    "int64 lengths": (
        ArgumentError,
        lambda: {"cache_seqlens": ints(2, dtype=np.int64)},
        "cache_seqlens: got dtype int64, accepted is int32",
    ),
    "rank": (
        ArgumentError,
        lambda: {"kv_cache": zeros(64, 576)},
        "kv_cache: got shape (64, 576), accepted is (num_pages, page_size, 576) or (num_pages, page_size, 1, 576), "
        "with q's dims 512 + 64",
    ),
    "dims": (ArgumentError, lambda: {"q": zeros(2, 2, 3, 512)}, "q: got last dim 512, accepted is 576 or 320"),
    "no heads": (
        ArgumentError,
        lambda: {"q": zeros(2, 2, 0, 576)},
        "q: got 0 heads (dim 2 of shape (2, 2, 0, 576)), accepted is 1 ... 128 heads",
    ),
    "too many heads": (
        ArgumentError,
        lambda: {"q": zeros(2, 2, 129, 576)},
        "q: got 129 heads (dim 2 of shape (2, 2, 129, 576)), accepted is 1 ... 128 heads",
    ),
    "no queries": (
        ArgumentError,
        lambda: {"q": zeros(2, 0, 3, 576)},
        "q: got shape (2, 0, 3, 576), accepted is at least one query token (dim 1)",
    ),
    "no pages": (
        ArgumentError,
        lambda: {"kv_cache": zeros(0, 64, 576)},
        "kv_cache: got shape (0, 64, 576), accepted is at least one page",
    ),
    "page size": (
        ArgumentError,
        lambda: {"kv_cache": zeros(7, 48, 576)},
        "kv_cache: got shape (7, 48, 576), accepted is a page size (dim 1) that divides 64 or is a multiple of it",
    ),
    "batch of the table": (
        ArgumentError,
        lambda: {"block_table": ints(3, 4)},
        "block_table: got shape (3, 4), accepted is (2, max_pages); q has batch 2",
    ),
    "batch of the lengths": (
        ArgumentError,
        lambda: {"cache_seqlens": ints(3)},
        "cache_seqlens: got shape (3,), accepted is (2,); q has batch 2",
    ),
    "last dim with gaps": (
        ArgumentError,
        lambda: {"q": zeros(2, 2, 3, 1152)[..., ::2]},
        "q: got stride 2 in the last dim, accepted is 1 (contiguous)",
    ),
    "strides of the cache": (
        ArgumentError,
        lambda: {"kv_cache": zeros(7, 64, 580)[..., :576]},
        "kv_cache: got strides (37120, 580, 1), accepted is multiples of 8 elements (16 bytes)",
    ),
    "cache backwards": (
        ArgumentError,
        lambda: {"kv_cache": zeros(7, 64, 576)[::-1]},
        f"kv_cache: got strides (-36864, 576, 1), accepted is 0 ... {1 << 40} bytes",
    ),
    "shape of out": (
        ArgumentError,
        lambda: {"out": zeros(2, 2, 3, 576)},
        "out: got shape (2, 2, 3, 576), accepted is (2, 2, 3, 512)",
    ),
    "shape of lse": (
        ArgumentError,
        lambda: {"lse": zeros(2, 2, 3, dtype=np.float32)},
        "lse: got shape (2, 2, 3), accepted is (2, 3, 2)",
    ),
    "dtype of lse": (
        ArgumentError,
        lambda: {"lse": zeros(2, 3, 2, dtype=np.float64)},
        "lse: got dtype float64, accepted is float32",
    ),
    "out onto itself": (
        ArgumentError,
        lambda: {"out": np.lib.stride_tricks.as_strided(zeros(9999), (2, 2, 3, 512), (0, 3072, 1024, 2))},
        "out: got strides (0, 1536, 512, 1), accepted is elements that do not overlap",
    ),
    "out read-only": (
        ArgumentError,
        lambda: {"out": read_only(zeros(2, 2, 3, 512))},
        "out: got a read-only array, accepted is one that can be written",
    ),
    "NaN scale": (
        ArgumentError,
        lambda: {"softmax_scale": float("nan")},
        "softmax_scale: got nan, accepted is a number above 0, at most 2e+38",
    ),
    "scale in an array": (
        ArgumentTypeError,
        lambda: {"softmax_scale": np.ones(1)},
        "softmax_scale: got array([1.]), accepted is a number of the host",
    ),
    "causal 1": (ArgumentTypeError, lambda: {"causal": 1}, "causal: got 1, accepted is True or False"),
    "return_lse 1": (ArgumentTypeError, lambda: {"return_lse": 1}, "return_lse: got 1, accepted is True or False"),
    "another device": (
        ArgumentError,
        lambda: {"block_table": torch_zeros(2, 4, dtype="int32", device="meta")},
        "block_table: got device meta:0, accepted is cpu:0, where q is",
    ),
    "no memory": (
        ArgumentError,
        lambda: {"q": torch_zeros(2, 2, 3, 576, device="meta")},
        "q: got device meta, accepted is cuda or cpu",
    ),
}
CALLS: dict[str, Callable[..., Any]] = {
    "mla_decode": etap_rt.mla_decode,
    "plan_decode": etap_rt.plan_decode,
    "check_inputs": etap_rt.check_inputs,
    "trace_decode": lambda out, lse, return_lse, **arguments: etap_rt.trace_decode(**arguments),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mistake", DECODE_MISTAKES)
def test_every_call_says_the_same_and_writes_nothing(mistake: str, name: str) -> None:
    error, change, message = DECODE_MISTAKES[mistake]
    if name == "trace_decode" and change().keys() & {"out", "lse", "return_lse"}:
        return  # it makes its own
    arguments = good_arguments()
    arguments["out"].fill(7)
    arguments["lse"].fill(7)
    arguments |= change()
    with pytest.raises(error) as caught:
        CALLS[name](**arguments)
    assert str(caught.value) == message
    assert isinstance(caught.value, etap_rt.EtapError)
    for output in ("out", "lse"):
        if output not in change():
            assert (arguments[output] == 7).all()


def outputs_elsewhere(output: str, other: str) -> dict[str, Any]:
    """Good arguments but for an output that lies in the memory of another array."""
    arguments = good_arguments()
    taken = arguments[other]
    arguments[output] = taken[..., 64:] if output == "out" else taken.reshape(-1)[:24].view(np.float32).reshape(2, 3, 2)
    return arguments


@pytest.mark.parametrize("name", ["mla_decode", "plan_decode", "check_inputs"])
@pytest.mark.parametrize(("output", "other"), [("out", "q"), ("lse", "kv_cache"), ("lse", "out")])
def test_outputs_in_the_memory_of_another_array(name: str, output: str, other: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        CALLS[name](**outputs_elsewhere(output, other))
    assert str(caught.value) == f"{output}: got memory of {other}, accepted is memory apart from all other arrays"


def test_outputs_may_lie_between_the_rows_of_inputs() -> None:
    memory = np.random.default_rng(0).standard_normal((2, 2, 3, 576 + 512)).astype(BF16)
    arguments = good_arguments() | {"q": memory[..., :576], "cache_seqlens": np.array([70, 5], np.int32)}
    arguments["kv_cache"] = np.random.default_rng(1).standard_normal((7, 64, 576)).astype(BF16)
    expected, _ = etap_rt.mla_decode(**arguments)
    etap_rt.mla_decode(**arguments | {"out": memory[..., 576:]})
    assert (memory[..., 576:] == expected).all()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0, -1], "cache_seqlens[1]: got -1, accepted is 0 ... 256 (max_pages * page_size)"),
        ([257, 0], "cache_seqlens[0]: got 257, accepted is 0 ... 256 (max_pages * page_size)"),
        ([65, 1], "block_table[0, 1]: got 9, accepted is 0 ... 6 (num_pages - 1)"),
    ],
)
def test_values_are_looked_at_where_the_host_sees_them(lengths: list[int], message: str) -> None:
    arguments = good_arguments()
    arguments["cache_seqlens"] = np.array(lengths, np.int32)
    arguments["block_table"] = np.array([[0, 9, 0, 0], [1, 0, 0, 0]], np.int32)
    for call in (etap_rt.mla_decode, etap_rt.check_inputs):
        with pytest.raises(ArgumentError) as caught:
            call(**arguments)
        assert str(caught.value) == message
    plan = etap_rt.plan_decode(**arguments)
    with pytest.raises(ArgumentError) as caught:
        plan.run(arguments["q"])
    assert str(caught.value) == message


PLAN_MISTAKES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "no array": (ArgumentTypeError, lambda: None, f"q: got NoneType, accepted is {ARRAY}"),
    "a pair": (
        ArgumentError,
        lambda: (zeros(2, 2, 3, 512), zeros(2, 2, 3, 64)),
        "q: got 2 arrays, accepted is 1, as when the call was planned",
    ),
    "shape": (ArgumentError, lambda: zeros(2, 2, 4, 576), "q: got "),
    "dtype": (ArgumentError, lambda: zeros(2, 2, 3, 576, dtype=np.float16), "q: got "),
    "strides": (ArgumentError, lambda: zeros(2, 2, 3, 600)[..., :576], "q: got "),
    "library": (ArgumentError, lambda: to_torch(zeros(2, 2, 3, 576)), "q: got "),
}


@pytest.mark.parametrize("mistake", PLAN_MISTAKES)
def test_a_plan_refuses_other_queries_and_goes_on(mistake: str) -> None:
    if mistake == "library":
        pytest.importorskip("torch")
    error, wrong, message = PLAN_MISTAKES[mistake]
    plan = etap_rt.plan_decode(**good_arguments())
    with pytest.raises(error) as caught:
        plan.run(wrong())
    assert str(caught.value).startswith(message)
    assert "as when the call was planned" in str(caught.value) or error is ArgumentTypeError
    assert plan.run(zeros(2, 2, 3, 576)) is plan.out


# ---- Decoding: odd, but legal ----


def test_arrays_that_cannot_be_written_are_read() -> None:
    arguments = good_arguments()
    for name in ("q", "kv_cache", "block_table", "cache_seqlens"):
        read_only(arguments[name])
    assert etap_rt.mla_decode(**arguments)[0] is arguments["out"]


def test_tensors_that_require_gradients_are_read_and_the_result_has_none() -> None:
    torch = pytest.importorskip("torch")
    arguments = {name: to_torch(x) if isinstance(x, np.ndarray) else x for name, x in good_arguments().items()}
    del arguments["out"], arguments["lse"]
    arguments["q"].requires_grad_(True)
    arguments["kv_cache"] = torch.nn.Parameter(arguments["kv_cache"])
    for out, lse in (etap_rt.mla_decode(**arguments), (plan_and_run(arguments), None)):
        assert not out.requires_grad and out.grad_fn is None
        assert lse is None or not lse.requires_grad
    with torch.inference_mode():
        assert etap_rt.mla_decode(**arguments)[0].shape == (2, 2, 3, 512)


def plan_and_run(arguments: dict[str, Any]) -> Any:
    return etap_rt.plan_decode(**arguments).run(arguments["q"])


def test_numbers_that_are_no_floats_are_scales() -> None:
    for scale in (1, np.float32(0.1), np.float64(0.1), np.int64(2), 1e-320, 1e38):
        etap_rt.mla_decode(**good_arguments() | {"softmax_scale": scale})


def test_views_with_offsets_and_gaps_are_read() -> None:
    plain, odd = good_arguments(), good_arguments()
    rng = np.random.default_rng(0)
    for name in ("q", "kv_cache"):
        plain[name][...] = rng.standard_normal(plain[name].shape)
    plain["cache_seqlens"][:] = (130, 70)
    plain["block_table"][:, :3] = [[6, 0, 3], [1, 5, 5]]
    odd["q"] = np.full((3, 2, 4, 600), np.nan, BF16)[1:, :, 1:, 7:583]
    odd["kv_cache"] = np.full((9, 80, 1, 592), np.nan, BF16)[2:, 3:67, :, 8:584]
    odd["block_table"] = np.full((2, 5000), -7, np.int32)[:, 1:4999]  # far more columns than pages
    odd["cache_seqlens"] = np.full(9, -5, np.int32)[2::5]
    odd["q"][...] = plain["q"]
    odd["kv_cache"][:, :, 0] = plain["kv_cache"]
    odd["block_table"][:, :3] = plain["block_table"][:, :3]
    odd["cache_seqlens"][:] = plain["cache_seqlens"]
    for x, y in zip(etap_rt.mla_decode(**plain), etap_rt.mla_decode(**odd)):
        assert np.array_equal(x, y)
    etap_rt.check_inputs(**odd)


def test_nobody_and_nothing_to_decode() -> None:
    arguments = good_arguments()
    out, lse = etap_rt.mla_decode(**arguments)  # all lengths are 0
    assert not out.any() and np.isneginf(lse).all()
    empty = {"q": zeros(0, 2, 3, 576), "block_table": ints(0, 4), "cache_seqlens": ints(0), "out": None, "lse": None}
    out, lse = etap_rt.mla_decode(**arguments | empty)
    assert out.shape == (0, 2, 3, 512) and lse.shape == (0, 3, 2)
    etap_rt.check_inputs(**arguments | empty)
    out, _ = etap_rt.mla_decode(**arguments | {"block_table": ints(2, 0)})
    assert not out.any()


# ---- PagedKVCache ----


def small_cache(**changes: Any) -> PagedKVCache:
    sizes = {"num_pages": 8, "page_size": 4, "num_layers": 2, "latent_dim": 16, "rope_dim": 8, "device": "cpu"}
    return PagedKVCache(**{**sizes, "max_batch": 4, "max_pages_per_sequence": 6, **changes})


MAKING_MISTAKES: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no pages": (ArgumentError, {"num_pages": 0}, "num_pages: got 0, accepted is 1 or more"),
    "pages by name": (ArgumentTypeError, {"num_pages": "8"}, "num_pages: got '8', accepted is an integer"),
    "half a page": (ArgumentTypeError, {"page_size": 2.5}, "page_size: got 2.5, accepted is an integer"),
    "no layers": (ArgumentError, {"num_layers": 0}, "num_layers: got 0, accepted is 1 or more"),
    "flag for a number": (ArgumentTypeError, {"num_layers": True}, "num_layers: got True, accepted is an integer"),
    "array for a number": (
        ArgumentTypeError,
        {"max_batch": ints(9, 9)},
        "max_batch: got ndarray, accepted is an integer",
    ),
    "more bytes than there are addresses": (
        ArgumentError,
        {"num_layers": 1 << 60},
        "num_layers: got 1152921504606846976, accepted is at most 6004799503160661, of 1536 bytes each",
    ),
    "too many tokens": (
        ArgumentError,
        {"num_pages": 1 << 30},
        "num_pages * page_size: got 4294967296, accepted is at most 2147483647",
    ),
    "table too large": (
        ArgumentError,
        {"max_batch": 1 << 16, "max_pages_per_sequence": 1 << 16},
        "max_batch * max_pages_per_sequence: got 65536 * 65536, accepted is at most 2147483647",
    ),
    "dim of 12": (ArgumentError, {"latent_dim": 12}, "latent_dim: got 12, accepted is a multiple of 8"),
    "dims too large": (
        ArgumentError,
        {"latent_dim": 4096},
        "latent_dim + rope_dim: got 4104, accepted is at most 2560",
    ),
    "float32": (ArgumentError, {"dtype": "float32"}, "dtype: got float32, accepted is bfloat16 or float16"),
    "no dtype": (ArgumentError, {"dtype": None}, "dtype: got None, accepted is bfloat16 or float16"),
    "unknown dtype": (ArgumentError, {"dtype": "half-ish"}, "dtype: got 'half-ish', accepted is bfloat16 or float16"),
    "dtype that NumPy cannot read": (
        ArgumentError,
        {"dtype": "f4,("},
        "dtype: got 'f4,(', accepted is bfloat16 or float16",
    ),
    "device by number": (ArgumentError, {"device": 0}, 'device: got 0, accepted is "cpu", "cuda" or "cuda:1"'),
    "unknown device": (ArgumentError, {"device": "tpu"}, 'device: got \'tpu\', accepted is "cpu", "cuda" or "cuda:1"'),
}


@pytest.mark.parametrize("mistake", MAKING_MISTAKES)
def test_a_cache_that_cannot_be_made_says_why(mistake: str) -> None:
    error, changes, message = MAKING_MISTAKES[mistake]
    with pytest.raises(error) as caught:
        small_cache(**changes)
    assert str(caught.value) == message


def rows(tokens: int, latent: int = 16, rope: int = 8, dtype: Any = BF16) -> tuple[Any, Any]:
    return zeros(tokens, latent, dtype=dtype), zeros(tokens, rope, dtype=dtype)


SLOTS = np.array([0, 1], np.int32)

CACHE_MISTAKES: dict[str, tuple[type[Exception], Callable[[PagedKVCache], object], str]] = {
    "length of an unknown one": (SequenceError, lambda c: c.length(7), "sequence 7 is unknown"),
    "length of no sequence": (SequenceError, lambda c: c.length(None), "sequence None is unknown"),
    "length of a flag": (SequenceError, lambda c: c.length(True), "sequence True is unknown"),
    "length of a fraction": (SequenceError, lambda c: c.length(1.0), "sequence 1.0 is unknown"),  # type: ignore[arg-type]
    "fork of a freed one": (SequenceError, lambda c: c.fork(2), "sequence 2 was freed"),
    "free twice": (SequenceError, lambda c: c.free(2), "sequence 2 was freed"),
    "free a freed one of NumPy": (SequenceError, lambda c: c.free(np.int64(2)), "sequence 2 was freed"),
    "free two at once": (SequenceError, lambda c: c.free([0, 1]), "sequence [0, 1] is unknown"),  # type: ignore[arg-type]
    "free an array": (
        SequenceError,
        lambda c: c.free(torch_zeros(100, dtype="int32")),
        "sequence Tensor is unknown",
    ),
    "truncate beyond": (
        ArgumentError,
        lambda c: c.truncate(0, 6),
        "length: got 6, accepted is 0 ... 5, the tokens of sequence 0",
    ),
    "truncate by name": (ArgumentTypeError, lambda c: c.truncate(0, "3"), "length: got '3', accepted is an integer"),
    "reserve for a freed one": (SequenceError, lambda c: c.reserve([0, 2], [1, 1]), "sequence 2 was freed"),
    "reserve twice for one": (
        ArgumentError,
        lambda c: c.reserve([0, 0], [1, 1]),
        "sequences: got one of them twice, accepted is each sequence once",
    ),
    "truncate by a flag": (
        ArgumentTypeError,
        lambda c: c.truncate(0, False),
        "length: got False, accepted is an integer",
    ),
    "reserve for a freed one of NumPy": (
        SequenceError,
        lambda c: c.reserve(np.array([0, 2]), [1, 1]),
        "sequence 2 was freed",
    ),
    "reserve for a flag": (SequenceError, lambda c: c.reserve([0, True], [1, 1]), "sequence True is unknown"),
    "reserve for one of each library": (
        ArgumentError,
        lambda c: c.reserve([0, np.int32(0)], [1, 1]),
        "sequences: got one of them twice, accepted is each sequence once",
    ),
    "reserve without a list": (
        ArgumentTypeError,
        lambda c: c.reserve(0, 1),  # type: ignore[arg-type]
        "sequences: got 0, accepted is sequences in a list",
    ),
    "too few counts": (
        ArgumentError,
        lambda c: c.reserve([0, 1], [1]),
        "counts: got 1 of them, accepted is one for each of 2 sequences",
    ),
    "negative count": (ArgumentError, lambda c: c.reserve([0], [-1]), "counts[0]: got -1, accepted is 0 or more"),
    "count of 1.5": (
        ArgumentTypeError,
        lambda c: c.reserve([0], [1.5]),  # type: ignore[list-item]
        "counts[0]: got 1.5, accepted is an integer",
    ),
    "count of NaN": (
        ArgumentTypeError,
        lambda c: c.reserve([0, 1], [1, float("nan")]),  # type: ignore[list-item]
        "counts[1]: got nan, accepted is an integer",
    ),
    "count of True": (
        ArgumentTypeError,
        lambda c: c.reserve([0], [True]),
        "counts[0]: got True, accepted is an integer",
    ),
    "counts without memory": (
        ArgumentTypeError,
        lambda c: c.reserve([0], torch_zeros(1, dtype="int32", device="meta")),
        "counts[0]: got tensor(..., device='meta', size=(), dtype=torch.int32), accepted is an integer",
    ),
    "no counts": (
        ArgumentTypeError,
        lambda c: c.reserve([0], None),  # type: ignore[arg-type]
        "counts: got None, accepted is integers in a list",
    ),
    "too many tokens": (
        OutOfPagesError,
        lambda c: c.reserve([0, 1, 3], [16, 8, 8]),
        "out of pages: asked for 8, 5 are free",
    ),
    "slots of another size": (
        ArgumentError,
        lambda c: c.reserve([0], [3], out=ints(2)),
        "out: got 2 elements, accepted is at least 3, one for each token",
    ),
    "slots read-only": (
        ArgumentError,
        lambda c: c.reserve([0], [1], out=read_only(ints(2))),
        "out: got a read-only array, accepted is one that can be written",
    ),
    "slots of another dtype": (
        ArgumentError,
        lambda c: c.reserve([0], [1], out=ints(2, dtype=np.int16)),
        "out: got int16, accepted is int32 or int64",
    ),
    "slots into the lengths": (
        ArgumentError,
        lambda c: c.reserve([0], [1], out=c.batch([0, 1]).cache_seqlens),
        "out: got a view of the cache's own arrays, accepted is an array of the caller's",
    ),
    "slots into the block table": (
        ArgumentError,
        lambda c: c.reserve([0], [1], out=c.batch([0, 1]).block_table[1]),
        "out: got a view of the cache's own arrays, accepted is an array of the caller's",
    ),
    "layer beyond": (
        ArgumentError,
        lambda c: c.write(2, SLOTS, *rows(2)),
        "layer: got 2, accepted is 0 ... 1",
    ),
    "rows too few": (
        ArgumentError,
        lambda c: c.write(0, SLOTS, *rows(1)),
        "latent: got shape (1, 16), accepted is (2, 16), a row for each slot",
    ),
    "rows of another dtype": (
        ArgumentError,
        lambda c: c.write(0, SLOTS, *rows(2, dtype=np.float16)),
        "latent: got float16, accepted is bfloat16, as the cache, or float32",
    ),
    "rows elsewhere": (
        ArgumentError,
        lambda c: c.write(0, SLOTS, torch_zeros(2, 16, device="meta"), rows(2)[1]),
        "latent: got an array on meta:0, accepted is one on cpu, where the cache is",
    ),
    "layer by a flag": (
        ArgumentTypeError,
        lambda c: c.write(True, SLOTS, *rows(2)),
        "layer: got True, accepted is an integer",
    ),
    "rows out of the layer": (
        ArgumentError,
        lambda c: c.write(1, SLOTS, c.pages(1)[0, 2:4, :16], rows(2)[1]),
        "latent: got a view of layer 1, which is written, accepted is other memory, such as a copy",
    ),
    "rope out of the layer, backwards": (
        ArgumentError,
        lambda c: c.write(0, SLOTS, rows(2)[0], c.pages(0)[0, 3:1:-1, 16:]),
        "rope: got a view of layer 0, which is written, accepted is other memory, such as a copy",
    ),
    "slot beyond": (
        ArgumentError,
        lambda c: c.write(0, np.array([0, 32], np.int32), *rows(2)),
        "slots[1]: got 32, accepted is -1 ... 31",
    ),
    "batch too large": (ArgumentError, lambda c: c.batch([0] * 5), "sequences: got 5, accepted is 0 ... 4 (max_batch)"),
    "rows of the batch": (
        ArgumentError,
        lambda c: c.batch([0, 1], rows=5),
        "rows: got 5, accepted is 2 ... 4 (max_batch)",
    ),
    "pages of layer -1": (ArgumentError, lambda c: c.pages(-1), "layer: got -1, accepted is 0 ... 1"),
    "export of a freed one": (SequenceError, lambda c: c.export(2), "sequence 2 was freed"),
    "export to a number": (ArgumentTypeError, lambda c: c.export(0, 3), "path: got 3, accepted is a path"),  # type: ignore[arg-type]
    "import of nothing": (
        ArgumentTypeError,
        lambda c: c.import_(None),  # type: ignore[arg-type]
        "source: got NoneType, accepted is a path or the pair (latent, rope)",
    ),
    "import of two dims": (
        ArgumentError,
        lambda c: c.import_(rows(3)),
        "latent: got shape (3, 16), accepted is (2, n, 16)",
    ),
    "import of numbers": (ArgumentTypeError, lambda c: c.import_((1, 2)), f"latent: got int, accepted is {ARRAY}"),
    "export of a flag": (SequenceError, lambda c: c.export(False), "sequence False is unknown"),
}


@pytest.mark.parametrize("mistake", CACHE_MISTAKES)
def test_a_mistake_leaves_the_cache_as_it_was(mistake: str) -> None:
    cache = small_cache()
    a, b, freed, empty = (cache.new_sequence() for _ in range(4))
    cache.reserve([a, b], [5, 3])
    cache.free(freed)

    def state() -> list[Any]:
        table, lengths = cache.batch([a, b, empty])
        return [cache.stats(), cache.sequences, table[:, :2].tolist(), lengths.tolist(), *map(cache.length, (a, b))]

    before = state()
    error, call, message = CACHE_MISTAKES[mistake]
    with pytest.raises(error) as caught:
        call(cache)
    assert str(caught.value) == message
    assert state() == before


def test_a_count_beyond_all_memory_is_out_of_pages_not_out_of_memory() -> None:
    cache = small_cache(max_pages_per_sequence=1 << 20)
    with pytest.raises(OutOfPagesError, match="asked for 25000000000000000000, 8 are free"):
        cache.reserve([cache.new_sequence()], [10**20])
    assert cache.stats().free == 8


def test_files_that_cannot_be_read_or_written_are_oserrors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache = small_cache()
    sequence = cache.new_sequence()
    cache.reserve([sequence], [3])
    with pytest.raises(OSError, match="cannot be written"):
        cache.export(sequence, tmp_path)
    with pytest.raises(FileNotFoundError):
        cache.import_(tmp_path / "nothing.safetensors")
    assert cache.sequences == (sequence,)


def test_odd_but_legal_ways_to_use_a_cache() -> None:
    cache = small_cache()
    a, b = cache.new_sequence(), cache.new_sequence()
    slots = cache.reserve((s for s in (a, b)), np.array([2, 0]))
    cache.write(0, read_only(slots), *map(read_only, rows(2)))
    cache.write(1, np.full(2, -1), *rows(2, dtype=np.float32))
    cache.write(np.int64(1), slots[:0], *rows(0))
    assert cache.reserve([], []).shape == (0,)
    assert cache.batch(np.array([a])).cache_seqlens.tolist() == [2]
    assert cache.batch([np.int8(a), b]).cache_seqlens[:2].tolist() == [2, 0]
    cache.write(1, slots, cache.pages(0)[0, :2, :16], cache.pages(0)[0, :2, 16:])  # from one layer to another
    assert cache.batch([]).block_table.shape[0] == 0
    assert cache.batch([], rows=4).cache_seqlens.tolist() == [0] * 4
    imported = cache.import_((np.broadcast_to(zeros(16), (2, 3, 16)), np.broadcast_to(zeros(8), (2, 3, 8))))
    assert cache.length(imported) == 3
    cache.truncate(imported, np.int32(0))
    assert small_cache(device="cpu:0").device == "cpu"
    torch = pytest.importorskip("torch")
    assert cache.batch(torch.tensor([a])).cache_seqlens.tolist() == [2]
    assert small_cache(device=torch.device("cpu", 0)).device == "cpu"
    parameter = torch.nn.Parameter(torch.ones(2, 16))
    cache.write(0, slots, parameter, torch.zeros(2, 8, requires_grad=True))
    assert (cache.export(a).latent[0] == 1).all()
    passing = cache.fork(torch.tensor(a))
    assert cache.reserve(torch.tensor([passing]), torch.tensor([1])).shape == (1,)
    cache.free(torch.tensor(passing))
    assert passing not in cache.sequences
