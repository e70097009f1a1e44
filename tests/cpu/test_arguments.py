"""Mistakes in arguments: each is refused by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import etap_rt
from etap_rt import ArgumentError, ArgumentTypeError, arguments
from etap_rt.arguments import check
from tests.cases import to_torch

BF16 = ml_dtypes.bfloat16


def zeros(*shape: int, dtype: Any = BF16) -> Any:
    return np.zeros(shape, dtype)


def good_arguments() -> dict[str, Any]:
    """2 requests, 2 query tokens, 3 heads; a cache of 7 pages of 64 tokens."""
    return {
        "q": zeros(2, 2, 3, 576),
        "kv_cache": zeros(7, 64, 576),
        "block_table": zeros(2, 4, dtype=np.int32),
        "cache_seqlens": zeros(2, dtype=np.int32),
        "softmax_scale": 0.1,
        "causal": True,
        "out": zeros(2, 2, 3, 512),
        "lse": zeros(2, 3, 2, dtype=np.float32),
    }


def off_by(byte_count: int, x: Any) -> Any:
    """A contiguous array like `x` that begins `byte_count` bytes after a multiple of 16 bytes."""
    raw = np.zeros(x.nbytes + 32, np.uint8)
    begin = -raw.ctypes.data % 16 + byte_count
    return raw[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)


def read_only(x: Any) -> Any:
    x.flags.writeable = False
    return x


@dataclass(frozen=True)
class Wrong:
    argument: str  # the name that the message begins with
    change: Callable[[], dict[str, Any]]
    given: str  # what the message says was given
    error: type[Exception] = ArgumentError


def split_q(latent: Any, rope: Any) -> dict[str, Any]:
    return {"q": (latent, rope)}


WRONG = (
    # types
    Wrong("q", lambda: {"q": [[1.0]] * 3}, "list of 3", ArgumentTypeError),
    Wrong("q", lambda: {"q": None}, "NoneType", ArgumentTypeError),
    Wrong("q[0]", lambda: {"q": [1.0, 2.0]}, "float", ArgumentTypeError),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), None), "NoneType", ArgumentTypeError),
    Wrong("kv_cache", lambda: {"kv_cache": ()}, "tuple of 0", ArgumentTypeError),
    Wrong("kv_cache[1]", lambda: {"kv_cache": (zeros(7, 64, 512), "rope")}, "str", ArgumentTypeError),
    Wrong("block_table", lambda: {"block_table": [[0]]}, "list", ArgumentTypeError),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": [5, 7]}, "list", ArgumentTypeError),
    Wrong("out", lambda: {"out": 1}, "int", ArgumentTypeError),
    Wrong("lse", lambda: {"lse": True}, "bool", ArgumentTypeError),
    Wrong("softmax_scale", lambda: {"softmax_scale": None}, "None", ArgumentTypeError),
    Wrong("softmax_scale", lambda: {"softmax_scale": "0.1"}, "'0.1'", ArgumentTypeError),
    Wrong("softmax_scale", lambda: {"softmax_scale": True}, "True", ArgumentTypeError),
    Wrong("softmax_scale", lambda: {"softmax_scale": np.ones(1)}, "array([1.])", ArgumentTypeError),
    Wrong("causal", lambda: {"causal": 1}, "1", ArgumentTypeError),
    # ranges
    Wrong("softmax_scale", lambda: {"softmax_scale": 0.0}, "0.0"),
    Wrong("softmax_scale", lambda: {"softmax_scale": -1}, "-1"),
    Wrong("softmax_scale", lambda: {"softmax_scale": float("nan")}, "nan"),
    Wrong("softmax_scale", lambda: {"softmax_scale": float("inf")}, "inf"),
    Wrong("softmax_scale", lambda: {"softmax_scale": 1e39}, "1e+39"),
    # dtypes
    Wrong("q", lambda: {"q": zeros(2, 2, 3, 576, dtype=np.float32)}, "dtype float32"),
    Wrong("q", lambda: {"q": zeros(2, 2, 3, 576, dtype=">f2")}, "dtype >f2"),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), zeros(2, 2, 3, 64, dtype=np.float16)), "dtype float16"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 64, 576, dtype=np.float16)}, "dtype float16"),
    Wrong(
        "kv_cache[1]",
        lambda: {"kv_cache": (zeros(7, 64, 512), zeros(7, 64, 64, dtype=np.float32))},
        "dtype float32",
    ),
    Wrong("block_table", lambda: {"block_table": zeros(2, 4, dtype=np.int64)}, "dtype int64"),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": zeros(2, dtype=np.uint32)}, "dtype uint32"),
    Wrong("out", lambda: {"out": zeros(2, 2, 3, 512, dtype=np.float32)}, "dtype float32"),
    Wrong("lse", lambda: {"lse": zeros(2, 3, 2)}, "dtype bfloat16"),
    # shapes
    Wrong("q", lambda: {"q": zeros(2, 3, 576)}, "shape (2, 3, 576)"),
    Wrong("q", lambda: {"q": zeros(2, 2, 3, 512)}, "last dim 512"),
    Wrong("q", lambda: {"q": zeros(2, 0, 3, 576)}, "shape (2, 0, 3, 576)"),
    Wrong("q", lambda: {"q": zeros(2, 2, 0, 576)}, "0 heads"),
    Wrong("q", lambda: {"q": zeros(2, 2, 129, 576)}, "129 heads"),
    Wrong("q[0]", lambda: split_q(zeros(2, 2, 3, 576), zeros(2, 2, 3, 64)), "last dim 576"),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), zeros(2, 2, 3, 32)), "last dim 32"),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), zeros(2, 2, 4, 64)), "shape (2, 2, 4, 64)"),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), zeros(2, 3, 64)), "shape (2, 3, 64)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 64, 320)}, "shape (7, 64, 320)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 64, 2, 576)}, "shape (7, 64, 2, 576)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(64, 576)}, "shape (64, 576)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(0, 64, 576)}, "shape (0, 64, 576)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 0, 576)}, "shape (7, 0, 576)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 96, 576)}, "shape (7, 96, 576)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 24, 576)}, "shape (7, 24, 576)"),
    Wrong("kv_cache[0]", lambda: {"kv_cache": (zeros(7, 64, 256), zeros(7, 64, 64))}, "shape (7, 64, 256)"),
    Wrong("kv_cache[1]", lambda: {"kv_cache": (zeros(7, 64, 512), zeros(7, 128, 64))}, "shape (7, 128, 64)"),
    Wrong("block_table", lambda: {"block_table": zeros(3, 4, dtype=np.int32)}, "shape (3, 4)"),
    Wrong("block_table", lambda: {"block_table": zeros(2, dtype=np.int32)}, "shape (2,)"),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": zeros(2, 1, dtype=np.int32)}, "shape (2, 1)"),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": zeros(3, dtype=np.int32)}, "shape (3,)"),
    Wrong("out", lambda: {"out": zeros(2, 2, 3, 576)}, "shape (2, 2, 3, 576)"),
    Wrong("lse", lambda: {"lse": zeros(2, 2, 3, dtype=np.float32)}, "shape (2, 2, 3)"),
    # strides
    Wrong("q", lambda: {"q": zeros(2, 2, 3, 1152)[..., ::2]}, "stride 2 in the last dim"),
    Wrong("q[1]", lambda: split_q(zeros(2, 2, 3, 512), zeros(2, 2, 64, 3).swapaxes(2, 3)), "stride 3 in the last dim"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 576, 64).swapaxes(1, 2)}, "stride 64 in the last dim"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 64, 580)[..., :576]}, "strides (37120, 580, 1)"),
    Wrong("kv_cache", lambda: {"kv_cache": zeros(7, 64, 576)[::-1]}, "strides (-36864, 576, 1)"),
    Wrong("block_table", lambda: {"block_table": zeros(2, 8, dtype=np.int32)[:, ::2]}, "stride 2 in the last dim"),
    Wrong("out", lambda: {"out": zeros(2, 2, 512, 3).swapaxes(2, 3)}, "stride 3 in the last dim"),
    Wrong("out", lambda: {"out": zeros(2, 2, 3, 516)[..., :512]}, "strides (3096, 1548, 516, 1)"),
    Wrong(
        "out",
        lambda: {"out": np.lib.stride_tricks.as_strided(zeros(9999), (2, 2, 3, 512), (0, 3072, 1024, 2))},
        "strides (0, 1536, 512, 1)",
    ),
    Wrong(
        "lse",
        lambda: {"lse": np.lib.stride_tricks.as_strided(zeros(99, dtype=np.float32), (2, 3, 2), (24, 8, 0))},
        "strides (6, 2, 0)",
    ),
    # addresses
    Wrong("q", lambda: {"q": off_by(1, zeros(2, 2, 3, 576))}, "address 0x"),
    Wrong("kv_cache", lambda: {"kv_cache": off_by(8, zeros(7, 64, 576))}, "address 0x"),
    Wrong("kv_cache[1]", lambda: {"kv_cache": (zeros(7, 64, 512), off_by(2, zeros(7, 64, 64)))}, "address 0x"),
    Wrong("block_table", lambda: {"block_table": off_by(2, zeros(2, 4, dtype=np.int32))}, "address 0x"),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": off_by(1, zeros(2, dtype=np.int32))}, "address 0x"),
    Wrong("out", lambda: {"out": off_by(8, zeros(2, 2, 3, 512))}, "address 0x"),
    Wrong("lse", lambda: {"lse": off_by(2, zeros(2, 3, 2, dtype=np.float32))}, "address 0x"),
    Wrong("out", lambda: {"out": read_only(zeros(2, 2, 3, 512))}, "a read-only array"),
    Wrong("lse", lambda: {"lse": read_only(zeros(2, 3, 2, dtype=np.float32))}, "a read-only array"),
)


def ints(*shape: int) -> Any:
    return zeros(*shape, dtype=np.int32)


def good_ragged_arguments() -> dict[str, Any]:
    """As `good_arguments`, with 5 query tokens for both requests and pages in a list of 6."""
    return good_arguments() | {
        "q": zeros(5, 3, 576),
        "block_table": (ints(6), ints(3)),
        "cu_seqlens_q": np.array([0, 2, 5], np.int32),
        "out": zeros(5, 3, 512),
        "lse": zeros(3, 5, dtype=np.float32),
    }


WRONG_RAGGED = (
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": [0, 2, 5]}, "list", ArgumentTypeError),
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": zeros(3, dtype=np.int64)}, "dtype int64"),
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": ints(3, 1)}, "shape (3, 1)"),
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": ints(0)}, "shape (0,)"),
    Wrong(
        "cu_seqlens_q",
        lambda: {"cu_seqlens_q": ints(1), "cache_seqlens": ints(0), "block_table": (ints(6), ints(1))},
        "shape (1,)",
    ),
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": ints(6)[::2]}, "stride 2 in the last dim"),
    Wrong("cu_seqlens_q", lambda: {"cu_seqlens_q": off_by(2, ints(3))}, "address 0x"),
    Wrong("q", lambda: {"q": zeros(1, 5, 3, 576)}, "shape (1, 5, 3, 576)"),
    Wrong("q", lambda: {"cu_seqlens_q": None}, "shape (5, 3, 576)"),
    Wrong("q", lambda: {"q": zeros(5, 129, 576)}, "129 heads (dim 1 of shape (5, 129, 576))"),
    Wrong("q[1]", lambda: split_q(zeros(5, 3, 512), zeros(4, 3, 64)), "shape (4, 3, 64)"),
    Wrong("cache_seqlens", lambda: {"cache_seqlens": ints(5)}, "shape (5,)"),
    Wrong("out", lambda: {"out": zeros(1, 5, 3, 512)}, "shape (1, 5, 3, 512)"),
    Wrong("lse", lambda: {"lse": zeros(5, 3, dtype=np.float32)}, "shape (5, 3)"),
    Wrong(
        "lse",
        lambda: {"lse": np.lib.stride_tricks.as_strided(zeros(99, dtype=np.float32), (3, 5), (4, 8))},
        "strides (1, 2)",
    ),
    Wrong("block_table", lambda: {"block_table": ints(3, 4)}, "shape (3, 4)"),
    Wrong("block_table", lambda: {"block_table": (ints(6), ints(3), ints(2))}, "tuple of 3", ArgumentTypeError),
    Wrong("block_table[0]", lambda: {"block_table": ([1], ints(3))}, "list", ArgumentTypeError),
    Wrong("block_table[0]", lambda: {"block_table": (zeros(6, dtype=np.int64), ints(3))}, "dtype int64"),
    Wrong("block_table[0]", lambda: {"block_table": (ints(2, 3), ints(3))}, "shape (2, 3)"),
    Wrong("block_table[0]", lambda: {"block_table": (ints(12)[::2], ints(3))}, "stride 2 in the last dim"),
    Wrong("block_table[0]", lambda: {"block_table": (off_by(1, ints(6)), ints(3))}, "address 0x"),
    Wrong("block_table[1]", lambda: {"block_table": (ints(6), None)}, "NoneType", ArgumentTypeError),
    Wrong("block_table[1]", lambda: {"block_table": (ints(6), zeros(3, dtype=np.float32))}, "dtype float32"),
    Wrong("block_table[1]", lambda: {"block_table": (ints(6), ints(2))}, "shape (2,)"),
    Wrong("block_table[1]", lambda: {"block_table": (ints(6), ints(6)[::2])}, "stride 2 in the last dim"),
    Wrong("block_table[1]", lambda: {"block_table": (ints(6), off_by(3, ints(3)))}, "address 0x"),
)


def wrong_id(x: Any) -> str:
    return f"{x.argument}-{x.given}" if isinstance(x, Wrong) else x.__name__.removesuffix("_arguments")


EVERY_WRONG = [(good_arguments, wrong) for wrong in WRONG] + [(good_ragged_arguments, wrong) for wrong in WRONG_RAGGED]


@pytest.mark.parametrize(("good", "wrong"), EVERY_WRONG, ids=wrong_id)
@pytest.mark.parametrize("entry", [etap_rt.mla_decode, etap_rt.check_inputs], ids=["mla_decode", "check_inputs"])
def test_a_wrong_argument_is_refused_by_name(
    good: Callable[[], dict[str, Any]], wrong: Wrong, entry: Callable[..., Any]
) -> None:
    call = good() | wrong.change()
    arrays = {name: call.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")}
    for _ in range(2):  # a refusal is never remembered as a success
        with pytest.raises(wrong.error) as caught:
            entry(*arrays.values(), **call)
        assert isinstance(caught.value, etap_rt.EtapError) and isinstance(caught.value, (ValueError, TypeError))
        assert str(caught.value).startswith(f"{wrong.argument}: got {wrong.given}")
        assert ", accepted is " in str(caught.value)


@pytest.mark.parametrize("name", ["block_table[0]", "block_table[1]", "cu_seqlens_q"])
def test_offsets_and_page_lists_on_different_devices_are_refused(name: str) -> None:
    pytest.importorskip("torch")
    call = good_ragged_arguments()
    indices, indptr = call["block_table"]
    elsewhere = {"block_table[0]": indices, "block_table[1]": indptr, "cu_seqlens_q": call["cu_seqlens_q"]}
    elsewhere[name] = to_torch(elsewhere[name]).to("meta")
    call["cu_seqlens_q"] = elsewhere.pop("cu_seqlens_q")
    call["block_table"] = tuple(elsewhere.values())
    with pytest.raises(ArgumentError) as caught:
        check(**call)
    assert str(caught.value) == f"{name}: got device meta:0, accepted is cpu:0, where q is"


@pytest.mark.parametrize("name", ["kv_cache", "block_table", "cache_seqlens", "out", "lse"])
def test_arrays_on_different_devices_are_refused(name: str) -> None:
    pytest.importorskip("torch")
    call = good_arguments()
    call[name] = to_torch(call[name]).to("meta")
    with pytest.raises(ArgumentError, match=f"{name}: got device meta:0, accepted is cpu:0, where q is"):
        check(**call)


def test_a_device_that_is_neither_cpu_nor_cuda_is_refused() -> None:
    torch = pytest.importorskip("torch")
    call = good_arguments()
    call["q"] = torch.zeros(2, 2, 3, 576, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ArgumentError, match="q: got device meta, accepted is cuda or cpu"):
        check(**call)


def test_a_packed_call_is_described_to_the_kernel() -> None:
    call_arguments = good_arguments()
    call = check(**call_arguments)
    problem = call.problem
    assert (problem.element, problem.batch, problem.s_q, problem.heads) == ("bfloat16", 2, 2, 3)
    assert (problem.latent_dim, problem.rope_dim) == (512, 64)
    assert (problem.num_pages, problem.page_size, problem.max_pages) == (7, 64, 4)
    assert (problem.device_type, problem.device) == ("cpu", 0)
    assert not problem.split_q and not problem.split_cache
    assert problem.q_strides == problem.q_rope_strides == (3456, 1728, 576)
    assert problem.cache_strides == problem.cache_rope_strides == (36864, 576)
    assert (problem.block_table_stride, problem.cache_seqlens_stride) == (4, 1)
    assert problem.out_strides == (3072, 1536, 512) and problem.lse_strides == (6, 2, 1)
    assert call.q_latent == call_arguments["q"].ctypes.data and call.q_rope == call.q_latent + 1024
    assert call.cache_latent == call_arguments["kv_cache"].ctypes.data and call.cache_rope == call.cache_latent + 1024
    assert call.block_table == call_arguments["block_table"].ctypes.data
    assert call.cache_seqlens == call_arguments["cache_seqlens"].ctypes.data
    assert call.out is not None and call.out.owner is call_arguments["out"]
    assert call.lse is not None and call.lse.owner is call_arguments["lse"]


def test_a_split_strided_call_is_described_to_the_kernel() -> None:
    q = (zeros(2, 2, 5, 300)[:, :, :3, :256], zeros(2, 2, 3, 65)[..., 1:].swapaxes(0, 1))
    kv_cache = (zeros(7, 129, 1, 264)[:, :128, :, :256], zeros(7, 128, 64))
    table, lengths = zeros(2, 9, dtype=np.int32)[:, 2:5], zeros(6, dtype=np.int32)[::3]
    call = check(q, kv_cache, table, lengths, 1, False)
    problem = call.problem
    assert (problem.latent_dim, problem.rope_dim, problem.page_size, problem.max_pages) == (256, 64, 128, 3)
    assert problem.split_q and problem.split_cache
    assert problem.q_strides == (3000, 1500, 300) and problem.q_rope_strides == (195, 390, 65)
    assert problem.cache_strides == (129 * 264, 264) and problem.cache_rope_strides == (128 * 64, 64)
    assert (problem.block_table_stride, problem.cache_seqlens_stride) == (9, 3)
    assert (call.q_latent, call.q_rope) == (q[0].ctypes.data, q[1].ctypes.data)
    assert (call.cache_latent, call.cache_rope) == (kv_cache[0].ctypes.data, kv_cache[1].ctypes.data)
    assert call.out is None and call.lse is None
    assert problem.out_shape == (2, 2, 3, 256) and problem.out_strides == (1536, 768, 256)
    assert problem.lse_shape == (2, 3, 2) and problem.lse_strides == (6, 2, 1)


def test_a_ragged_call_with_a_page_list_is_described_to_the_kernel() -> None:
    call_arguments = good_ragged_arguments()
    call = check(**call_arguments)
    problem = call.problem
    assert (problem.ragged, problem.csr) == (True, True)
    assert (problem.batch, problem.s_q, problem.total_q, problem.heads) == (2, 0, 5, 3)
    assert problem.typical_rows == 18  # twice the mean of three tokens a request, rounded up, times three heads
    assert problem.q_strides == problem.q_rope_strides == (0, 1728, 576)
    assert problem.out_shape == (5, 3, 512) and problem.out_strides == (0, 1536, 512)
    assert problem.lse_shape == (3, 5) and problem.lse_strides == (0, 5, 1)
    assert (problem.max_pages, problem.block_table_stride, call.page_count) == (0, 0, 6)
    indices, indptr = call_arguments["block_table"]
    assert (call.block_table, call.page_indptr) == (indices.ctypes.data, indptr.ctypes.data)
    assert call.cu_seqlens_q == call_arguments["cu_seqlens_q"].ctypes.data
    call_arguments |= {"out": None, "lse": None}
    made = check(**call_arguments).problem
    assert made.out_strides == (0, 1536, 512) and made.lse_strides == (0, 5, 1)


def test_a_batch_has_no_offsets_and_no_page_list() -> None:
    call = check(**good_arguments())
    problem = call.problem
    assert (problem.ragged, problem.csr, problem.total_q, problem.typical_rows) == (False, False, 4, 6)
    assert (call.cu_seqlens_q, call.page_indptr, call.page_count) == (0, 0, 0)
    assert call.starts is None and call.indptr is None


def test_given_outputs_bring_their_strides() -> None:
    call = good_arguments()
    call["out"] = zeros(2, 2, 2, 3, 512)[:, 1]
    call["lse"] = zeros(3, 2, 2, dtype=np.float32).transpose(1, 0, 2)
    problem = check(**call).problem
    assert problem.out_strides == (6144, 1536, 512) and problem.lse_strides == (2, 4, 1)


def test_a_single_page_may_have_any_page_stride() -> None:
    call = good_arguments()
    call["kv_cache"] = np.lib.stride_tricks.as_strided(zeros(64, 576), (1, 64, 576), (2, 1152, 2))
    assert check(**call).problem.cache_strides == (36864, 576)


def test_pages_of_one_token_may_have_any_token_stride() -> None:
    call = good_arguments()
    call["kv_cache"] = np.lib.stride_tricks.as_strided(zeros(4, 576), (4, 1, 576), (1152, 2, 2))
    assert check(**call).problem.cache_strides == (576, 576)


def test_tokens_of_tiny_pages_may_not_lie_too_far_apart() -> None:
    call = good_arguments()
    for page_size, stride, most in ((4, 715_827_888, 715_827_882), (2, 1 << 31, (1 << 31) - 1)):
        page = zeros(1, 576)
        far = np.lib.stride_tricks.as_strided(page, (1, page_size, 576), (1152, 2 * stride, 2))
        with pytest.raises(ArgumentError, match=rf"^kv_cache: got strides .*{stride}.*at most {most} elements apart"):
            check(**call | {"kv_cache": far})
    near = np.lib.stride_tricks.as_strided(page, (1, 4, 576), (1152, 2 * 715_827_880, 2))
    assert check(**call | {"kv_cache": near}).problem.page_size == 4


def test_equal_layouts_are_one_problem_and_a_call_has_its_own_addresses() -> None:
    first, second = good_arguments(), good_arguments()
    a, b = check(**first), check(**second)
    assert a.problem is b.problem
    assert a.q_latent != b.q_latent and a.cache_latent != b.cache_latent
    second["q"] = zeros(2, 2, 3, 600)[..., :576]
    assert check(**second).problem is not a.problem
    second["out"] = None
    assert check(**second).out is None


def test_forgotten_problems_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etap_rt.interop.MAX_REMEMBERED", 3)
    monkeypatch.setattr(arguments, "_problems", {})
    call = good_arguments()
    for columns in range(10):
        call["block_table"] = zeros(2, columns, dtype=np.int32)
        assert check(**call).problem.max_pages == columns
        assert len(arguments._problems) <= 3


def test_libraries_may_be_mixed() -> None:
    pytest.importorskip("torch")
    call = good_arguments()
    call["block_table"], call["lse"] = to_torch(call["block_table"]), to_torch(call["lse"])
    assert isinstance(etap_rt.mla_decode(**call), np.ndarray)


def test_an_empty_batch_is_accepted_with_outputs() -> None:
    call = good_arguments()
    call |= {name: call[name][:0] for name in ("q", "block_table", "cache_seqlens", "out", "lse")}
    assert check(**call).problem.batch == 0
    call |= {"out": zeros(0, 2, 3, 512), "lse": zeros(0, 3, 2, dtype=np.float32), "q": zeros(0, 2, 3, 576)}
    assert check(**call).problem.batch == 0


def test_all_query_tokens_may_be_one_in_memory() -> None:
    call = good_arguments()
    call["q"] = np.broadcast_to(zeros(576), (2, 2, 3, 576))
    assert check(**call).problem.q_strides == (0, 0, 0)


# ---- check_inputs ----


def check_inputs(**changes: Any) -> None:
    call = good_arguments() | changes
    arrays = [call.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    etap_rt.check_inputs(*arrays, **call, return_lse=True)


def test_check_inputs_accepts_what_decode_accepts() -> None:
    unused = 2_147_480_000
    table = np.array([[6, 0, unused, unused], [1, 2, 3, 4]], np.int32)
    check_inputs(block_table=table, cache_seqlens=np.array([65, 256], np.int32))
    check_inputs(block_table=table, cache_seqlens=np.array([0, 193], np.int32))
    pytest.importorskip("torch")
    check_inputs(block_table=to_torch(table), cache_seqlens=to_torch(np.array([128, 256], np.int32)))


@pytest.mark.parametrize("convert", [np.asarray, to_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([-1, 0], "cache_seqlens[0]: got -1, accepted is 0 ... 256 (max_pages * page_size)"),
        ([192, 257], "cache_seqlens[1]: got 257, accepted is 0 ... 256 (max_pages * page_size)"),
        ([64, 65], "block_table[1, 1]: got 7, accepted is 0 ... 6 (num_pages - 1)"),
        ([193, 300], "block_table[0, 3]: got -2, accepted is 0 ... 6 (num_pages - 1)"),
    ],
)
def test_check_inputs_names_the_first_bad_request(
    lengths: list[int], message: str, convert: Callable[[Any], Any]
) -> None:
    if convert is to_torch:
        pytest.importorskip("torch")
    table = np.array([[0, 1, 2, -2], [3, 7, 8, 0]], np.int32)
    with pytest.raises(ArgumentError) as caught:
        check_inputs(block_table=convert(table), cache_seqlens=convert(np.array(lengths, np.int32)))
    assert str(caught.value) == message


def check_ragged_inputs(**changes: Any) -> None:
    call = good_ragged_arguments() | {"lse": None} | changes
    arrays = [call.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    etap_rt.check_inputs(*arrays, **call)


def as_ints(*values: int) -> Any:
    return np.array(values, np.int32)


def test_check_inputs_accepts_ragged_queries_and_page_lists() -> None:
    unused = 2_147_480_000
    indices = as_ints(unused, 6, 0, unused, 3, unused)
    check_ragged_inputs(block_table=(indices, as_ints(1, 4, 6)), cache_seqlens=as_ints(128, 64))
    check_ragged_inputs(block_table=(indices, as_ints(1, 3, 3)), cache_seqlens=as_ints(65, 0))
    check_ragged_inputs(cu_seqlens_q=as_ints(0, 0, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": as_ints(1, 2, 5)}, "cu_seqlens_q[0]: got 1, accepted is 0"),
        ({"cu_seqlens_q": as_ints(0, 2, 4)}, "cu_seqlens_q[2]: got 4, accepted is 5 (query tokens)"),
        ({"cu_seqlens_q": as_ints(0, 6, 5)}, "cu_seqlens_q[1]: got 6, accepted is 0 ... 5 (query tokens)"),
        ({"cu_seqlens_q": as_ints(0, 3, 2)}, "cu_seqlens_q[2]: got 2, accepted is 3 ... 5 (query tokens)"),
        ({"indptr": as_ints(0, 3, 7)}, "block_table[1][2]: got 7, accepted is 3 ... 6 (page indices)"),
        ({"indptr": as_ints(0, -1, 6)}, "block_table[1][1]: got -1, accepted is 0 ... 6 (page indices)"),
        ({"cache_seqlens": as_ints(129, 0)}, "cache_seqlens[0]: got 129, accepted is 0 ... 128 (2 pages * page_size)"),
        ({"cache_seqlens": as_ints(-1, 0)}, "cache_seqlens[0]: got -1, accepted is 0 ... 128 (2 pages * page_size)"),
        ({"cache_seqlens": as_ints(128, 193)}, "block_table[0][5]: got 7, accepted is 0 ... 6 (num_pages - 1)"),
    ],
)
def test_check_inputs_names_the_first_bad_offset(changes: dict[str, Any], message: str) -> None:
    others = {name: value for name, value in changes.items() if name != "indptr"}
    table = (as_ints(0, 1, 2, 3, 4, 7), changes.get("indptr", as_ints(0, 2, 6)))
    with pytest.raises(ArgumentError) as caught:
        check_ragged_inputs(**others, block_table=table)
    assert str(caught.value) == message


def test_check_inputs_refuses_a_return_lse_that_is_no_bool() -> None:
    call = good_arguments()
    arrays = [call.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    with pytest.raises(ArgumentTypeError, match="return_lse: got 1"):
        etap_rt.check_inputs(*arrays, **call, return_lse=1)
